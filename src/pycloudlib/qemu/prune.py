"""Removes what dead programs have left; what is alive, or another user's, stays."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pycloudlib.errors import CloudError, InstanceNotFoundError
from pycloudlib.images import uses
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.host.ownership import OWNER_SUFFIX, Ownership, disown, is_abandoned
from pycloudlib.qemu.host.resources import PortRegistry
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.vm import livedisk

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pruning:
    """What is looked at.

    Attributes:
        working_dir: Where the directories of clouds are.
        image_dir: Where images are.
        ports: The ports that are leased to machines.
        stopped: Whether machines are removed, too, that were left on purpose and do not run.
    """

    working_dir: Path
    image_dir: Path
    ports: PortRegistry
    stopped: bool = False

    def run(self) -> list[str]:
        """Remove what is orphaned; return the paths of what was removed.

        What cannot be removed is logged, and stays.
        """
        removed = []
        for parent_dir in sorted(layers.cloud_directories(self.working_dir)):
            for step in (self._prune_directories, self._prune_snapshots):
                for path in step(parent_dir):
                    _log.info("Removed %s", path)
                    removed.append(str(path))
            layers.LayerStore(parent_dir).collect()
            layers.LayerStore(parent_dir).remove_if_empty()
            with contextlib.suppress(OSError):  # something is in it
                parent_dir.rmdir()
                removed.append(str(parent_dir))
        self.ports.forget_ended()
        return removed

    def _prune_directories(self, parent_dir: Path) -> Iterator[Path]:
        try:
            directories = sorted(parent_dir.iterdir())
        except FileNotFoundError:
            return  # another process has removed it
        for directory in directories:
            if not directory.is_dir() or directory.is_symlink():
                continue
            rundir = RunDirectory(directory)
            with _reporting(directory):
                livedisk.recover_abandoned(rundir)
                if not self._is_over(directory):
                    continue
                with rundir.lock():
                    # Another program may have taken it over before the lock was ours.
                    if not self._is_over(directory):
                        continue
                    livedisk.end_process(rundir)
                    rundir.remove()
                yield directory

    def _prune_snapshots(self, parent_dir: Path) -> Iterator[Path]:
        marks = layers.LayerStore(parent_dir).snapshots.glob(f"*{OWNER_SUFFIX}")
        # Some may not be there yet, or be gone.
        images = {mark.with_name(mark.name.removesuffix(OWNER_SUFFIX)) for mark in marks}
        over = {image for image in images if _is_over(image)}
        # One that another is built on goes after that.
        while free := {image for image in over if not self._find_users(image)}:
            over -= free
            for image in sorted(free):
                with _reporting(image):
                    with layers.deleting(image, self.working_dir):
                        layers.delete(image, self.image_dir)
                    savedmachine.delete(image)
                    uses.forget(image)
                    disown(image)
                    yield image

    def _find_users(self, image: Path) -> list[str]:
        return layers.find_users(image, self.working_dir)

    def _is_over(self, directory: Path) -> bool:
        if is_abandoned(directory):
            return True
        rundir = RunDirectory(directory)
        owner = Ownership.find(directory)
        if owner is None or livedisk.find_elsewhere(rundir) is not None:
            return False
        return owner.is_orphaned or (
            self.stopped and not owner.process.alive and livedisk.find_process(rundir) is None
        )


def _is_over(owned: Path) -> bool:
    owner = Ownership.find(owned)
    return owner is not None and owner.is_orphaned


@contextlib.contextmanager
def _reporting(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, InstanceNotFoundError):
        _log.debug("%s was removed by another process", path)
    except (OSError, CloudError) as error:
        _log.warning("%s stays: %s", path, error)
