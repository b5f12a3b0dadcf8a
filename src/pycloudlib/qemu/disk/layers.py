"""Disk snapshots in constant time: a machine's overlay becomes a layer, and the layer an image.

Nothing is copied. The overlay gets two more names (hard links): one as a layer of the cloud, on
which the machine gets a new overlay, and one as the image. So the image can be deleted while its
source machine uses the layer, and the machine while the image exists; the layer itself is deleted
when nothing is built on it any more.

    instance/disk.qcow2 ──▶ layers/1f3a.qcow2 ──▶ bookworm-….img
                            snapshots/NAME.img (the same file as layers/1f3a.qcow2)
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pycloudlib._base.files import create_private_directory, is_file
from pycloudlib._base.locks import directory_lock
from pycloudlib.errors import CloudError, InstanceNotFoundError
from pycloudlib.images import store, uses
from pycloudlib.qemu.disk import diskimage
from pycloudlib.qemu.host.ownership import Orphans, Ownership, claim, disown
from pycloudlib.qemu.parts.part import SUFFIX
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.state.settings import CLOUD_PREFIX
from pycloudlib.qemu.state.spec import LAYERS, SNAPSHOTS, MachineSpec

_log = logging.getLogger(__name__)

MAXIMUM_DEPTH = 16
"""The number of layers from which on they are merged into the disk; see `performance.md`."""

# The lock file of earlier versions.
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
        """The directory of the images made by snapshots."""
        return self.parent_dir / SNAPSHOTS

    @property
    def layers(self) -> Path:
        """The directory of the layers."""
        return self.parent_dir / LAYERS

    def reserve(self, image_name: str, undo: contextlib.ExitStack) -> Path:
        """Reserve the path of a new image, which is deleted with this program until `complete`.

        Args:
            image_name: The name of its file, without its directory.
            undo: Gets what undoes the reservation.
        """
        image = self.snapshots / image_name
        with self.keeping_all():
            create_private_directory(self.snapshots, parents=False)
            undo.callback(disown, image)
            # Until it is complete, it is of no use to others.
            claim(image, Orphans.REAP)
        return image

    @contextlib.contextmanager
    def freezing(
        self, disks: Mapping[Path, Path], *, in_use: bool = False
    ) -> Iterator[list[FrozenDisk]]:
        """Make images of a machine's overlays; the machine continues in new ones.

        It does so from `FrozenDisk.exchange` on; an error before that changes nothing. The caller
        keeps others from changing the machine.

        Args:
            disks: The machine's disks, each with the image that is made of it; first the root disk,
                whose image is reserved.
            in_use: Whether a QEMU writes to the disks: it has to switch to the new overlays before
                they are exchanged, and then the machine stays on them even after an error.

        Yields:
            The disks, in the same order. The images are complete at the end of the block.

        Raises:
            CloudError: The file system has no hard links.
        """
        root, image = next(iter(disks.items()))
        with self.keeping_all(), contextlib.ExitStack() as undo:
            # After the image is removed: another program may record it as long as it exists.
            undo.callback(uses.forget, image)
            yield [self._freeze(*disk, undo, in_use=in_use) for disk in disks.items()]
            record_uses(image)
            undo.pop_all()
            # A disk does not use layers any more that were merged into it.
            record_uses(root)

    def _freeze(
        self, overlay: Path, image: Path, undo: contextlib.ExitStack, *, in_use: bool
    ) -> FrozenDisk:
        layer = self.layers / f"{secrets.token_hex(8)}.qcow2"
        frozen = FrozenDisk(overlay, layer, image, overlay.with_name(f".{layer.name}"))
        lowest = None if in_use else too_deep(overlay)
        if lowest is not None:
            diskimage.rebase(overlay, lowest)
        link_file(overlay, layer)
        undo.callback(frozen.undo, in_use=in_use)
        link_file(overlay, image)
        undo.callback(image.unlink, missing_ok=True)
        undo.callback(frozen.discard_fresh)
        diskimage.create_on_layer(layer, frozen.fresh)
        return frozen

    def freeze(self, overlay: Path, image_name: str) -> Path:
        """Make an image of a powered-off machine's overlay; see `freezing`."""
        with contextlib.ExitStack() as undo:
            image = self.reserve(image_name, undo)
            with self.freezing({overlay: image}) as (frozen,):
                frozen.exchange()
            undo.pop_all()
        self.complete(image, overlay.parent)
        return image

    def complete(self, image: Path, machine: Path) -> None:
        """Record that an image is complete; it gets the policy for orphans of its machine."""
        found = Ownership.find(machine)
        claim(image, Orphans.REAP_AFTER_CRASH if found is None else found.orphans)

    def collect(self) -> None:
        """Remove the layers on which nothing is built any more; create no directory."""
        with contextlib.suppress(FileNotFoundError), self._lock():
            # By identity: a disk may refer to its layers by another path to the same directory.
            needed = {
                _find_name(file)
                for tip in _tips(self.parent_dir.parent, fresh=True)
                for file in _list_built_on(tip)
            }
            for layer in self.layers.glob("*.qcow2"):
                if _find_name(layer) not in needed:
                    layer.unlink()
            uses.forget_gone(self.snapshots)

    def remove_if_empty(self) -> None:
        """Remove the directories of layers and snapshots if they are empty."""
        with contextlib.suppress(FileNotFoundError), self._lock():
            (self.layers / _OLD_LOCK).unlink(missing_ok=True)
            for directory in (self.snapshots, self.layers):
                with contextlib.suppress(OSError):  # not empty, or removed already
                    directory.rmdir()

    def remove_cloud_directory(self) -> None:
        """Remove the cloud's directory, unless other programs have files in it."""
        self.remove_if_empty()
        try:
            self.parent_dir.rmdir()
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            # Another cloud of the same tag uses it, too.
            with contextlib.suppress(FileNotFoundError):  # another program has removed it
                others = ", ".join(sorted(file.name for file in self.parent_dir.iterdir()))
                _log.info("%s is kept: others have %s in it", self.parent_dir, others)

    @contextlib.contextmanager
    def keeping_all(self) -> Iterator[None]:
        """Keep others from collecting layers and from removing the directories inside the block.

        Raises:
            FileNotFoundError: The cloud has no directory, and so no machine.
        """
        with self._lock():
            create_private_directory(self.layers, parents=False)
            yield

    def _lock(self) -> contextlib.AbstractContextManager[int]:
        """Keep others from collecting a layer before the machine is built on it.

        The directory itself is locked: one program would create a lock file in it again while
        another, which has removed everything in it, is about to remove the directory.
        """
        return directory_lock(self.parent_dir)


