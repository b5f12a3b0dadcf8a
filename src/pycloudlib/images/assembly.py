"""The steps of a build: packages become a file system, and that a bootable disk."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pycloudlib._base.tools import (
    environment,
    find_tool,
    is_root,
    run_confined,
    run_tool,
    run_tool_streaming,
)
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

KEYRING = Path(__file__).parent / "keys" / "debian-archive.gpg"
"""The keys that sign bookworm and trixie, as Debian's package debian-archive-keyring has them.

Shipped, because other distributions' copies of that package end with older releases.
"""

# Not those of the host's mke2fs.conf: boot loaders and kernels older than the host's e2fsprogs have
# to read the file system.
_EXT4_FEATURES = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,"
    "large_file,huge_file,dir_nlink,extra_isize,metadata_csum"
)

# The recipe's script names them, too.
_GUEST_FILES, _KERNEL, _INITRD = "guest-files.tar", "kernel", "initrd"

_DETAIL = re.compile(
    r"I: (?P<mmdebstrap>.+?)\.*"
    r"|Get:\d+ \S+ (?:\S+ ){2}(?P<downloaded>\S+) \S+ \S+ \[.*"
    r"|(?P<handled>(?:Unpacking|Setting up) \S+) .*"
    r"|(?P<initrd>update-initramfs: Generating) .*"
)

SECTOR = 512
GRUB_DIRECTORY = Path("/usr/lib/grub/i386-pc")
"""GRUB for the BIOS, from the package grub-pc-bin."""

_GIB = 1024**3
_ALIGNMENT = 2048  # sectors; 1 MiB, as every partitioning tool aligns

# As Ubuntu's cloud images have them. The root partition comes last, so that it can grow.
_BIOS_START, _BIOS_SECTORS = 2048, 8192
_EFI_START, _EFI_SECTORS = 10240, 217088
_ROOT_START = 227328
_BIOS_BOOT_TYPE = "21686148-6449-6E6F-744E-656564454649"
_EFI_SYSTEM_TYPE = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
_LINUX_TYPE = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"

# All that GRUB needs is in its core image, so that nothing of it has to be on the root disk.
_GRUB_MODULES = (
    *("biosdisk", "part_gpt", "part_msdos", "ext2"),
    *("normal", "configfile", "linux", "serial", "terminal", "echo", "test"),
    *("search", "search_label", "search_fs_uuid", "search_fs_file"),
    *("boot", "cat", "halt", "ls", "minicmd", "reboot", "sleep"),
)


@dataclass(frozen=True, slots=True)
class Handover:
    """The directory in which programs inside and outside of the confinement exchange files.

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
        path.chmod(0o666)  # only the owner can enter the directory above
        return path


def install_packages(
    step: str, recipe: BuildRecipe, rootfs: Path, handover: Handover, report: Callable[[str], None]
) -> None:
    """Install a recipe's packages into a new directory; apt checks their signatures.

    Args:
        step: What this is called in an error.
        recipe: Whose packages.
        rootfs: The directory; its parent takes temporary files.
        handover: Kept open by the programs until the last of them ends.
        report: Called with what happens just now.
    """
    # Beside the system, where programs in a user namespace can read it, too.
    keyring = rootfs.parent / KEYRING.name
    shutil.copyfile(KEYRING, keyring)
    keyring.chmod(0o644)

    def on_line(line: str) -> None:
        detail = find_detail(line)
        if detail is not None:
            report(detail)

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


def find_detail(line: str) -> str | None:
    """Return what is happening by a line of mmdebstrap's and apt's output; None if nothing."""
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
    """Pack files into a tar archive, all owned by root."""
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


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition of the disk; places and lengths in sectors of 512 bytes.

    Attributes:
        number: Its number in the table, by which the guest's device is named.
        start: Its first sector.
        sectors: Its length.
        type_id: GUID of its type.
    """

    number: int
    start: int
    sectors: int
    type_id: str

    @property
    def offset(self) -> int:
        """Where it begins, in bytes."""
        return self.start * SECTOR

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return self.sectors * SECTOR


@dataclass(frozen=True, slots=True)
class DiskLayout:
    """The partitions of a disk.

    Attributes:
        size: Length of the disk in bytes.
        bios_boot: Where GRUB's core image lies (partition 14).
        efi_system: The EFI system partition (15).
        root: The root file system (1).
    """

    size: int
    bios_boot: Partition
    efi_system: Partition
    root: Partition


def build_layout(size_gib: int) -> DiskLayout:
    """Lay out a disk as Ubuntu's cloud images are laid out."""
    size = size_gib * _GIB
    # The last MiB stays free: it ends with the second copy of the partition table.
    end = size // SECTOR - _ALIGNMENT
    return DiskLayout(
        size=size,
        bios_boot=Partition(14, _BIOS_START, _BIOS_SECTORS, _BIOS_BOOT_TYPE),
        efi_system=Partition(15, _EFI_START, _EFI_SECTORS, _EFI_SYSTEM_TYPE),
        root=Partition(1, _ROOT_START, end - _ROOT_START, _LINUX_TYPE),
    )


