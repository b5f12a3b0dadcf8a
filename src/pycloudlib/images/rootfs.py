"""A Debian system installed into a directory, and the directory made into a file system.

Every function here runs its program confined (see `confinement`), as root of a namespace. What
passes between inside and outside lies in the handover directory, which the programs inside reach
by its file descriptor: an ordinary user's home is closed to them.
"""

from __future__ import annotations

import io
import re
import shutil
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pycloudlib.images.confinement import is_root, run_confined
from pycloudlib.images.recipe import (
    CONFIGURE_SCRIPT,
    ROOT_LABEL,
    BuildRecipe,
    GuestFile,
    list_apt_sources,
    list_guest_files,
    list_packages,
    list_unwanted_files,
)
from pycloudlib.tools import environment, find_tool

KEYRING = Path(__file__).parent / "keys" / "debian-archive.gpg"
"""The keys that sign bookworm and trixie, as Debian's package debian-archive-keyring has them.

Shipped, because other distributions' copies of that package end with older releases.
"""

# Chosen, not left to the host's mke2fs.conf: boot loaders and kernels older than the host's
# e2fsprogs have to read it.
_EXT4_FEATURES = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,"
    "large_file,huge_file,dir_nlink,extra_isize,metadata_csum"
)

# Named by the recipe's script too.
_GUEST_FILES, _KERNEL, _INITRD = "guest-files.tar", "kernel", "initrd"


@dataclass(frozen=True, slots=True)
class Handover:
    """The directory where programs inside and outside of the confinement give files to each other.

    Attributes:
        path: The directory.
        descriptor: An open file descriptor of it.
    """

    path: Path
    descriptor: int

    @property
    def inner_path(self) -> Path:
        """The directory as a confined program names it, given the descriptor."""
        return Path(f"/proc/self/fd/{self.descriptor}")

    @property
    def kernel(self) -> Path:
        """Where the kernel is handed over."""
        return self.path / _KERNEL

    @property
    def initrd(self) -> Path:
        """Where the initrd is handed over."""
        return self.path / _INITRD

    def offer(self, name: str) -> Path:
        """Make an empty file that programs inside may write to."""
        path = self.path / name
        path.touch()
        path.chmod(0o666)  # the directory above lets in its owner only
        return path


def install_packages(
    step: str, recipe: BuildRecipe, rootfs: Path, handover: Handover, tell: Callable[[str], None]
) -> None:
    """Install a recipe's packages into a new directory; apt checks their signatures.

    Args:
        step: What this is called in an error.
        recipe: Whose packages.
        rootfs: The directory; its parent takes temporary files.
        handover: Held open by the programs until the last of them ends.
        tell: Called with what happens just now.
    """
    # Beside the system, where programs in a user namespace can read it, too.
    keyring = rootfs.parent / KEYRING.name
    shutil.copyfile(KEYRING, keyring)
    keyring.chmod(0o644)

    def on_line(line: str) -> None:
        detail = find_detail(line)
        if detail is not None:
            tell(detail)

    run_confined(
        step,
        build_mmdebstrap_command(recipe, rootfs, keyring, inside_user_namespace=not is_root()),
        on_line=on_line,
        env={**environment(downloads=True), "TMPDIR": str(rootfs.parent)},
        pass_fds=(handover.descriptor,),
    )


def build_mmdebstrap_command(
    recipe: BuildRecipe, rootfs: Path, keyring: Path, *, inside_user_namespace: bool
) -> list[str | Path]:
    """Write the command line that installs a recipe's packages into a directory."""
    return [
        "mmdebstrap",
        # In a user namespace device nodes cannot be made; mmdebstrap then binds the host's.
        f"--mode={'unshare' if inside_user_namespace else 'root'}",
        "--format=directory",
        "--variant=apt",
        "--verbose",
        f"--keyring={keyring}",
        "--dpkgopt=force-unsafe-io",  # a build that is cut short is thrown away
        f"--include={','.join(list_packages(recipe))}",
        recipe.release,
        rootfs,
        *list_apt_sources(recipe),
    ]


_DETAIL = re.compile(
    r"I: (?P<mmdebstrap>.+?)\.*"
    r"|Get:\d+ \S+ (?:\S+ ){2}(?P<downloaded>\S+) \S+ \S+ \[.*"
    r"|(?P<handled>(?:Unpacking|Setting up) \S+) .*"
    r"|(?P<initrd>update-initramfs: Generating) .*"
)


def find_detail(line: str) -> str | None:
    """Tell what a line of mmdebstrap's and apt's output says is happening; None if nothing."""
    match = _DETAIL.fullmatch(line)
    if match is None:
        return None
    if match["downloaded"]:
        return f"Downloading {match['downloaded']}"
    if match["initrd"]:
        return "Generating the initrd"
    return match["mmdebstrap"] or match["handled"]


def configure_guest(
    step: str, recipe: BuildRecipe, serial: str, rootfs: Path, handover: Handover
) -> None:
    """Make a cloud image of an installed system; hand over its kernel and initrd."""
    files = pack(list_guest_files(recipe, serial), int(time.time()))
    handover.offer(_GUEST_FILES).write_bytes(files)
    handover.offer(_KERNEL)
    handover.offer(_INITRD)
    inner = handover.inner_path
    run_confined(
        step,
        ("sh", "-c", CONFIGURE_SCRIPT, "sh", rootfs, inner, *list_unwanted_files()),
        pass_fds=(handover.descriptor,),
    )


def pack(files: tuple[GuestFile, ...], mtime: int) -> bytes:
    """Put files into a tar archive, all root's."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for file in files:
            member = tarfile.TarInfo(file.path.lstrip("/"))
            content = file.content.encode()
            member.mode, member.mtime, member.size = file.mode, mtime, len(content)
            if file.link:
                member.type, member.linkname, member.mode = tarfile.SYMTYPE, file.link, 0o777
            tar.addfile(member, io.BytesIO(content))
    return archive.getvalue()


def make_file_system(
    step: str, rootfs: Path, handover: Handover, disk_name: str, *, offset: int, size: int
) -> None:
    """Write a directory as an ext4 file system into a disk image.

    Args:
        step: What this is called in an error.
        rootfs: The directory.
        handover: Where the disk image lies.
        disk_name: The disk image's name there.
        offset: Where in the image the file system begins, in bytes.
        size: Its length in bytes.
    """
    run_confined(
        step,
        (
            find_tool("mke2fs"),
            *("-q", "-t", "ext4"),
            *("-L", ROOT_LABEL),
            *("-O", _EXT4_FEATURES),
            # Nothing is left for the guest's kernel to initialise while it boots.
            *("-E", f"offset={offset},lazy_itable_init=0,lazy_journal_init=0"),
            *("-d", rootfs),
            handover.inner_path / disk_name,
            f"{size // 1024}k",
        ),
        pass_fds=(handover.descriptor,),
    )


def remove_tree(step: str, directory: Path) -> None:
    """Remove a directory whose files belong to subordinate ids of this user."""
    run_confined(step, ("rm", "-rf", "--", directory))