@dataclass(frozen=True, slots=True)
class FrozenDisk:
    """A disk that becomes a layer, and the overlay that replaces it.

    Attributes:
        overlay: The path of the machine's disk.
        layer: Its path as a layer.
        image: Its path as an image.
        fresh: The path of the new overlay until it is exchanged.
    """

    overlay: Path
    layer: Path
    image: Path
    fresh: Path

    def exchange(self) -> None:
        """Rename the new overlay to the machine's disk."""
        # One rename: at any moment the machine has a complete disk at the same path.
        self.fresh.replace(self.overlay)

    def discard_fresh(self) -> None:
        """Remove the new overlay, unless the machine may use it, which recovery decides."""
        if not RunDirectory(self.overlay.parent).is_being_saved:
            self.fresh.unlink(missing_ok=True)

    def undo(self, *, in_use: bool) -> None:
        """Remove the layer, unless a running machine is built on it by now, or may be."""
        if in_use and (self.fresh.exists() or not _is_same(self.layer, self.overlay)):
            return
        # rename(2) does nothing if both are names of one file.
        if _is_same(self.layer, self.overlay):
            self.layer.unlink()
        else:
            self.layer.replace(self.overlay)


def too_deep(overlay: Path) -> Path | None:
    """Return the lowest file of a disk that has too many layers; None for any other."""
    files = chain(overlay)
    return files[-1] if len(files) - 1 > MAXIMUM_DEPTH else None


def record_uses(tip: Path) -> None:
    """Record a machine's or snapshot's disk as a user, beside each image on which it is built.

    Layers are left out: only `LayerStore.collect` deletes them.
    """
    uses.record(tip, (file for file in _list_needed(tip) if file.parent.name != LAYERS))


def record_missing_uses(working_dir: Path) -> None:
    """Record the uses of machines and snapshots that an older version made, without records."""
    # The directory may not be readable, and a machine may be deleted meanwhile.
    with contextlib.suppress(OSError):
        for tip in _tips(working_dir):
            if not uses.is_recorded(tip):
                record_uses(tip)


@contextlib.contextmanager
def deleting(image: Path, working_dir: Path) -> Iterator[None]:
    """Keep an image unused inside the block, which deletes it.

    Args:
        image: The image.
        working_dir: The directory of clouds; users elsewhere are known only by their records.

    Raises:
        ImageInUseError: Machines or snapshots use it; names them.
    """
    files, by_name = _list_deleted(image), shares_file(image)
    with uses.removing(*files, by_name=by_name, find_more=lambda: find_users(image, working_dir)):
        yield


