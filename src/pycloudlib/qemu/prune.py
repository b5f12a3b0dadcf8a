"""Removing what programs that died have left behind; what is alive, or somebody else's, stays."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pycloudlib.errors import CloudError, InstanceNotFoundError
from pycloudlib.images import store, uses
from pycloudlib.qemu import layers, savedmachine
from pycloudlib.qemu.identity import ProcessIdentity
from pycloudlib.qemu.ownership import OWNER_SUFFIX, Ownership, is_cut_off, owner_file
from pycloudlib.qemu.ports import PortRegistry
from pycloudlib.qemu.process import QemuProcess, is_open_elsewhere
from pycloudlib.qemu.rundir import RunDirectory
from pycloudlib.qemu.running import MachineElsewhereError

_log = logging.getLogger(__name__)

_KILL_LIMIT = 10.0


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
        """Remove what nobody is to have any more; give the paths of what was removed.

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
        for directory in sorted(parent_dir.iterdir()):
            if not directory.is_dir() or directory.is_symlink() or not self._is_over(directory):
                continue
            with _reporting(directory):
                rundir = RunDirectory(directory)
                with rundir.lock():
                    # Another program may have taken it over before the lock was ours.
                    if not self._is_over(directory):
                        continue
                    end_machine(rundir)
                    rundir.remove()
                yield directory

    def _prune_snapshots(self, parent_dir: Path) -> Iterator[Path]:
        marks = layers.LayerStore(parent_dir).snapshots.glob(f"*{OWNER_SUFFIX}")
        # Some may not be there yet, or no more.
        images = {mark.with_name(mark.name.removesuffix(OWNER_SUFFIX)) for mark in marks}
        over = {image for image in images if _is_over(image)}
        # One that another is built on goes after that.
        while free := {image for image in over if not self._find_users(image)}:
            over -= free
            for image in sorted(free):
                with _reporting(image):
                    with layers.deleting(image, self.working_dir):
                        store.delete(image, self.image_dir)
                    savedmachine.delete(image)
                    uses.forget(image)
                    owner_file(image).unlink(missing_ok=True)
                    yield image

    def _find_users(self, image: Path) -> list[str]:
        return layers.find_users(image, self.working_dir)

    def _is_over(self, directory: Path) -> bool:
        if is_cut_off(directory):
            return True
        rundir = RunDirectory(directory)
        owner = Ownership.find(directory)
        if owner is None or find_elsewhere(rundir) is not None:
            return False
        return owner.is_over or (self.stopped and not owner.process.alive and not _runs(rundir))


def _is_over(owned: Path) -> bool:
    owner = Ownership.find(owned)
    return owner is not None and owner.is_over


def _runs(rundir: RunDirectory) -> bool:
    return any(True for _ in find_processes(rundir))


def end_machine(rundir: RunDirectory) -> None:
    """End whatever runs the machine of a directory, and wait until it is gone.

    The caller has the machine's lock.

    Raises:
        CloudError: It did not end.
        MachineElsewhereError: It runs where it cannot be ended from here.
    """
    elsewhere = find_elsewhere(rundir)
    if elsewhere is not None:
        raise MachineElsewhereError(rundir.path.name, elsewhere)
    for process in find_processes(rundir):
        process.kill()
        if not process.wait(_KILL_LIMIT):
            raise CloudError(f"QEMU, pid {process.pid}, did not end")


def find_processes(rundir: RunDirectory) -> Iterator[QemuProcess]:
    """Find the QEMUs that run the machine of a directory, by what is written there alone."""
    for identity in _read_identities(rundir):
        process = QemuProcess.attach(identity, rundir.disk, rundir.qemu_log)
        if process is not None:
            yield process


def find_elsewhere(rundir: RunDirectory) -> ProcessIdentity | None:
    """Find a QEMU that runs the machine of a directory, or may, where it cannot be seen."""
    for identity in _read_identities(rundir):
        if is_open_elsewhere(identity, rundir.disk):
            return identity
    return None


def _read_identities(rundir: RunDirectory) -> list[ProcessIdentity]:
    found = (rundir.find_process(), rundir.find_successor())
    return [identity for identity in found if identity is not None]


@contextlib.contextmanager
def _reporting(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, InstanceNotFoundError):
        _log.debug("%s was removed by another process", path)
    except (OSError, CloudError) as error:
        _log.warning("%s stays: %s", path, error)
