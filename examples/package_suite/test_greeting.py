"""Test a Debian package, each test on a machine of its own.

pytest examples/package_suite --vm-image bookworm
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pycloudlib.pytest_plugin import VmFactory
from pycloudlib.qemu.instance import QemuInstance

ASK = "python3 -c 'import socket; print(socket.create_connection((\"127.0.0.1\", 7777)).recv(99))'"
HANG_UP = "python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", 7777)).close()'"


@pytest.fixture
def machine(vm_factory: VmFactory, installed: str) -> QemuInstance:
    return vm_factory(installed)


def test_service_greets(machine: QemuInstance) -> None:
    assert f"greetings from {machine.name}" in machine.execute(ASK)


def test_service_survives_a_broken_client(machine: QemuInstance) -> None:
    assert machine.execute(HANG_UP).ok
    assert "greetings" in machine.execute(ASK)
    assert machine.execute("systemctl is-active greeting.socket") == "active"


def test_removal_leaves_nothing(machine: QemuInstance) -> None:
    assert machine.execute("dpkg --purge greeting", use_sudo=True).ok
    assert machine.execute("ls /usr/bin/greeting").failed
    assert machine.execute("systemctl is-active greeting.socket").failed
    assert machine.execute("systemctl --failed --no-legend") == ""


def test_installation_again_is_no_problem(
    machine: QemuInstance, install: Callable[[QemuInstance], None]
) -> None:
    install(machine)
    assert "greetings" in machine.execute(ASK)
