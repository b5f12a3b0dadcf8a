"""What the console says of a machine's end is held against what only the machine can do."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pycloudlib.guest.boot.console import Console, DeadEnd
from pycloudlib.qemu.vm.qmp import QmpError
from pycloudlib.qemu.vm.running import MachineEndedError
from pycloudlib.qemu.vm.vitality import DeadEndCheck, Verdict

BOOT = b"SeaBIOS (version 1.16)\r\n[    0.000000] Linux version 6.1.0\r\n"
PANIC = b"[   44.3] ---[ end Kernel panic - not syncing: typed by somebody ]---\r\n"
EMERGENCY = b"You are in emergency mode.\r\n"


class Machine:
    """A machine whose console, disk, state, SSH port and clock are a test's."""

    def __init__(self, log: Path, listener: socket.socket) -> None:
        self.log = log
        self.console = Console(log)
        self.now = 0.0
        self.operations = 0
        self.running = True
        self.problem: Exception | None = None
        self.listener = listener
        self.check = DeadEndCheck(
            "vm",
            self.console,
            listener.getsockname()[1],
            answer_limit=0.2,
            clock=lambda: self.now,
        )

    def execute(self, command: str, *, timeout: float) -> Any:
        if self.problem is not None:
            raise self.problem
        if command == "query-status":
            return {"running": self.running}
        stats = {"rd_operations": self.operations, "wr_operations": 1}
        return [{"stats": stats}, {"stats": {"rd_operations": 2, "wr_operations": 0}}]

    def prints(self, content: bytes) -> None:
        with self.log.open("ab") as file:
            file.write(content)

    def found(self) -> DeadEnd:
        found = self.console.look().find_dead_end()
        assert found is not None
        return found

    def judge(self) -> Verdict:
        return self.check.judge(self.found(), self.execute)

    def answers(self, content: bytes | None) -> None:
        """Let each connection be answered; by None it is reset."""

        def accept() -> None:
            while True:
                try:
                    connection = self.listener.accept()[0]
                except OSError:
                    return
                if content is None:
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                else:
                    connection.sendall(content)
                connection.close()

        threading.Thread(target=accept, daemon=True).start()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    log = tmp_path / "console.log"
    log.write_bytes(BOOT + PANIC)
    # As user-mode networking does, the kernel takes connections that nobody answers.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield Machine(log, listener)
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


def test_machine_that_does_nothing_has_ended(machine: Machine) -> None:
    assert machine.judge() is Verdict.UNDECIDED
    machine.now += 1
    assert machine.judge() is Verdict.UNDECIDED
    machine.now += 2
    assert machine.judge() is Verdict.CONFIRMED
    assert machine.judge() is Verdict.CONFIRMED, "and is not asked again"


def test_machine_that_goes_on_printing_has_not_ended(machine: Machine) -> None:
    for _ in range(5):
        assert machine.judge() is Verdict.UNDECIDED
        machine.now += 3
        machine.prints(b"[   45.0] a line of the boot\r\n")
    machine.now += 3
    assert machine.judge() is Verdict.UNDECIDED
    machine.now += 3
    assert machine.judge() is Verdict.CONFIRMED
    machine.prints(b"[   46.0] it went on all the same\r\n")
    assert machine.judge() is Verdict.UNDECIDED


def test_machine_that_uses_its_disk_has_not_ended(machine: Machine) -> None:
    for _ in range(5):
        assert machine.judge() is Verdict.UNDECIDED
        machine.now += 3
        machine.operations += 1


def test_machine_that_is_paused_cannot_show_that_it_lives(machine: Machine) -> None:
    machine.running = False
    for _ in range(5):
        assert machine.judge() is Verdict.UNDECIDED
        machine.now += 3
    machine.running = True
    assert machine.judge() is Verdict.UNDECIDED
    machine.now += 3
    assert machine.judge() is Verdict.CONFIRMED


@pytest.mark.parametrize("when", ["before", "after"])
def test_machine_whose_ssh_server_answers_has_not_ended(machine: Machine, when: str) -> None:
    if when == "after":
        assert machine.judge() is Verdict.UNDECIDED
        machine.now += 3
    machine.answers(b"SSH-2.0-OpenSSH_9.2\r\n")
    assert machine.judge() is Verdict.REFUTED
    machine.now += 100
    assert machine.judge() is Verdict.REFUTED
    # What is told anew is a matter of its own.
    machine.prints(BOOT + PANIC)
    machine.listener.shutdown(socket.SHUT_RDWR)
    machine.listener.close()
    machine.log.write_bytes(BOOT + BOOT + EMERGENCY)
    assert machine.judge() is Verdict.UNDECIDED


def test_kernel_that_refuses_connections_lives(machine: Machine) -> None:
    machine.answers(None)
    assert machine.judge() is Verdict.REFUTED


def test_refused_connection_tells_nothing_of_an_emergency_shell(machine: Machine) -> None:
    machine.log.write_bytes(BOOT + EMERGENCY)
    machine.answers(None)
    assert machine.judge() is Verdict.UNDECIDED
    machine.now += 3
    assert machine.judge() is Verdict.CONFIRMED


def test_qemu_that_cannot_be_asked_leaves_it_to_the_others(machine: Machine) -> None:
    machine.problem = QmpError("busy")
    assert machine.judge() is Verdict.UNDECIDED
    machine.now += 3
    assert machine.judge() is Verdict.CONFIRMED


def test_machine_that_is_off_is_told_as_such(machine: Machine) -> None:
    machine.problem = MachineEndedError("vm", None)
    with pytest.raises(MachineEndedError):
        machine.judge()
