"""Disk snapshots in constant time: a machine's overlay becomes a layer, and the layer an image.

Nothing is copied. The overlay of a powered-off machine gets two more names (hard links): one among
the cloud's layers, on which the machine goes on in a new overlay, and one that is the image. So an
image can be deleted while its source machine lives on the layer, and the machine while the image
lives; the layer itself goes when nothing is built on it any more.

    instance/disk.qcow2 ──▶ layers/1f3a.qcow2 ──▶ bookworm-….img
                            snapshots/NAME.img (the same file as layers/1f3a.qcow2)
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pycloudlib._base.files import create_private_directory, is_file, is_not_found
from pycloudlib._base.locks import directory_lock
from pycloudlib.errors import CloudError, InstanceNotFoundError
from pycloudlib.images import store, uses
from pycloudlib.qemu.disk import diskimage
from pycloudlib.qemu.host.ownership import Orphans, Ownership, claim, disown
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.state.spec import LAYERS, SNAPSHOTS, MachineSpec

_log = logging.getLogger(__name__)

MAXIMUM_DEPTH = 16
"""Layers that a disk is built on before they are merged into one; see `performance.md`."""

_QCOW2_HEADER = struct.Struct(">4sIQI")
_LAST_OFFSET = 1 << 60  # beyond the end of any file, and still one that can be asked for
_CLOUD_PREFIX = "pycl-qemu-"
# What earlier versions locked.
_OLD_LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class LayerStore:
    """The layers and snapshots of one cloud.

    Attributes:
        parent_dir: The cloud's directory.
    """

    parent_dir: Path

    @property
    def snapshots(self) -> Path:
        """Where the images made by snapshots are."""
        return self.parent_dir / SNAPSHOTS

    @property
    def layers(self) -> Path:
        """Where the layers are."""
        return self.parent_dir / LAYERS

    def reserve(self, image_name: str, undo: contextlib.ExitStack) -> Path:
        """Name an image that is to be made; it goes with this program until it is `complete`.

        Args:
            image_name: The name of its file, without its directory.
            undo: Undoes that.
        """
        image = self.snapshots / image_name
        with self.keeping_all():
            create_private_directory(self.snapshots, parents=False)
            undo.callback(disown, image)
            # Nobody has a use for it yet.
            claim(image, Orphans.REAP)
        return image

    @contextlib.contextmanager
    def freezing(self, overlay: Path, image: Path, *, in_use: bool = False) -> Iterator[FrozenDisk]:
        """Make an image of a machine's overlay; the machine goes on in a new one.

        That begins with `FrozenDisk.exchange`; whatever goes wrong before, nothing is changed. The
        caller keeps others from changing the machine.

        Args:
            overlay: The machine's disk.
            image: The image, which is reserved.
            in_use: Whether a QEMU writes to the disk: it has to go on in the new overlay before
                that is exchanged, and then the machine stays on it whatever goes wrong.

        Yields:
            What is made. The image is whole at the end of the block.

        Raises:
            CloudError: The file system knows no hard links.
        """
        layer = self.layers / f"{secrets.token_hex(8)}.qcow2"
        frozen = FrozenDisk(overlay, layer, image, overlay.with_name(f".{layer.name}"))
        with self.keeping_all(), contextlib.ExitStack() as undo:
            if not in_use:
                _limit_depth(overlay)
            # After the image's own end: another program may record it as long as it is there.
            undo.callback(uses.forget, image)
            _link(overlay, layer)
            undo.callback(frozen.undo, in_use=in_use)
            _link(overlay, image)
            undo.callback(image.unlink, missing_ok=True)
            undo.callback(frozen.discard_fresh)
            diskimage.create_overlay(diskimage.read_layer(layer), frozen.fresh, unopened=True)
            yield frozen
            record_uses(image)
            undo.pop_all()
            # Of a disk whose layers were merged, some are used no more.
            record_uses(overlay)

    def freeze(self, overlay: Path, image_name: str) -> Path:
        """Make an image of a powered-off machine's overlay; see `freezing`."""
        with contextlib.ExitStack() as undo:
            image = self.reserve(image_name, undo)
            with self.freezing(overlay, image) as frozen:
                frozen.exchange()
            undo.pop_all()
        self.complete(image, overlay.parent)
        return image

    def complete(self, image: Path, machine: Path) -> None:
        """Note that an image is complete: what becomes of it, becomes of its machine.

        Args:
            image: The image.
            machine: The directory of the machine that it was made of.
        """
        found = Ownership.find(machine)
        claim(image, Orphans.REAP_AFTER_CRASH if found is None else found.orphans)

    def collect(self) -> None:
        """Remove the layers on which nothing is built any more; makes nothing anew."""
        with contextlib.suppress(FileNotFoundError), self._lock():
            # By identity: a disk may name its layers by another way to the same directory.
            needed = {
                _find_name(file)
                for tip in _tips(self.parent_dir.parent, fresh=True)
                for file in chain(tip)[1:]
            }
            for layer in self.layers.glob("*.qcow2"):
                if _find_name(layer) not in needed:
                    layer.unlink()
            uses.forget_gone(self.snapshots)

    def remove_if_empty(self) -> None:
        """Remove the directories of layers and snapshots that have nothing in them."""
        with contextlib.suppress(FileNotFoundError), self._lock():
            (self.layers / _OLD_LOCK).unlink(missing_ok=True)
            for directory in (self.snapshots, self.layers):
                with contextlib.suppress(OSError):  # something is in it, or it is gone already
                    directory.rmdir()

    def remove_cloud_directory(self) -> None:
        """Remove the cloud's directory, unless others have something in it.

        Raises:
            OSError: It could not be removed.
        """
        self.remove_if_empty()
        try:
            self.parent_dir.rmdir()
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            # Another cloud of the same tag works here, too.
            with contextlib.suppress(FileNotFoundError):  # they were about to remove it
                others = ", ".join(sorted(file.name for file in self.parent_dir.iterdir()))
                _log.info("%s is kept: others have %s in it", self.parent_dir, others)

    @contextlib.contextmanager
    def keeping_all(self) -> Iterator[None]:
        """Keep others from collecting layers, and from removing the directories, in the block.

        Raises:
            FileNotFoundError: The cloud has no directory; one of which a machine is has one.
        """
        with self._lock():
            create_private_directory(self.layers, parents=False)
            yield

    def _lock(self) -> contextlib.AbstractContextManager[int]:
        """Keep others from collecting a layer before the machine is built on it.

        The lock is the directory's own: a lock's file in it would be made anew by one program while
        another, which has removed all in it, is about to remove the directory.
        """
        return directory_lock(self.parent_dir)


