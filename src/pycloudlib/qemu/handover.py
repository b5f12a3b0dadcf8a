"""Handing a running machine over from one QEMU to another, on this host, in milliseconds.

The successor is started while the machine runs on, up to the point where all that it misses is the
machine's state. That state comes by QEMU's own live migration: directly, or through this process,
which keeps a copy of it:

    predecessor ── state ──▶ here ── state ──▶ successor
                              └──▶ file
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from pycloudlib.deadline import Deadline
from pycloudlib.descriptors import make_socket_pair, moved
from pycloudlib.errors import CloudError
from pycloudlib.qemu.command import Origin
from pycloudlib.qemu.keptmemory import check_machine
from pycloudlib.qemu.machine import Machine, MachineEndedError
from pycloudlib.qemu.memory import Memory, find_shared_memory
from pycloudlib.qemu.qmp import Event, QmpError, QmpSession
from pycloudlib.qemu.recovery import forward_ssh, go_on
from pycloudlib.qemu.running import RunningQemu

_log = logging.getLogger(__name__)

_CHUNK = 1 << 20
# A gigabyte of memory takes about a second; a guest that writes faster than it can be copied is
# slowed down by QEMU more and more (auto-converge).
_LIMIT_SECONDS = 300.0
# While the last of a guest's memory is copied, it stands still; QEMU estimates for how long.
_DOWNTIME_MS = 10
_BANDWIDTH = 1 << 40
# After the state, QEMU waits for nothing any more.
_RESUME_LIMIT = 30.0


def hand_over(machine: Machine, memory: Memory, *, kept_state: Path | None = None) -> float | None:
    """Let a new QEMU go on with a running machine.

    Not to be interrupted: at its end exactly one of the two is the machine. See `uninterrupted`.
    The caller keeps others from changing the machine meanwhile (`Machine.changing`).

    Args:
        machine: The machine.
        memory: The memory of the new QEMU. Memory that is a file is the machine's own shared
            memory: then the state that goes over holds none of it.
        kept_state: Where a copy of the state is kept, if at all; a new file.

    Returns:
        How long the guest stood still, in seconds; None for one that did so before.

    Raises:
        MachineEndedError: The machine is off.
        CloudError: It did not work; the machine goes on where it was.
    """
    with machine.session() as session:
        predecessor = machine.qemu()
        if memory.file is not None:
            _check_is_own(machine, predecessor, memory.file)
        begun = len(predecessor.events)
        with _successor(machine, memory) as (successor, incoming):
            deadline = Deadline.after(_LIMIT_SECONDS)
            _move(machine, session, successor, incoming, memory, kept_state, deadline)
        forward_ssh(machine.spec, successor)
        machine.rundir.forget_handover()
    return _pause(predecessor.events[begun:], successor.events)


@contextlib.contextmanager
def _successor(machine: Machine, memory: Memory) -> Iterator[tuple[RunningQemu, socket.socket]]:
    """Start the QEMU that waits for the state; end it if the block fails."""
    ours, theirs = make_socket_pair()
    with ours:
        with theirs:
            origin = Origin(memory, state=theirs.fileno(), replaces=True)
            number = theirs.fileno()
            successor = RunningQemu.start(machine.binary, machine.spec, machine.rundir, origin)
        try:
            receive(successor, memory, number)
            yield successor, ours
        except BaseException:
            successor.abandon()
            raise


def receive(qemu: RunningQemu, memory: Memory, descriptor: int) -> None:
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


def write_state(machine: Machine, file: Path) -> None:
    """Write the state of a machine that stands still, without its memory, which is shared.

    Raises:
        MachineEndedError: It is off.
        CloudError: The state could not be written.
    """
    qemu = machine.qemu()
    descriptor = moved(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
    with os.fdopen(descriptor, "wb"), machine.session() as session:
        _set_capabilities(session, with_memory=False)
        session.send_descriptor("state", descriptor)
        session.execute("migrate", {"uri": "fd:state"})
        event = qemu.wait_for_event(_is_decided, Deadline.after(_LIMIT_SECONDS))
    if event.data["status"] != "completed":
        raise CloudError(f"The state of {machine.spec.name} could not be written")


def _set_capabilities(qemu: RunningQemu | QmpSession, *, with_memory: bool) -> None:
    """Agree on what the state holds; both sides have to be told the same."""
    states = {
        "events": True,
        "x-ignore-shared": not with_memory,
        "auto-converge": with_memory,
    }
    qemu.execute(
        "migrate-set-capabilities",
        {"capabilities": [{"capability": name, "state": on} for name, on in states.items()]},
    )


def _move(
    machine: Machine,
    session: QmpSession,
    successor: RunningQemu,
    incoming: socket.socket,
    memory: Memory,
    kept_state: Path | None,
    deadline: Deadline,
) -> None:
    """Move the state, then the machine; on failure the machine goes on where it was.

    The successor does nothing until all else has succeeded: so it can be given up until then.
    """
    ran = session.execute("query-status")["running"]
    _set_capabilities(session, with_memory=memory.file is None)
    session.execute(
        "migrate-set-parameters", {"downtime-limit": _DOWNTIME_MS, "max-bandwidth": _BANDWIDTH}
    )
    pump = None if kept_state is None else _Pump(incoming, kept_state)
    try:
        with incoming if pump is None else pump.source as outgoing:
            session.send_descriptor("state", outgoing.fileno())
        session.execute("migrate", {"uri": "fd:state"})
        wait_for_state(successor, deadline)
        if pump is not None:
            pump.result()
        successor.publish()
        if ran:
            successor.execute("cont")
    except BaseException as error:
        successor.kill()
        _go_on(session, machine, ran=ran)
        if isinstance(error, MachineEndedError):
            raise CloudError(
                f"{machine.spec.name} could not be handed over to another QEMU. {error.end}"
            ) from error
        raise
    machine.go_on_in(successor)


def _is_decided(event: Event) -> bool:
    return event.name == "MIGRATION" and event.data["status"] in ("completed", "failed")


def _go_on(session: QmpSession, machine: Machine, *, ran: bool) -> None:
    """Let the machine go on where it was."""
    try:
        go_on(session, ran=ran)
        machine.rundir.write_process(machine.qemu().process.identity)
    except (QmpError, MachineEndedError) as error:
        _log.error("%s cannot go on: %s", machine.spec.name, error)


def _check_is_own(machine: Machine, qemu: RunningQemu, memory: Path) -> None:
    """Make sure that memory is that of the QEMU that runs: another may have begun meanwhile."""
    own = find_shared_memory(qemu.process.pid)
    if own is None or not own.samefile(memory):
        raise CloudError(
            f"{machine.spec.name} was switched off and on, or saved by somebody else, while it was "
            "to be saved; it goes on"
        )


def _pause(before: tuple[Event, ...], after: tuple[Event, ...]) -> float | None:
    """Tell how long the guest stood still: between the two QEMUs' own timestamps."""
    stops = [event.timestamp for event in before if event.name == "STOP"]
    resumes = [event.timestamp for event in after if event.name == "RESUME"]
    return resumes[0] - stops[-1] if stops and resumes else None


