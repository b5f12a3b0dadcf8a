"""The state of a machine's processors and devices, without its memory: QEMU's migration format.

A whole state is what QEMU's migration writes where the memory is shared (`x-ignore-shared`). It
begins with the header, the configuration, and the RAM blocks beside the guest's memory (firmware,
tables), as a QEMU that takes a state loads no firmware itself; sections of devices follow, then a
description of them all (docs/devel/migration). `xen-save-devices-state`, which has nothing to do
with Xen, writes the sections of devices alone, in milliseconds, of a machine with any memory. The
rest is the same for all machines of one description, as long as those blocks do not change.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from pathlib import Path

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.files import moved
from pycloudlib.errors import CloudError
from pycloudlib.qemu.parts.part import Memory
from pycloudlib.qemu.parts.standard import BACKEND
from pycloudlib.qemu.vm.memory import check_machine
from pycloudlib.qemu.vm.qmp import Event, QmpError, QmpSession
from pycloudlib.qemu.vm.running import RunningQemu

_LIMIT_SECONDS = 300.0
# Once a migration is over, QEMU waits for nothing any more.
_SETTLE_LIMIT = 30.0
_LOOK = 0.002
_SETTLED = (None, "none", "cancelled", "failed", "completed")
_SAVE_DEVICES = "xen-save-devices-state"
# Bytes of the header: a mark and a version.
_HEADER = 8
# A section of a device: its kind, a number, its name.
_FIRST_DEVICE = re.compile(rb"\x04.{4}\x05timer", re.DOTALL)
# What describes the sections: its kind, its length, JSON. QEMU reads over it.
_DESCRIPTION = b"\x06" + (2).to_bytes(4, "big") + b"{}"
# RAM blocks that are as they were at the reset: firmware, its tables, and the ROMs of cards.
_UNCHANGING = re.compile(rf"{BACKEND}|pc\.bios|pc\.rom|/rom@.*|.*\.rom")
# A line of `info ramblock`: the block's name, the size of its pages, where it is, its length.
_BLOCK = re.compile(r"^ *(\S.*?) +[0-9]+ [KMG]iB +0x[0-9a-f]+ +(0x[0-9a-f]+) ", re.MULTILINE)


def find_obstacle(session: QmpSession) -> str | None:
    """Say why the state of a machine cannot be put together; None when it can."""
    commands = {command["name"] for command in session.execute("query-commands")}
    if _SAVE_DEVICES not in commands:
        return f"this QEMU does not know {_SAVE_DEVICES}"
    for name in list_blocks(session):
        if not _UNCHANGING.fullmatch(name):
            return f"it has memory beside its own that changes ({name})"
    return None


def list_blocks(session: QmpSession) -> dict[str, int]:
    """List the RAM blocks of a machine: their names, and how long they are in bytes."""
    said = session.execute("human-monitor-command", {"command-line": "info ramblock"})
    return {name: int(used, 16) for name, used in _BLOCK.findall(said)}


def save_devices(session: QmpSession) -> bytes:
    """Give the sections of the devices of a machine that stands still.

    Raises:
        QmpError: QEMU did not write them.
    """
    with contextlib.ExitStack() as stack:
        reading = moved(os.memfd_create("pycloudlib-devices", os.MFD_CLOEXEC))
        stack.callback(os.close, reading)
        # QEMU takes a descriptor that is open as it wants the file, and for nothing else.
        writing = moved(os.open(f"/proc/self/fd/{reading}", os.O_WRONLY | os.O_CLOEXEC))
        stack.callback(os.close, writing)
        # It is taken back with all others, when the machine runs again.
        lent = session.lend(writing)
        # `live` would give the machine's disks up.
        session.execute(_SAVE_DEVICES, {"filename": lent.path, "live": False})
        return os.pread(reading, os.fstat(reading).st_size, _HEADER)


def compose(base: bytes, devices: bytes) -> bytes:
    """Put a whole state together.

    Args:
        base: A whole state of a machine of the same description.
        devices: The sections of the devices.

    Raises:
        CloudError: The base is no state.
    """
    found = _FIRST_DEVICE.search(base)
    if found is None:
        raise CloudError("The state that the machine began with cannot be read")
    return base[: found.start()] + devices + _DESCRIPTION


def accept_state(qemu: RunningQemu, memory: Memory, descriptor: int) -> None:
    """Let a QEMU that was started with `Origin.state` take its state from that descriptor.

    Raises:
        KeptMemoryError: It would change the memory that it goes on from.
        QmpError: It refused.
    """
    if memory.file is not None:
        with qemu.session() as session:
            check_machine(qemu.name, session)
    _set_capabilities(qemu, with_memory=memory.file is None)
    qemu.execute("migrate-incoming", {"uri": f"fd:{descriptor}"})


def wait_for_state(qemu: RunningQemu, deadline: Deadline) -> None:
    """Wait until a QEMU has taken its state, and goes on.

    Raises:
        MachineEndedError: It ended: the state does not fit it.
        CloudError: It did not come to its end.
    """
    event = qemu.wait_for_event(_is_decided, deadline)
    if event.data["status"] != "completed":
        raise CloudError("QEMU could not go on from the state it was given")


def write_state(qemu: RunningQemu, file: Path) -> None:
    """Write the whole state of a machine whose memory is shared, which is not in it.

    It stands still from then on, and its QEMU has given its disks up until it goes on.

    Raises:
        MachineEndedError: QEMU is gone.
        CloudError: The state could not be written.
    """
    descriptor = moved(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
    try:
        send_state(qemu, descriptor, with_memory=False)
    finally:
        os.close(descriptor)


def send_state(qemu: RunningQemu, descriptor: int, *, with_memory: bool) -> None:
    """Let a QEMU write the whole state of its machine; see `write_state`.

    Args:
        qemu: The QEMU.
        descriptor: Where to.
        with_memory: Whether its memory is in it, whatever memory that is.

    Raises:
        MachineEndedError: QEMU is gone.
        CloudError: The state could not be written.
    """
    # It may have been saved before.
    seen = qemu.events
    with qemu.session() as session:
        _set_capabilities(session, with_memory=with_memory)
        session.send_descriptor("state", descriptor)
        session.execute("migrate", {"uri": "fd:state"})
        try:
            event = qemu.wait_for_event(
                lambda event: _is_decided(event) and event not in seen,
                Deadline.after(_LIMIT_SECONDS),
            )
        except BaseException:
            with contextlib.suppress(QmpError):
                session.execute("migrate_cancel")
                _wait_until_settled(session)
            raise
        _wait_until_settled(session)
    if event.data["status"] != "completed":
        raise CloudError(f"QEMU could not write the state of {qemu.name}")


def _wait_until_settled(session: QmpSession) -> None:
    """Wait until QEMU lets its machine go on, which it does a moment after it has told the end."""
    deadline = Deadline.after(_SETTLE_LIMIT)
    while not deadline.expired:
        settled = session.execute("query-migrate").get("status") in _SETTLED
        if settled and session.execute("query-status")["status"] != "finish-migrate":
            return
        time.sleep(_LOOK)


def _set_capabilities(qemu: RunningQemu | QmpSession, *, with_memory: bool) -> None:
    """Agree on what the state holds; both sides have to be told the same."""
    states = {"events": True, "x-ignore-shared": not with_memory}
    qemu.execute(
        "migrate-set-capabilities",
        {"capabilities": [{"capability": name, "state": on} for name, on in states.items()]},
    )


def _is_decided(event: Event) -> bool:
    return event.name == "MIGRATION" and event.data["status"] in ("completed", "failed")


def send_saved_state(target: socket.socket, state: Path) -> None:
    """Send a kept state to a QEMU that waits for it, without waiting for QEMU."""

    def send() -> None:
        # A QEMU that ends early says why itself.
        with target, contextlib.suppress(OSError):
            target.sendall(state.read_bytes())

    threading.Thread(target=send, name="state-feed", daemon=True).start()
