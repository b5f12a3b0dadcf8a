"""The disk of a machine that runs: it is switched to a new overlay, and layers are merged."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.files import opened
from pycloudlib.errors import CloudError
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.vm.qmp import QmpError, QmpSession
from pycloudlib.qemu.vm.running import RunningQemu

_ROOT = "root"
_NODE = "overlay-"
_OVERLAY = re.compile(rf"{_NODE}[0-9a-f]+")
_FDSET = re.compile(r"/dev/fdset/([0-9]+)")
_MERGE_LIMIT = 600.0


@contextlib.contextmanager
def switching(session: QmpSession, fresh: Path) -> Iterator[Callable[[], None]]:
    """Have QEMU open an overlay; yield the function that switches the disk to it.

    QEMU opens it by descriptors, since it opens the file again, for reading only, when the next
    overlay comes; by then it has another name. Call `finish_switch` after an error.

    Args:
        session: A session with the QEMU.
        fresh: The overlay, on the disk that it has.

    Raises:
        QmpError: QEMU refused.
    """
    # Asked now: while the guest is paused, each answer prolongs that.
    node, active = _name_node(fresh), find_active(session)
    # Of several descriptors, it takes the one that is open as it wants the file.
    with opened(fresh, os.O_RDONLY) as reading, opened(fresh, os.O_RDWR) as writing:
        # By this one it is opened again.
        lent = session.lend(reading, keep=True)
        try:
            to_write = session.lend(writing, lent.fdset)
            how = {"discard": "unmap", "cache": {"no-flush": True}}
            file = {"driver": "file", "node-name": f"{node}-file", "filename": lent.path, **how}
            session.execute(
                "blockdev-add",
                {"driver": "qcow2", "node-name": node, "backing": None, "file": file, **how},
            )
        except BaseException:
            session.take_back(lent)
            raise

        def switch() -> None:
            session.execute("blockdev-snapshot", {"node": active, "overlay": node})

        try:
            yield switch
        finally:
            # As long as QEMU has it, the file is locked for all others.
            session.take_back(to_write)


def finish_switch(session: QmpSession, fresh: Path) -> bool:
    """Finish or undo a switch that `switching` began, in this program or another.

    QEMU is asked: an answer may have been lost.

    Returns:
        Whether the machine writes to the fresh overlay. Else QEMU closes that.

    Raises:
        QmpError: It could not be asked.
    """
    node = _name_node(fresh)
    if find_active(session) == node:
        return True
    if node in list_nodes(session):
        _close_node(session, node)
    return False


def merge_layers(qemu: RunningQemu, disk: Path) -> None:
    """Merge the layers below a running machine's disk into it when they have become many.

    Raises:
        MachineEndedError: It ended meanwhile.
        CloudError: It did not work.
    """
    if layers.too_deep(disk) is None:
        return
    deadline = Deadline.after(_MERGE_LIMIT)
    job = f"merge-{time.monotonic_ns()}"
    with qemu.session() as session:
        session.execute(
            "block-stream", {"job-id": job, "device": _ROOT, "base-node": _find_lowest(session)}
        )
        event = qemu.wait_for_event(
            lambda event: event.name == "BLOCK_JOB_COMPLETED" and event.data["device"] == job,
            deadline,
        )
        if "error" in event.data:
            raise CloudError(f"{qemu.name}: merging its layers failed: {event.data['error']}")
        _forget_merged(session)


def _forget_merged(session: QmpSession) -> None:
    """Have QEMU close the overlays that the disk is no longer built on."""
    active = find_active(session)
    names = [name for name in list_nodes(session) if _OVERLAY.fullmatch(name)]
    for name in names:
        if name == active:
            continue
        with contextlib.suppress(QmpError):  # one below is still in use
            _close_node(session, name)


def _name_node(fresh: Path) -> str:
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


def find_active(session: QmpSession) -> str:
    """Find QEMU's name of the overlay that the machine writes to."""
    return str(_find_root(session)["node-name"])


def _find_lowest(session: QmpSession) -> str:
    """Find QEMU's name of the lowest file of a machine's disk.

    Not the file's own: that is a path, which need not be text, and QMP takes nothing else.
    """
    image = _find_root(session)["image"]
    while "backing-image" in image:
        image = image["backing-image"]
    # QEMU writes the path alike in both answers.
    return next(
        name
        for name, node in list_nodes(session).items()
        if node["file"] == image["filename"] and node["drv"] != "file"
    )


def _find_root(session: QmpSession) -> dict[str, Any]:
    (root,) = (block for block in session.execute("query-block") if block["device"] == _ROOT)
    inserted: dict[str, Any] = root["inserted"]
    return inserted


def list_nodes(session: QmpSession) -> dict[str, dict[str, Any]]:
    """List the block nodes of a QEMU, by their names."""
    nodes = session.execute("query-named-block-nodes", {"flat": True})
    return {node["node-name"]: node for node in nodes}
