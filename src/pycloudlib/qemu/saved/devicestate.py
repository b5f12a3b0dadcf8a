"""The state of a machine's processors and devices, without its memory: QEMU's migration format.

A whole state is what QEMU's migration writes where the memory is shared (`x-ignore-shared`). It
begins with the header, the configuration, and the RAM blocks beside the guest's memory (firmware,
tables), since a QEMU that loads a state loads no firmware itself; sections of devices follow, then
a description of them all (docs/devel/migration). `xen-save-devices-state`, which does not depend on
Xen, writes only the sections of devices, in milliseconds, of a machine with any memory. The rest is
the same for all machines of one description, as long as those blocks do not change.
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
from pycloudlib._base.files import moved, opened
from pycloudlib.errors import CloudError
from pycloudlib.qemu.parts.part import Memory
from pycloudlib.qemu.parts.standard import BACKEND
from pycloudlib.qemu.vm.memory import check_machine
from pycloudlib.qemu.vm.qmp import Event, QmpError, QmpSession
from pycloudlib.qemu.vm.running import RunningQemu

_LIMIT_SECONDS = 300.0
# Once a migration is over, QEMU waits for nothing any more.
_SETTLE_LIMIT = 30.0
_INTERVAL = 0.002
_SETTLED = (None, "none", "cancelled", "failed", "completed")
_SAVE_DEVICES = "xen-save-devices-state"
# Bytes of the header: a mark and a version.
_HEADER = 8
# A section of a device: its kind, a number, its name.
_FIRST_DEVICE = re.compile(rb"\x04.{4}\x05timer", re.DOTALL)
# The description of the sections: its kind, its length, JSON. QEMU skips it.
_DESCRIPTION = b"\x06" + (2).to_bytes(4, "big") + b"{}"
# RAM blocks that do not change after a reset: firmware, its tables, and the ROMs of cards.
_UNCHANGING = re.compile(rf"{BACKEND}|pc\.bios|pc\.rom|/rom@.*|.*\.rom")
# A line of `info ramblock`: the block's name, the size of its pages, its offset, its length.
_BLOCK = re.compile(r"^ *(\S.*?) +[0-9]+ [KMG]iB +0x[0-9a-f]+ +(0x[0-9a-f]+) ", re.MULTILINE)


def find_obstacle(session: QmpSession) -> str | None:
    """Return why the state of a machine cannot be composed; None when it can."""
    commands = {command["name"] for command in session.execute("query-commands")}
    if _SAVE_DEVICES not in commands:
        return f"this QEMU does not know {_SAVE_DEVICES}"
    for name in list_blocks(session):
        if not _UNCHANGING.fullmatch(name):
            return f"it has memory beside its own that changes ({name})"
    return None


def list_blocks(session: QmpSession) -> dict[str, int]:
    """List the RAM blocks of a machine: their names, and their lengths in bytes."""
    said = session.execute("human-monitor-command", {"command-line": "info ramblock"})
    return {name: int(used, 16) for name, used in _BLOCK.findall(said)}


def save_devices(session: QmpSession) -> bytes:
    """Return the sections of the devices of a paused machine.

    Raises:
        QmpError: QEMU did not write them.
    """
    with contextlib.ExitStack() as stack:
        reading = moved(os.memfd_create("pycloudlib-devices", os.MFD_CLOEXEC))
        stack.callback(os.close, reading)
        # QEMU takes only a descriptor that is open in the very mode that it needs.
        writing = stack.enter_context(opened(f"/proc/self/fd/{reading}", os.O_WRONLY))
        # It is taken back with all others, when the machine runs again.
        lent = session.lend(writing)
        # With `live`, QEMU would release the machine's disks.
        session.execute(_SAVE_DEVICES, {"filename": lent.path, "live": False})
        return os.pread(reading, os.fstat(reading).st_size, _HEADER)


def compose(base: bytes, devices: bytes) -> bytes:
    """Compose a whole state.

    Args:
        base: A whole state of a machine of the same description.
        devices: The sections of the devices.

    Raises:
        CloudError: The base is no state.
    """
    found = _FIRST_DEVICE.search(base)
    if found is None:
        raise CloudError("The state that the machine was started with cannot be read")
    return base[: found.start()] + devices + _DESCRIPTION


def accept_state(qemu: RunningQemu, memory: Memory, descriptor: int) -> None:
    """Have a QEMU that was started with `Origin.state` load its state from that descriptor.

    Raises:
        KeptMemoryError: It would change the saved memory that it runs on.
        QmpError: It refused.
    """
    if memory.file is not None:
        with qemu.session() as session:
            check_machine(qemu.name, session)
    _set_capabilities(qemu, with_memory=memory.file is None)
    qemu.execute("migrate-incoming", {"uri": f"fd:{descriptor}"})


def wait_for_state(qemu: RunningQemu, deadline: Deadline) -> None:
    """Wait until a QEMU has loaded its state, and runs it.

    Raises:
        MachineEndedError: It ended: the state does not fit it.
        CloudError: It did not load all of it.
    """
    event = qemu.wait_for_event(_is_decided, deadline)
    if event.data["status"] != "completed":
        raise CloudError("QEMU could not load the state that it was given")


def write_state(qemu: RunningQemu, file: Path) -> None:
    """Write the whole state of a machine with shared memory, without that memory.

    The machine is paused from then on, and its QEMU has released its disks until it is resumed.

    Raises:
        MachineEndedError: QEMU is gone.
        CloudError: The state could not be written.
    """
    with opened(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW) as descriptor:
        send_state(qemu, descriptor, with_memory=False)


def send_state(qemu: RunningQemu, descriptor: int, *, with_memory: bool) -> None:
    """Have a QEMU write the whole state of its machine; see `write_state`.

    Args:
        qemu: The QEMU.
        descriptor: Where it writes to.
        with_memory: Whether to include its memory, which may then be of any kind.

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
    """Wait until QEMU can resume its machine, a moment after it has reported the end."""
    deadline = Deadline.after(_SETTLE_LIMIT)
    while not deadline.expired:
        settled = session.execute("query-migrate").get("status") in _SETTLED
        if settled and session.execute("query-status")["status"] != "finish-migrate":
            return
        time.sleep(_INTERVAL)


def _set_capabilities(qemu: RunningQemu | QmpSession, *, with_memory: bool) -> None:
    """Set what the state contains, which has to be the same on both sides."""
    states = {"events": True, "x-ignore-shared": not with_memory}
    qemu.execute(
        "migrate-set-capabilities",
        {"capabilities": [{"capability": name, "state": on} for name, on in states.items()]},
    )


def _is_decided(event: Event) -> bool:
    return event.name == "MIGRATION" and event.data["status"] in ("completed", "failed")


def send_saved_state(target: socket.socket, state: Path) -> None:
    """Send a saved state to a QEMU that waits for it, without waiting for QEMU."""

    def send() -> None:
        # A QEMU that ends early reports why itself.
        with target, contextlib.suppress(OSError):
            target.sendall(state.read_bytes())

    threading.Thread(target=send, name="state-feed", daemon=True).start()