def find_users(image: Path, working_dir: Path) -> list[str]:
    """Return the names of the instances and snapshots that are built on an image.

    Those that use its kernel are included.
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
    """Whether a disk is built on an image, by any path to it."""
    name = _find_name(image)
    return name in {_find_name(file) for file in chain(tip)[1:]}


def shares_file(image: Path) -> bool:
    """Whether an image is one of several hard links, each of which can be deleted by itself.

    Snapshots and warm machines are.
    """
    return is_snapshot(image) or image.parent.parent.name == "warm"


def _list_deleted(image: Path) -> list[Path]:
    """List an image, and the files deleted with it that may be used without it."""
    beside = (store.kernel_path(image), store.initrd_path(image), *list_kept_disks(image))
    # Those of a snapshot are links to its base's.
    return [image, *(file for file in beside if is_file(file) and not file.is_symlink())]


def _list_needed(tip: Path) -> Iterable[Path]:
    """List the files that a machine, or a machine launched from a snapshot, needs."""
    yield from _list_built_on(tip)
    spec = _find_spec(tip)
    if spec is not None:
        yield from (file for part in spec.parts for file in part.needs)


def _list_built_on(tip: Path) -> Iterable[Path]:
    """List the files that the disks of a machine, or of a saved one, are built on."""
    for disk_file in list_disks(tip):
        yield from chain(disk_file)[1:]


def list_disks(tip: Path) -> list[Path]:
    """List the disks of a machine, or of a saved one, by their names alone.

    What machine it is may be damaged, and its disks are still not to be lost.

    Args:
        tip: The machine's root disk, or its image.
    """
    names = re.compile(f"{re.escape(tip.stem)}{SUFFIX}{re.escape(tip.suffix)}")
    try:
        beside = [file for file in tip.parent.iterdir() if names.fullmatch(file.name)]
    except OSError:
        beside = []
    return [tip, *sorted(beside), *list_kept_disks(tip)]


def list_kept_disks(image: Path) -> list[Path]:
    """List the disks that a saved machine has beside the image of its root disk."""
    names = re.compile(f"{re.escape(image.name)}{SUFFIX}")
    try:
        return sorted(file for file in image.parent.iterdir() if names.fullmatch(file.name))
    except OSError:
        return []


def delete(image: Path, image_dir: Path) -> None:
    """Remove an image, what stands beside it, and the other disks of a saved machine.

    Arguments are those of `images.store.delete`.
    """
    for disk_file in list_kept_disks(image):
        disk_file.unlink(missing_ok=True)
    store.delete(image, image_dir)


def _find_spec(tip: Path) -> MachineSpec | None:
    if is_snapshot(tip):
        saved = savedmachine.find(tip)
        return None if saved is None else saved.spec
    try:
        return RunDirectory(tip.parent).read_spec()
    except InstanceNotFoundError:
        return None


def _find_name(file: Path) -> tuple[int, int, str]:
    """Return the identity of a file's name, the same for any path to it."""
    path = Path(os.path.realpath(file))
    try:
        facts = path.parent.stat()
    except OSError:  # its directory does not exist
        return 0, 0, str(path)
    return facts.st_dev, facts.st_ino, path.name


def _find_file(file: Path) -> tuple[int, int] | None:
    """Return the identity of a file, the same for any of its names; None if it does not exist."""
    try:
        facts = file.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def is_snapshot(image: Path) -> bool:
    """Whether an image is in the directory of a cloud's snapshots."""
    return image.parent.name == SNAPSHOTS and image.parent.parent.match(f"{CLOUD_PREFIX}*")


def chain(tip: Path) -> list[Path]:
    """List a disk and its backing files, down to the lowest.

    A missing file is the last one listed, without an error: a broken disk must not keep others from
    being cleaned up, and QEMU reports what is missing.
    """
    files = [tip]
    # A damaged disk may have itself as its backing file, by any of its names.
    seen = {os.path.realpath(tip)}
    while (below := diskimage.read_backing_file(files[-1])) is not None:
        path = os.path.realpath(below)
        if path in seen:
            break
        seen.add(path)
        files.append(below)
    return files


def cloud_directory(working_dir: Path, tag: str) -> Path:
    """Return the directory of all files of clouds with a tag."""
    return working_dir / f"{CLOUD_PREFIX}{tag}"


def cloud_tag(directory: Path) -> str:
    """Return the tag of the clouds of a directory."""
    return directory.name.removeprefix(CLOUD_PREFIX)


def cloud_directories(working_dir: Path) -> Iterator[Path]:
    """List the directories of clouds."""
    # Not glob(), for which an unreadable directory is an empty one.
    with contextlib.suppress(FileNotFoundError):
        for path in working_dir.iterdir():
            if path.name.startswith(CLOUD_PREFIX):
                yield path


def _tips(working_dir: Path, *, fresh: bool = False) -> Iterator[Path]:
    """List the disks of all clouds' instances, and the images of their snapshots.

    Args:
        working_dir: The directory of clouds.
        fresh: Whether to include the new overlays of machines that are being saved.
    """
    for parent_dir in cloud_directories(working_dir):
        yield from parent_dir.glob(f"{SNAPSHOTS}/*.img")
        for rundir in RunDirectory.list_in(parent_dir):
            overlays = rundir.find_fresh_overlays().values() if fresh else ()
            yield from (file for file in (rundir.disk, *overlays) if file.exists())


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except FileNotFoundError:
        return False


def link_file(source: Path, target: Path) -> None:
    """Add a name to a layer, as a hard link."""
    try:
        os.link(source, target)
    except OSError as error:
        raise CloudError(
            f"Cannot make the hard link {target}, which snapshots need: {error}. working_dir must "
            "be on a file system that has hard links"
        ) from error