@dataclass(frozen=True, slots=True)
class FrozenDisk:
    """A disk that becomes a layer, and the overlay that takes its place.

    Attributes:
        overlay: The machine's disk.
        layer: The name among the layers that it has, too.
        image: The name that it has as an image.
        fresh: The overlay on the layer, which has another name before it is exchanged.
    """

    overlay: Path
    layer: Path
    image: Path
    fresh: Path

    def exchange(self) -> None:
        """Give the fresh overlay the name of the machine's disk."""
        # One rename: at any moment the machine has a whole disk under the same name.
        self.fresh.replace(self.overlay)

    def discard_fresh(self) -> None:
        """Remove the fresh overlay, unless a machine may be on it, which is to be settled."""
        if not RunDirectory(self.overlay.parent).is_being_saved:
            self.fresh.unlink(missing_ok=True)

    def undo(self, *, in_use: bool) -> None:
        """Take the layer back, unless a machine that runs is built on it by now, or may be."""
        if in_use and (self.fresh.exists() or not _is_same(self.layer, self.overlay)):
            return
        # Of two names of one file, rename(2) would leave both.
        if _is_same(self.layer, self.overlay):
            self.layer.unlink()
        else:
            self.layer.replace(self.overlay)


def too_deep(overlay: Path) -> Path | None:
    """Give the lowest file of a disk whose layers have become many; None for any other."""
    files = chain(overlay)
    return files[-1] if len(files) - 1 > MAXIMUM_DEPTH else None


