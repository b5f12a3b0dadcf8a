"""When a machine that was admitted has booted, and what ends that otherwise."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pycloudlib.errors import PycloudlibTimeoutError
from pycloudlib.guest.access import ssh
from pycloudlib.guest.boot.console import Console
from pycloudlib.qemu.host.budget import Budget, Capacity
from pycloudlib.qemu.host.resources import listen
from pycloudlib.qemu.launching import admission
from pycloudlib.qemu.parts.standard import InstanceType
from pycloudlib.qemu.state.rundir import RunDirectory

WHOLE = Capacity(1, 4000)
SIZE = InstanceType.parse("c1m64")
FIRMWARE = "SeaBIOS (version 1.16)\n"
LOCAL = "cloud-init[300]: Cloud-init v. 24.4 running 'init-local' at Mon\n"
DONE = "cloud-init[700]: Cloud-init v. 24.4 finished at Mon\n"


@dataclass
class FakeMachine:
    """Has a console, and is on until it is not."""

    rundir: RunDirectory
    spec: Any = field(default_factory=lambda: SimpleNamespace(name="vm", ssh_port=1))
    problem: Exception | None = None
    looked: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.console = Console(self.rundir.console_log)
        self.print(FIRMWARE)

    def print(self, text: str) -> None:
        with self.rundir.console_log.open("a") as log:
            log.write(text)

    def check_on(self) -> None:
        self.looked.set()

    def check_pause(self) -> None:
        if self.problem is not None:
            raise self.problem


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    directory = tmp_path / "vm"
    directory.mkdir()
    return FakeMachine(RunDirectory(directory))


def follow(tmp_path: Path, machine: Any, minutes: float = 1.0, quiet: float = 100) -> Budget:
    budget = Budget(tmp_path / "budget", WHOLE, limit=30)
    pace = admission.Pace(0.01, quiet)
    with admission.admitting(budget, SIZE, lambda _who: None, pace) as begin:
        begin(machine, minutes)
    return budget


def reserved(tmp_path: Path) -> list[str]:
    files = (tmp_path / "budget").glob("*.taken")
    return sorted("-".join(file.name.split("-")[:2]) for file in files)


def wait_for_next(budget: Budget) -> None:
    """Wait until another machine may boot."""
    budget.admit(Capacity(1, 0), lambda _who: None).release()


@pytest.fixture(autouse=True)
def _all_given_back(tmp_path: Path) -> Iterator[None]:
    yield
    admission.release(tmp_path / "vm")
    assert reserved(tmp_path) == []


def test_end_of_cloud_init_ends_the_boot(tmp_path: Path, machine: FakeMachine) -> None:
    budget = follow(tmp_path, machine)
    assert machine.looked.wait(30)
    assert reserved(tmp_path) == ["0-64", "1-0"]
    machine.print(LOCAL + DONE)
    wait_for_next(budget)
    assert reserved(tmp_path) == ["0-64"]


def test_ready_machine_ends_the_boot(tmp_path: Path, machine: FakeMachine) -> None:
    follow(tmp_path, machine)
    admission.end_boot(machine.rundir.path)
    assert reserved(tmp_path) == ["0-64"]


def test_copy_of_a_machine_that_was_ready_does_not_boot(
    tmp_path: Path, machine: FakeMachine
) -> None:
    machine.rundir.helper_mark.touch()
    follow(tmp_path, machine)
    assert reserved(tmp_path) == ["0-64"]


def test_machine_that_was_deleted_meanwhile_holds_nothing(
    tmp_path: Path, machine: FakeMachine
) -> None:
    machine.rundir.console_log.unlink()
    machine.rundir.path.rmdir()
    follow(tmp_path, machine)
    assert reserved(tmp_path) == []


def test_machine_that_is_paused_for_long_holds_up_nobody(
    tmp_path: Path, machine: FakeMachine
) -> None:
    machine.problem = PycloudlibTimeoutError("vm is paused")
    wait_for_next(follow(tmp_path, machine))


def test_following_that_fails_holds_up_nobody(
    tmp_path: Path, machine: FakeMachine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.problem = RuntimeError("no more")
    with caplog.at_level(logging.ERROR):
        wait_for_next(follow(tmp_path, machine))
    assert "The boot of vm cannot be followed" in caplog.text


def test_boot_that_takes_too_long_is_said(
    tmp_path: Path, machine: FakeMachine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        wait_for_next(follow(tmp_path, machine, 0.0001))
    assert "vm has not booted within 0 s" in caplog.text


def test_dead_end_ends_the_boot(tmp_path: Path, machine: FakeMachine) -> None:
    budget = follow(tmp_path, machine, quiet=0.0)
    machine.print("No bootable device.\n")
    wait_for_next(budget)


def test_guest_without_cloud_init_has_booted_when_its_ssh_server_answers(
    tmp_path: Path, machine: FakeMachine
) -> None:
    with listen(0) as server:
        machine.spec.ssh_port = server.getsockname()[1]
        budget = follow(tmp_path, machine, quiet=0.0)
        client, _address = server.accept()
        assert reserved(tmp_path) == ["0-64", "1-0"]
        with client:
            client.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            wait_for_next(budget)


def test_guest_with_cloud_init_has_not_booted_when_its_ssh_server_answers(
    tmp_path: Path, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def answer(*place: object) -> socket.socket:
        asked.append(place)
        raise OSError

    monkeypatch.setattr(ssh, "open_with_banner", answer)
    machine.print(LOCAL)
    budget = follow(tmp_path, machine, quiet=0.0)
    assert machine.looked.wait(30)
    machine.looked.clear()
    assert machine.looked.wait(30)
    assert reserved(tmp_path) == ["0-64", "1-0"]
    assert asked == []
    machine.print(DONE)
    wait_for_next(budget)
