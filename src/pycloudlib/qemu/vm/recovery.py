"""The QEMU that a run directory records: any program can find, end and recover it.

A program may end in the middle of saving a machine (`checkpoint.py`), while the guest is paused.
The next program then resumes it, with the disk that its QEMU writes to.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

from pycloudlib.errors import CloudError, InstanceNotFoundError
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.host.processes import ProcessIdentity
from pycloudlib.qemu.parts.part import OwnDisk
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.vm import livedisk
from pycloudlib.qemu.vm.process import QemuProcess, is_open_elsewhere
from pycloudlib.qemu.vm.qmp import QmpSession
from pycloudlib.qemu.vm.running import MachineElsewhereError, MachineEndedError, RunningQemu, State

_log = logging.getLogger(__name__)


def find_process(rundir: RunDirectory) -> QemuProcess | None:
    """Find the QEMU that runs the machine of a directory, by the record there alone."""
    identity = rundir.find_process()
    if identity is None:
        return None
    return QemuProcess.attach(identity, rundir.disk, rundir.qemu_log)


def find_elsewhere(rundir: RunDirectory) -> ProcessIdentity | None:
    """Find a QEMU that runs the machine of a directory, or may, where it is invisible."""
    identity = rundir.find_process()
    if identity is not None and is_open_elsewhere(identity, rundir.disk):
        return identity
    return None


def end_process(rundir: RunDirectory) -> None:
    """End the QEMU that runs the machine of a directory; the caller has the machine's lock.

    Raises:
        CloudError: It did not end.
        MachineElsewhereError: It runs where it cannot be ended from here.
    """
    elsewhere = find_elsewhere(rundir)
    if elsewhere is not None:
        raise MachineElsewhereError(rundir.path.name, elsewhere)
    process = find_process(rundir)
    if process is not None:
        process.kill()


def recover_abandoned(rundir: RunDirectory) -> None:
    """Resume a machine whose save was cut off; leave a save alone that is under way."""
    if not rundir.is_being_saved:
        return
    # A program that saves it has the lock until that is done.
    with contextlib.suppress(InstanceNotFoundError), rundir.try_lock() as ours:
        if ours:
            recover(rundir)


def recover(rundir: RunDirectory, session: QmpSession | None = None) -> None:
    """Resume a machine whose save was cut off, if one was; the caller has the lock.

    Errors are logged, and the next program tries again.

    Args:
        rundir: The machine's directory.
        session: A session with its QEMU; by default, one is opened.

    Raises:
        InstanceNotFoundError: There is no machine in this directory.
    """
    if not rundir.is_being_saved or find_elsewhere(rundir) is not None:
        return
    spec = rundir.read_spec()
    name = spec.name
    fresh = rundir.find_fresh_overlays()
    disks = [(disk, fresh[disk.suffix]) for disk in spec.own_disks if disk.suffix in fresh]
    process = find_process(rundir)
    try:
        if process is None:
            for disk, file in disks:
                _take_unless_lost(file, disk.beside(rundir.disk))
        elif session is not None:
            _recover_running(rundir, disks, session)
        else:
            with RunningQemu(name, rundir, process, State.RUNNING).session() as opened:
                _recover_running(rundir, disks, opened)
            _log.warning("Resumed %s, whose save was cut off", name)
    except (OSError, CloudError, MachineEndedError) as error:
        _log.error("%s cannot be resumed after a save that was cut off: %s", name, error)
    else:
        rundir.forget_saving()


def _recover_running(
    rundir: RunDirectory, disks: Sequence[tuple[OwnDisk, Path]], session: QmpSession
) -> None:
    """End the save of a machine whose QEMU runs.

    Args:
        rundir: The machine's directory.
        disks: Its disks that were to be frozen, each with the overlay that takes its place.
        session: A session with its QEMU.
    """
    for disk, fresh in disks:
        taken = livedisk.finish_switch(session, disk.device, fresh)
        if fresh.exists():
            if taken:
                fresh.replace(disk.beside(rundir.disk))
            else:
                fresh.unlink()
    session.execute("cont")
    session.take_back_all()


def _take_unless_lost(fresh: Path, disk: Path) -> None:
    """Make the fresh overlay the disk of a machine that is off, had its QEMU switched to it or not.

    If it had not, the overlay is empty, and built on that same disk.
    """
    if not fresh.exists():
        return
    if any(file.exists() and file.samefile(disk) for file in layers.chain(fresh)[1:2]):
        fresh.replace(disk)
    else:
        fresh.unlink()
