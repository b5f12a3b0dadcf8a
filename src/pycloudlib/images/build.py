"""A bootable cloud image built on this machine from Debian's signed packages.

An image is built once for each recipe: it is found again by the recipe's digest in its record. A
build happens in a workshop, a temporary directory beside the images; one rename makes its result
final. One process builds at a time; the others wait and use its image.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pycloudlib._base import tools
from pycloudlib._base.files import create_directories, hash_file
from pycloudlib._base.locks import directory_lock, exclusive_lock
from pycloudlib._base.tools import find_tool
from pycloudlib.errors import ImageBuildError, MissingPrerequisiteError, ToolError
from pycloudlib.images import assembly, store
from pycloudlib.images.assembly import Handover, remove_tree
from pycloudlib.images.recipe import RELEASES, BuildRecipe
from pycloudlib.progress import Progress, ProgressCallback, ignore_progress

__all__ = ["RELEASES", "BuildRecipe", "build_image", "find_built_image"]

_SOURCE = "built:"  # of a record; the recipe's key follows
LOCK_NAME = ".build.lock"
_DISK = "disk.raw"

_TOOLS = ("mmdebstrap", "mke2fs", "sfdisk", "mkfs.vfat", "grub-mkimage", "qemu-img", "setpriv")
_PREREQUISITE_FILES = ((assembly.GRUB_DIRECTORY / "boot.img", "grub-pc-bin"),)

_GIB = 1024**3
# Measured: 0.6 GiB of system, the same again as a disk image, 0.2 GiB compressed; further packages
# may double it.
_NEEDED_SPACE = 3 * _GIB
_WORKSHOP_PREFIX = ".build-"
_SCRATCH_PREFIX = "pycloudlib-build-"
_SCRATCH_NOTE = "scratch-path"


@dataclass(frozen=True, slots=True)
class Workshop:
    """The temporary directories of one build.

    Attributes:
        directory: The temporary directory, on the file system of the images.
        product: The directory in it that becomes the image's own.
        handover: The directory in it that confined programs reach.
    """

    directory: Path
    product: Path
    handover: Handover


@contextlib.contextmanager
def open_workshop(image_dir: Path) -> Iterator[Workshop]:
    """Make a workshop for one build; nothing of it is left afterwards."""
    directory = Path(tempfile.mkdtemp(prefix=_WORKSHOP_PREFIX, dir=image_dir))
    try:
        product, shared = directory / "image", directory / "handover"
        product.mkdir(mode=0o700)
        shared.mkdir()
        shared.chmod(0o755)  # for programs with its descriptor; the directory above is private
        with directory_lock(shared) as descriptor:
            yield Workshop(directory, product, Handover(shared, descriptor))
    finally:
        _remove_workshop(directory)


def find_scratch_base() -> Path:
    """Return the directory in which an ordinary user's builds have their scratch directories."""
    # Not /tmp, which is memory on many hosts.
    return Path(os.environ.get("TMPDIR") or "/var/tmp")  # noqa: S108 - names in it are random


def make_scratch(directory: Path) -> Path:
    """Make the directory that the system is installed in, for the workshop in `directory`.

    For an ordinary user it belongs to a subordinate id, which may have no access to the user's
    home: then it is in the host's directory of temporary files, and its name is noted in the
    workshop before it exists, so that it is found again after a crash.
    """
    if tools.is_root():
        scratch = directory / "scratch"
        scratch.mkdir()
        return scratch
    scratch = find_scratch_base() / f"{_SCRATCH_PREFIX}{secrets.token_hex(8)}"
    (directory / _SCRATCH_NOTE).write_bytes(os.fsencode(scratch))
    tools.run_confined("making a directory", ("mkdir", "--mode=0700", scratch))
    return scratch


def remove_stale_workshops(image_dir: Path) -> None:
    """Remove what killed builds left; under the build lock, no other process has a workshop."""
    for directory in image_dir.glob(f"{_WORKSHOP_PREFIX}*/"):
        # The programs of a killed build hold this lock until they end, a moment later.
        with contextlib.suppress(FileNotFoundError), directory_lock(directory / "handover"):
            pass
        _remove_workshop(directory)