class _Pump(threading.Thread):
    """Passes the state on to its end, and keeps a copy of it.

    Attributes:
        source: What the predecessor is given to write to.
    """

    def __init__(self, target: socket.socket, copy: Path) -> None:
        super().__init__(name="state-pump", daemon=True)
        self._from, self.source = make_socket_pair()
        self._target = target
        self._copy = copy
        self._kept: list[bytes] = []
        self._error: OSError | None = None
        self.start()

    def run(self) -> None:
        with self._from:
            try:
                while chunk := self._from.recv(_CHUNK):
                    self._target.sendall(chunk)
                    self._kept.append(chunk)
                self._target.shutdown(socket.SHUT_WR)
            except OSError as error:
                self._error = error

    def result(self) -> None:
        """Wait for the end of the stream, and write the copy.

        Raises:
            OSError: The stream broke, or the copy could not be written.
        """
        self.join(_RESUME_LIMIT)
        if self.is_alive():
            raise CloudError("the state of the machine did not come to its end")
        if self._error is not None:
            raise self._error
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with os.fdopen(moved(os.open(self._copy, flags, 0o600)), "wb") as file:
            file.writelines(self._kept)


def feed(target: socket.socket, state: Path) -> None:
    """Send a kept state to a QEMU that waits for it, without waiting for QEMU."""

    def send() -> None:
        # A QEMU that ends early says why itself.
        with target, contextlib.suppress(OSError):
            target.sendall(state.read_bytes())

    threading.Thread(target=send, name="state-feed", daemon=True).start()
