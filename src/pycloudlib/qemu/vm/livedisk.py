"""The disk of a running machine, and recovery from a save of it that was cut off."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.files import opened
from pycloudlib.errors import CloudError, InstanceNotFoundError
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.host.processes import ProcessIdentity
from pycloudlib.qemu.parts.part import OwnDisk
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.state.spec import LAYERS
from pycloudlib.qemu.vm.process import QemuProcess, is_open_elsewhere
from pycloudlib.qemu.vm.programs import end_recorded
from pycloudlib.qemu.vm.qmp import QmpError, QmpSession
from pycloudlib.qemu.vm.running import MachineElsewhereError, MachineEndedError, RunningQemu, State

_NODE = "overlay-"
_OVERLAY = re.compile(rf"{_NODE}[0-9a-f]+")
_FDSET = re.compile(r"/dev/fdset/([0-9]+)")
_MERGE_LIMIT = 600.0


_log = logging.getLogger(__name__)


@contextlib.contextmanager
def switching(session: QmpSession, fresh: Mapping[str, Path]) -> Iterator[Callable[[], None]]:
    """Have QEMU open overlays; yield the function that switches the disks to them.

    It switches all of them at one moment, or none. Call `finish_switch` after an error.

    Args:
        session: A session with the QEMU.
        fresh: The overlays, by QEMU's names of the disks that they are on.

    Raises:
        QmpError: QEMU refused.
    """
    # Asked now: while the guest is paused, each answer prolongs that.
    switches = [
        {"node": find_active(session, device), "overlay": name_node(file)}
        for device, file in fresh.items()
    ]

    def switch() -> None:
        if len(switches) == 1:
            session.execute("blockdev-snapshot", switches[0])
        else:
            actions = [{"type": "blockdev-snapshot", "data": each} for each in switches]
            session.execute("transaction", {"actions": actions})

    with contextlib.ExitStack() as stack:
        for file in fresh.values():
            stack.enter_context(opened_node(session, file, {"backing": None}))
        yield switch


@contextlib.contextmanager
def opened_node(
    session: QmpSession,
    file: Path,
    how: Mapping[str, Any],
    *,
    node: str = "",
    flushed: bool = False,
) -> Iterator[str]:
    """Let QEMU open a disk's file by descriptors; that to write by is taken back after the block.

    By descriptors, since QEMU opens the file again, for reading only, when the next overlay comes;
    by then it has another name. And QMP takes no path that is not text.

    Args:
        session: A session with the QEMU.
        file: The file.
        how: Options of the node that are others than those of an overlay.
        node: Its name; by default by that of the file, which is that of a fresh overlay.
        flushed: Whether what the guest flushes outlives a crash of the host.

    Yields:
        QEMU's name of the node, which stays when the block ends.
    """
    node = node or name_node(file)
    # Of several descriptors, it takes the one that is open as it wants the file.
    with opened(file, os.O_RDONLY) as reading, opened(file, os.O_RDWR) as writing:
        # By this one it is opened again.
        lent = session.lend(reading, keep=True)
        try:
            to_write = session.lend(writing, lent.fdset)
            common = {"discard": "unmap", "cache": {"no-flush": not flushed}}
            protocol = {"driver": "file", "node-name": f"{node}-file", "filename": lent.path}
            session.execute(
                "blockdev-add",
                {
                    "driver": "qcow2",
                    "node-name": node,
                    "file": {**protocol, **common},
                    **common,
                    **how,
                },
            )
        except BaseException:
            session.take_back(lent)
            raise
        try:
            yield node
        finally:
            # As long as QEMU has it, the file is locked for all others.
            session.take_back(to_write)


def finish_switch(session: QmpSession, device: str, fresh: Path) -> bool:
    """Finish or undo a switch that `switching` began, in this program or another.

    QEMU is asked: an answer may have been lost.

    Args:
        session: A session with the QEMU.
        device: Its name of the disk.
        fresh: The overlay.

    Returns:
        Whether the machine writes to the fresh overlay. Else QEMU closes that.

    Raises:
        QmpError: It could not be asked.
    """
    node = name_node(fresh)
    if find_active(session, device) == node:
        return True
    if node in list_nodes(session):
        _close_node(session, node)
    return False


def merge_layers(qemu: RunningQemu, device: str, disk: Path) -> None:
    """Merge the layers below a disk of a running machine into it when they have become many.

    Args:
        qemu: The machine's QEMU.
        device: Its name of the disk.
        disk: The disk.

    Raises:
        MachineEndedError: It ended meanwhile.
        CloudError: It did not work.
    """
    lowest = layers.too_deep(disk)
    if lowest is None:
        return
    deadline = Deadline.after(_MERGE_LIMIT)
    job = f"merge-{time.monotonic_ns()}"
    with qemu.session() as session:
        session.execute(
            "block-stream",
            {
                "job-id": job,
                "device": find_active(session, device),
                **_choose_base(session, device, lowest),
            },
        )
        event = qemu.wait_for_event(
            lambda event: event.name == "BLOCK_JOB_COMPLETED" and event.data["device"] == job,
            deadline,
        )
        if "error" in event.data:
            raise CloudError(f"{qemu.name}: merging its layers failed: {event.data['error']}")
        close_unused(session)


def _choose_base(session: QmpSession, device: str, lowest: Path) -> dict[str, str]:
    """Choose what a disk whose layers are merged stays on: the lowest file, or nothing at all."""
    base = {"base-node": _find_lowest(session, device)}
    if lowest.parent.name != LAYERS:
        return base
    # It began as the machine's own disk, and QEMU knows it by the name that it had then: by that
    # name it would write the disk to be built on itself.
    try:
        str(lowest).encode()
    except UnicodeEncodeError:  # a path that QMP has no words for
        return {}
    return {**base, "backing-file": str(lowest)}


def close_unused(session: QmpSession) -> None:
    """Have QEMU close the overlays that no disk is built on any more."""
    names = [name for name in list_nodes(session) if _OVERLAY.fullmatch(name)]
    while True:
        kept = [name for name in names if not _try_close(session, name)]
        # One that was closed may have been what another was in use by.
        if kept in ([], names):
            return
        names = kept


def _try_close(session: QmpSession, name: str) -> bool:
    try:
        _close_node(session, name)
    except QmpError:  # a disk, or an overlay, is in use of it
        return False
    return True


def name_node(fresh: Path) -> str:
    """Choose QEMU's name of an overlay: it has at most 31 characters."""
    return f"{_NODE}{fresh.name.split('.')[1]}"