def record_uses(tip: Path) -> None:
    """Record, beside each image that a machine or a snapshot is built on, that it is used.

    Its layers are left out: nobody deletes them but `LayerStore.collect`.

    Args:
        tip: The machine's disk, or the snapshot's.
    """
    uses.record(tip, (file for file in _list_needed(tip) if file.parent.name != LAYERS))


def record_missing_uses(working_dir: Path) -> None:
    """Record the uses of machines and snapshots that were made by a version which did not."""
    # The directory may be one that cannot be read, and a machine may just be deleted.
    with contextlib.suppress(OSError):
        for tip in _tips(working_dir):
            if not uses.is_recorded(tip):
                record_uses(tip)


@contextlib.contextmanager
def deleting(image: Path, working_dir: Path) -> Iterator[None]:
    """Delete an image in the block, which nothing is built on, nor begins to be meanwhile.

    Args:
        image: The image.
        working_dir: Where directories of clouds are; others' are known by their records alone.

    Raises:
        ImageInUseError: It is in use; names by what.
    """
    files = _list_deleted(image)
    with uses.removing(
        *files,
        by_name=shares_file(image),
        find_more=lambda: find_users(image, working_dir),
    ):
        yield


def check_unused(image: Path, working_dir: Path) -> None:
    """Make sure that no instance or snapshot is built on an image.

    Args:
        image: The image.
        working_dir: Where the directories of clouds are, this one's and others'.

    Raises:
        ImageInUseError: Some are; names them.
    """
    with deleting(image, working_dir):
        pass


def find_users(image: Path, working_dir: Path) -> list[str]:
    """Name the instances and snapshots of a directory that are built on an image.

    Those that use its kernel are among them.
    """
    identify = _find_name if shares_file(image) else _find_file
    own = _find_name(image)
    wanted = {identify(file) for file in _list_deleted(image)} - {None}
    return sorted(
        tip.stem
        for tip in _tips(working_dir)
        if _find_name(tip) != own
        and not wanted.isdisjoint(identify(file) for file in _list_needed(tip))
    )


def is_built_on(tip: Path, image: Path) -> bool:
    """Whether a disk is built on an image, by whichever path to it."""
    name = _find_name(image)
    return name in {_find_name(file) for file in chain(tip)[1:]}


def shares_file(image: Path) -> bool:
    """Whether an image is one of several names of a file, each of which can be deleted by itself.

    Snapshots are, and machines that are kept ready.
    """
    return is_snapshot(image) or image.parent.parent.name == "warm"


def _list_deleted(image: Path) -> list[Path]:
    """List an image and what is deleted with it and may be used without it."""
    beside = (store.kernel_path(image), store.initrd_path(image))
    # A snapshot has links to those of its base.
    return [image, *(file for file in beside if is_file(file) and not file.is_symlink())]


def _list_needed(tip: Path) -> Iterable[Path]:
    """List the files that a machine, or a machine from a snapshot, cannot do without."""
    yield from chain(tip)[1:]
    spec = _find_spec(tip)
    if spec is not None:
        yield from (file for part in spec.parts for file in part.needs)


def _find_spec(tip: Path) -> MachineSpec | None:
    if is_snapshot(tip):
        saved = savedmachine.find(tip)
        return None if saved is None else saved.spec
    try:
        return RunDirectory(tip.parent).read_spec()
    except InstanceNotFoundError:
        return None


def _find_name(file: Path) -> tuple[int, int, str]:
    """Identify a name of a file, by whichever path it is given."""
    place = Path(os.path.realpath(file))
    try:
        facts = place.parent.stat()
    except OSError:  # its directory is gone
        return 0, 0, str(place)
    return facts.st_dev, facts.st_ino, place.name