def _remove_workshop(directory: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        scratch = Path(os.fsdecode((directory / _SCRATCH_NOTE).read_bytes()))
        if scratch.name.startswith(_SCRATCH_PREFIX) and scratch.exists():
            remove_tree("removing temporary files (rm)", scratch)
    shutil.rmtree(directory)


def build_image(
    recipe: BuildRecipe,
    image_dir: Path,
    *,
    refresh: bool = False,
    on_progress: ProgressCallback = ignore_progress,
    make: MakeImage | None = None,
) -> Path:
    """Return the image of a recipe: one that is already there, or a new one.

    A build takes one to three minutes and needs the network, but no loop devices. It runs as root,
    or as an ordinary user where user namespaces are allowed. An interruption leaves nothing; when
    this process is killed, its programs end with it and the next build removes its files.

    Args:
        recipe: What to build.
        image_dir: The directory of images; made when missing.
        refresh: Build from today's packages even if there is an image; older ones are kept.
        on_progress: Called with each step and what happens in it.
        make: What makes the files of the image; by default it is built from packages.

    Returns:
        `<image_dir>/<release>/<serial>/<release>-server-cloudimg-amd64.img`, with its kernel,
        initrd and record beside it. The serial is the date of the build (UTC).

    Raises:
        ImageBuildError: A step failed; names it, with the last lines of its program's output.
        MissingPrerequisiteError: The host lacks a program, a keyring or a permission.
    """
    image_dir = image_dir.absolute()
    before = find_built_image(recipe, image_dir)
    if before is not None and not refresh:
        return before
    create_directories(image_dir)

    def report_wait(holder: str) -> None:
        on_progress(Progress(f"waiting for another process that builds an image: {holder}"))

    with exclusive_lock(image_dir / LOCK_NAME, report_wait):
        # Another process may have built it while this one waited.
        now = find_built_image(recipe, image_dir)
        if now is not None and now != before:
            return now
        remove_stale_workshops(image_dir)
        # Chosen before the build, which writes it into the image; the lock keeps it free.
        today = datetime.datetime.now(datetime.timezone.utc).date()
        serial = _choose_serial(image_dir / recipe.release, today)
        with open_workshop(image_dir) as workshop:
            (make or _make_image)(recipe, serial, workshop, Steps(recipe, on_progress))
            return _put_in_place(recipe, serial, workshop, image_dir)


def find_built_image(recipe: BuildRecipe, image_dir: Path) -> Path | None:
    """Find the newest image of a recipe; None when none has been built."""
    candidates = [
        image
        for image in image_dir.glob(f"{recipe.release}/*/{recipe.image_name}")
        if _is_built_from(recipe, image)
    ]
    return max(candidates, key=lambda image: store.serial_order(image.parent.name), default=None)


def _is_built_from(recipe: BuildRecipe, image: Path) -> bool:
    record = store.find_record(image)
    return (
        record is not None
        and record.source == _SOURCE + recipe.key
        and store.find_unprotected(image) is None
        and store.kernel_path(image).is_file()
        and store.initrd_path(image).is_file()
    )


MakeImage = Callable[[BuildRecipe, str, Workshop, "Steps"], None]
"""Makes the image of a recipe and a serial, its kernel and its initrd in the workshop's `product`.
"""


def _put_in_place(recipe: BuildRecipe, serial: str, workshop: Workshop, image_dir: Path) -> Path:
    """Record the image and give it its final name, complete or not at all."""
    release_dir = image_dir / recipe.release
    image = workshop.product / recipe.image_name
    with image.open("rb") as content:
        digest = hash_file(content).hexdigest()
    record = store.ImageRecord(
        release=recipe.release,
        serial=serial,
        sha256=digest,
        size=image.stat().st_size,
        source=_SOURCE + recipe.key,
        default_user=recipe.default_user,
    )
    store.write_record(image, record)
    for file in workshop.product.iterdir():
        file.chmod(0o600)
        _sync(file)
    _sync(workshop.product)
    release_dir.mkdir(mode=0o700, exist_ok=True)
    final = release_dir / serial
    workshop.product.rename(final)
    _sync(release_dir)
    return final / image.name


def _choose_serial(release_dir: Path, today: datetime.date) -> str:
    """Return a new serial: the date, and a number for later builds of a day."""
    date = today.strftime("%Y%m%d")
    taken = [store.serial_order(path.name) for path in release_dir.glob(f"{date}*")]
    numbers = [number for day, number in taken if day == int(date)]
    return f"{date}.{max(numbers) + 1}" if numbers else date


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Steps:
    """Counts, announces and names the steps of a build.

    Args:
        recipe: What is built.
        on_progress: Called with each step and its details.
    """

    TOTAL = 8

    def __init__(self, recipe: BuildRecipe, on_progress: ProgressCallback) -> None:
        self._recipe = recipe
        self._on_progress = on_progress
        self._done = 0
        self._current = Progress("")

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[str]:
        """Report a step, and name it in the error if it fails."""
        self._current = Progress(name, done=self._done, total=self.TOTAL, unit="step")
        self._on_progress(self._current)
        what = f"Cannot build an image of {self._recipe.release}"
        try:
            yield name
        except ToolError as error:
            raise ImageBuildError(f"{what}: {error}") from error
        except OSError as error:
            raise ImageBuildError(f"{what}: {name} failed: {error}") from error
        self._done += 1

    def report(self, detail: str) -> None:
        """Report a detail of the current step."""
        self._on_progress(dataclasses.replace(self._current, detail=detail))


def _make_image(recipe: BuildRecipe, serial: str, workshop: Workshop, steps: Steps) -> None:
    handover = workshop.handover
    image = workshop.product / recipe.image_name
    layout = assembly.build_layout(recipe.disk_size_gib)

    with steps.step("checking the host"):
        _check_host(workshop.directory)
        disk = handover.offer(_DISK)
        system = make_scratch(workshop.directory) / "rootfs"
    with steps.step("installing packages (mmdebstrap)") as name:
        assembly.install_packages(name, recipe, system, handover, steps.report)
    with steps.step("configuring the guest (sh)") as name:
        assembly.configure_guest(name, recipe, serial, system, handover)
        handover.kernel.rename(store.kernel_path(image))
        handover.initrd.rename(store.initrd_path(image))
    with steps.step("partitioning the disk (sfdisk)") as name:
        assembly.write_partition_table(name, disk, layout)
    with steps.step("making the file system (mke2fs)") as name:
        assembly.make_file_system(
            name, system, handover, _DISK, offset=layout.root.offset, size=layout.root.size
        )
    with steps.step("making the EFI system partition (mkfs.vfat)") as name:
        assembly.format_efi_partition(name, disk, layout.efi_system)
    with steps.step("writing the boot loader (grub-mkimage)") as name:
        assembly.write_boot_loader(name, disk, layout)
    with steps.step("compressing (qemu-img convert)") as name:
        assembly.compress(
            name, disk, image, on_line=steps.report, held_descriptor=handover.descriptor
        )


def _check_host(directory: Path) -> None:
    """Check that the host has everything that a build needs."""
    places = {directory} if tools.is_root() else {directory, find_scratch_base()}
    for place in places:
        free = shutil.disk_usage(place).free
        if free < _NEEDED_SPACE:
            raise ImageBuildError(
                f"Building an image needs {_NEEDED_SPACE / _GIB:.0f} GiB of disk space, and the "
                f"file system of {place} has {free / _GIB:.1f} GiB left"
            )
    _check_prerequisites()
    tools.check_confinement()


def _check_prerequisites() -> None:
    """Check that all programs and files are installed; the error names all that are missing."""
    problems = []
    for tool in (*_TOOLS, *tools.list_prerequisites()):
        try:
            find_tool(tool)
        except MissingPrerequisiteError as error:
            problems.append(str(error))
    problems += [
        f"The file {file} was not found; on Debian and Ubuntu install the package {package!r}"
        for file, package in _PREREQUISITE_FILES
        if not file.exists()
    ]
    if problems:
        raise MissingPrerequisiteError("; ".join(dict.fromkeys(problems)))
