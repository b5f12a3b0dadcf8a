"""The QEMUs that a machine's notes name: found and ended by any program, and set right.

A program may end in the middle of handing a machine over from one QEMU to another (`handover.py`).
Whoever comes next then finishes that, if the new QEMU was the machine's already, or undoes it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from pycloudlib.deadline import Deadline
from pycloudlib.errors import CloudError, InstanceNotFoundError
from pycloudlib.qemu import layers
from pycloudlib.qemu.command import ssh_rule
from pycloudlib.qemu.identity import ProcessIdentity, find_proc_directory
from pycloudlib.qemu.process import QemuProcess, is_open_elsewhere
from pycloudlib.qemu.qmp import QmpError, QmpSession
from pycloudlib.qemu.rundir import RunDirectory
from pycloudlib.qemu.running import MachineElsewhereError, MachineEndedError, RunningQemu, State
from pycloudlib.qemu.spec import MachineSpec

_log = logging.getLogger(__name__)

_KILL_LIMIT = 10.0
# After the state, QEMU waits for nothing any more.
_RESUME_LIMIT = 30.0
_LOOK = 0.01
_SETTLED = (None, "none", "cancelled", "failed", "completed")


def find_processes(rundir: RunDirectory) -> Iterator[QemuProcess]:
    """Find the QEMUs that run the machine of a directory, by what is written there alone."""
    for identity in rundir.list_processes():
        process = _attach(rundir, identity)
        if process is not None:
            yield process


def find_elsewhere(rundir: RunDirectory) -> ProcessIdentity | None:
    """Find a QEMU that runs the machine of a directory, or may, where it cannot be seen."""
    for identity in rundir.list_processes():
        if is_open_elsewhere(identity, rundir.disk):
            return identity
    return None


def end_processes(rundir: RunDirectory) -> None:
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


def settle_abandoned(rundir: RunDirectory) -> None:
    """Finish or undo a hand-over whose program has ended; one that is under way goes on."""
    if not rundir.in_handover:
        return
    # Whoever hands over has the lock until it is done.
    with contextlib.suppress(InstanceNotFoundError), rundir.trying_lock() as ours:
        if ours:
            settle(rundir)


def settle(rundir: RunDirectory) -> None:
    """Finish or undo a hand-over that was cut off, if there is one; the caller has the lock.

    The machine goes on in one of its two QEMUs, and the other one is ended. What goes wrong is
    logged.

    Raises:
        InstanceNotFoundError: There is no machine in this directory.
    """
    if not rundir.in_handover or find_elsewhere(rundir) is not None:
        return
    spec = rundir.read_spec()
    successor = rundir.find_successor()
    try:
        if successor is not None and successor == rundir.find_process():
            _finish(rundir, spec, successor)
        else:
            _undo(rundir, spec, successor)
    except (CloudError, MachineEndedError) as error:
        _log.error("%s cannot go on after a hand-over that was cut off: %s", spec.name, error)
    rundir.forget_handover()


def _finish(rundir: RunDirectory, spec: MachineSpec, successor: ProcessIdentity) -> None:
    """Let the new QEMU be the machine, as it is to all others by now."""
    rundir.publish_sockets()
    _end(rundir, rundir.find_predecessor())
    process = _attach(rundir, successor)
    if process is None:
        return
    qemu = RunningQemu(spec.name, rundir, process, State.RUNNING)
    qemu.execute("cont")
    forward_ssh(spec, qemu)
    _log.warning("Finished a hand-over of %s that was cut off", spec.name)


def _undo(rundir: RunDirectory, spec: MachineSpec, successor: ProcessIdentity | None) -> None:
    """Let the old QEMU go on with the machine: the new one has never run it."""
    _end(rundir, successor)
    rundir.discard_sockets()
    predecessor = rundir.find_process()
    process = None if predecessor is None else _attach(rundir, predecessor)
    if process is None:
        return
    _put_disk_back(rundir, process.pid)
    qemu = RunningQemu(spec.name, rundir, process, State.RUNNING)
    with qemu.session() as session:
        go_on(session)
    _log.warning("Undid a hand-over of %s that was cut off", spec.name)


def _attach(rundir: RunDirectory, identity: ProcessIdentity) -> QemuProcess | None:
    return QemuProcess.attach(identity, rundir.disk, rundir.qemu_log)


def _end(rundir: RunDirectory, identity: ProcessIdentity | None) -> None:
    process = None if identity is None else _attach(rundir, identity)
    if process is not None:
        process.kill()
        process.wait(_KILL_LIMIT)


def _put_disk_back(rundir: RunDirectory, pid: int) -> None:
    """Give a QEMU the name of its disk back, if it writes to what was to be a layer of an image."""
    layer = layers.read_backing_file(rundir.disk)
    if layer is None or not layer.exists():
        return
    store = layers.LayerStore(rundir.path.parent)
    if layer.parent == store.layers and not _has_open(pid, rundir.disk) and _has_open(pid, layer):
        with store.keeping_all():
            layer.replace(rundir.disk)


def _has_open(pid: int, file: Path) -> bool:
    wanted = file.stat()
    for link in (find_proc_directory(pid) / "fd").iterdir():
        with contextlib.suppress(OSError):
            if os.path.samestat(link.stat(), wanted):
                return True
    return False


def go_on(session: QmpSession, *, ran: bool = True) -> None:
    """Let a QEMU that was to hand its machine over go on with it, whether it has stopped or not.

    Raises:
        QmpError: It did not.
    """
    deadline = Deadline.after(_RESUME_LIMIT)
    with contextlib.suppress(QmpError):
        session.execute("migrate_cancel")
    while session.execute("query-migrate").get("status") not in _SETTLED:
        if deadline.expired:
            break
        time.sleep(_LOOK)
    # Also when QEMU has let the guest run again by itself: only this gives it its disks back.
    session.execute("cont")
    if not ran:
        session.execute("stop")


def forward_ssh(spec: MachineSpec, qemu: RunningQemu) -> None:
    """Forward the SSH port to a QEMU that has taken over: its predecessor had it until its end."""
    rule = ssh_rule(spec)
    try:
        # It may have it already, if its program ended after that.
        for command in (
            f"hostfwd_remove net0 {rule.partition('-')[0]}",
            f"hostfwd_add net0 {rule}",
        ):
            answer = qemu.execute("human-monitor-command", {"command-line": command})
    except QmpError as error:
        answer = str(error)
    if answer.strip():
        # The machine goes on, and whoever called cannot undo that: so it is no exception.
        _log.error("%s goes on, but has lost its SSH port: %s", spec.name, answer.strip())
