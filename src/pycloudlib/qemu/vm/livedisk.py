"""The disk of a machine that runs: it is switched to a new overlay, and layers are merged."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.files import opened
from pycloudlib.errors import CloudError
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.state.spec import LAYERS
from pycloudlib.qemu.vm.qmp import QmpError, QmpSession
from pycloudlib.qemu.vm.running import RunningQemu

_NODE = "overlay-"
_OVERLAY = re.compile(rf"{_NODE}[0-9a-f]+")
_FDSET = re.compile(r"/dev/fdset/([0-9]+)")
_MERGE_LIMIT = 600.0


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