def _close_node(session: QmpSession, name: str) -> None:
    """Have QEMU close an overlay, and the descriptors that it was lent for that."""
    opened = list_nodes(session)[f"{name}-file"]["file"]
    session.execute("blockdev-del", {"node-name": name})
    lent = _FDSET.fullmatch(opened)
    if lent is not None:
        with contextlib.suppress(QmpError):  # all of them are taken back already
            session.execute("remove-fd", {"fdset-id": int(lent[1])})


def find_active(session: QmpSession, device: str) -> str:
    """Find QEMU's name of the overlay that the machine writes to."""
    return str(_find_inserted(session, device)["node-name"])


def _find_lowest(session: QmpSession, device: str) -> str:
    """Find QEMU's name of the lowest file of a machine's disk.

    Not the file's own: that is a path, which need not be text, and QMP takes nothing else.
    """
    image = _find_inserted(session, device)["image"]
    while "backing-image" in image:
        image = image["backing-image"]
    # QEMU writes the path alike in both answers.
    return next(
        name
        for name, node in list_nodes(session).items()
        if node["file"] == image["filename"] and node["drv"] != "file"
    )


def _find_inserted(session: QmpSession, device: str) -> dict[str, Any]:
    """Find what a disk is, by the name of its drive or, without one, by that of its device."""
    for block in session.execute("query-block"):
        if device in (block["device"], block.get("qdev")):
            inserted: dict[str, Any] = block["inserted"]
            return inserted
    raise QmpError(f"QEMU has no disk {device}")


def list_nodes(session: QmpSession) -> dict[str, dict[str, Any]]:
    """List the block nodes of a QEMU, by their names."""
    nodes = session.execute("query-named-block-nodes", {"flat": True})
    return {node["node-name"]: node for node in nodes}


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
    end_recorded(rundir)


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
        taken = finish_switch(session, disk.device, fresh)
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