def _find_file(file: Path) -> tuple[int, int] | None:
    """Identify a file, by whichever of its names it is given; None when it is not there."""
    try:
        facts = file.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def is_snapshot(image: Path) -> bool:
    """Say whether an image has its place among the snapshots of a cloud."""
    return image.parent.name == SNAPSHOTS and image.parent.parent.match(f"{_CLOUD_PREFIX}*")


def chain(tip: Path) -> list[Path]:
    """List the files that a disk consists of: itself, then what it is built on, to the bottom.

    A file that is missing is the last one listed: a broken disk somewhere is no reason not to
    clean up elsewhere, and QEMU names what it misses.
    """
    files = [tip]
    # A damaged disk may be built on itself, by any of its names.
    seen = {os.path.realpath(tip)}
    while (below := read_backing_file(files[-1])) is not None:
        place = os.path.realpath(below)
        if place in seen:
            break
        seen.add(place)
        files.append(below)
    return files


def read_backing_file(image: Path) -> Path | None:
    """Read what a qcow2 file is built on; None for any other file, and for what cannot be one.

    The header is read directly (docs/interop/qcow2.txt): a chain has many files, and a qemu-img
    process for each would be felt.
    """
    try:
        with image.open("rb") as file:
            header = file.read(_QCOW2_HEADER.size)
            if len(header) < _QCOW2_HEADER.size or not header.startswith(diskimage.QCOW_MAGIC):
                return None
            _magic, _version, offset, length = _QCOW2_HEADER.unpack(header)
            if offset == 0 or not 0 < length <= diskimage.LONGEST_BACKING_NAME:
                return None
            # Not by seek(): a damaged header's offset may be none that there can be.
            name = os.pread(file.fileno(), length, min(offset, _LAST_OFFSET))
    except IsADirectoryError:
        return None
    except OSError as error:
        if not is_not_found(error):
            raise
        return None
    return image.parent / os.fsdecode(name) if len(name) == length and b"\0" not in name else None


def cloud_directory(working_dir: Path, tag: str) -> Path:
    """Give the directory of everything that clouds of a tag make."""
    return working_dir / f"{_CLOUD_PREFIX}{tag}"


def cloud_tag(directory: Path) -> str:
    """Give the tag of the clouds whose directory this is."""
    return directory.name.removeprefix(_CLOUD_PREFIX)


def cloud_directories(working_dir: Path) -> Iterator[Path]:
    """List the directories of clouds."""
    # Not by glob(), which takes one that cannot be read for one that has nothing in it.
    with contextlib.suppress(FileNotFoundError):
        for path in working_dir.iterdir():
            if path.name.startswith(_CLOUD_PREFIX):
                yield path


def _tips(working_dir: Path, *, fresh: bool = False) -> Iterator[Path]:
    """List the disks of all clouds' instances, and the images of their snapshots.

    Args:
        working_dir: Where directories of clouds are.
        fresh: Whether also the overlays that disks of machines go on in which are being saved.
    """
    for parent_dir in cloud_directories(working_dir):
        yield from parent_dir.glob(f"{SNAPSHOTS}/*.img")
        for rundir in RunDirectory.list_in(parent_dir):
            for disk_file in (rundir.disk, rundir.find_fresh_overlay() if fresh else None):
                if disk_file is not None and disk_file.exists():
                    yield disk_file


def _limit_depth(overlay: Path) -> None:
    """Merge the layers below a disk into it when they have become many."""
    lowest = too_deep(overlay)
    if lowest is not None:
        diskimage.rebase(overlay, lowest)


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except FileNotFoundError:
        return False


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        raise CloudError(
            f"Cannot make the hard link {target}, which snapshots need: {error}. working_dir must "
            "be on a file system that has hard links"
        ) from error
