from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pycloudlib.pytest_plugin import PrepareVm
from pycloudlib.qemu.instance import QemuInstance

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the package."""
    target = tmp_path_factory.mktemp("package") / "greeting.deb"
    tree = HERE / "greeting"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, target], check=True)
    return target


@pytest.fixture(scope="session")
def install(package: Path) -> Callable[[QemuInstance], None]:
    """Return a function that installs the package in a machine."""

    def install_in(machine: QemuInstance) -> None:
        machine.push_file(package, "/tmp/greeting.deb")
        done = machine.execute("dpkg --install /tmp/greeting.deb", use_sudo=True)
        assert done.ok, done.stderr

    return install_in


@pytest.fixture(scope="session")
def installed(prepare_vm: PrepareVm, install: Callable[[QemuInstance], None]) -> str:
    """Save a machine with the package; tests start from it."""
    return prepare_vm(install)