def build_sfdisk_script(layout: DiskLayout) -> str:
    """Write the partition table for sfdisk."""
    partitions = (layout.root, layout.bios_boot, layout.efi_system)
    rows = (
        f"{each.number} : start={each.start}, size={each.sectors}, type={each.type_id}"
        for each in partitions
    )
    return "\n".join(("label: gpt", *rows)) + "\n"


def write_partition_table(step: str, disk: Path, layout: DiskLayout) -> None:
    """Make a disk image of the layout's size and partitions; whatever it held is gone."""
    with disk.open("wb") as file:
        file.truncate(layout.size)
    script = build_sfdisk_script(layout).encode()
    run_tool(step, ("sfdisk", "--quiet", disk), input_bytes=script)


def format_efi_partition(step: str, disk: Path, partition: Partition) -> None:
    """Make an empty FAT file system in the EFI system partition."""
    options = ("-F", "32", "-n", "UEFI", "--offset", str(partition.start))
    run_tool(step, ("mkfs.vfat", *options, disk, str(partition.size // 1024)))


def write_boot_loader(step: str, disk: Path, layout: DiskLayout) -> None:
    """Make the BIOS start GRUB, which reads /boot/grub/grub.cfg on the root partition."""
    with tempfile.TemporaryDirectory(prefix="grub-", dir=disk.parent) as directory:
        core = Path(directory) / "core.img"
        # No disk is named: GRUB takes the one it was started from.
        prefix = f"(,gpt{layout.root.number})/boot/grub"
        options = ("-O", "i386-pc", "-d", GRUB_DIRECTORY, "-p", prefix, "-o", core)
        run_tool(step, ("grub-mkimage", *options, *_GRUB_MODULES))
        core_image = core.read_bytes()
    start = layout.bios_boot.start
    if len(core_image) > layout.bios_boot.size:
        raise OSError(f"GRUB's core image has {len(core_image)} bytes: too large for its partition")
    with disk.open("r+b") as file:
        first_sector = file.read(SECTOR)
        boot_image = (GRUB_DIRECTORY / "boot.img").read_bytes()
        file.seek(0)
        file.write(patch_boot_sector(first_sector, boot_image, core_sector=start))
        file.seek(layout.bios_boot.offset)
        file.write(patch_core_image(core_image, core_sector=start))


def patch_boot_sector(first_sector: bytes, boot_image: bytes, *, core_sector: int) -> bytes:
    """Return a disk's first sector with GRUB's boot code and the partition table that was there.

    Args:
        first_sector: The disk's first sector, with its (protective) partition table.
        boot_image: GRUB's boot.img.
        core_sector: Where on the disk GRUB's core image begins.
    """
    code = bytearray(boot_image[:440])  # disk signature and partition table follow
    code[0x5C:0x64] = core_sector.to_bytes(8, "little")
    return bytes(code) + first_sector[440:]


def patch_core_image(core_image: bytes, *, core_sector: int) -> bytes:
    """Return GRUB's core image with the place of its sectors in the first one, which loads them.

    Args:
        core_image: What grub-mkimage made.
        core_sector: Where on the disk it will begin.
    """
    patched = bytearray(core_image)
    patched[0x1F4:0x1FC] = (core_sector + 1).to_bytes(8, "little")
    return bytes(patched)


def compress(
    step: str, disk: Path, image: Path, *, on_line: Callable[[str], None], held_descriptor: int
) -> None:
    """Write a disk image as a compressed qcow2.

    Args:
        step: What this is called in an error.
        disk: The plain disk image.
        image: The file to make.
        on_line: Called with each line qemu-img prints.
        held_descriptor: A file descriptor for qemu-img to keep open while it runs.
    """
    # zstd is four times as fast as zlib here and no larger; QEMU reads it from 5.1 on.
    form = ("-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd")
    # Compressed clusters may be written in any order, by several threads.
    options = ("-W", "-m", "4", "-p")
    argv = ("qemu-img", "convert", *form, *options, disk, image)
    run_tool_streaming(step, argv, on_line=on_line, pass_fds=(held_descriptor,))
