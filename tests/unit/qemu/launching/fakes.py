"""What a launcher works with, made for tests: nothing of it starts a QEMU."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from pycloudlib.key import KeyPair, generate_key_pair
from pycloudlib.qemu.host.ownership import Orphans
from pycloudlib.qemu.host.resources import PortLease
from pycloudlib.qemu.launching.beginning import Host
from pycloudlib.qemu.launching.launcher import Launcher
from pycloudlib.qemu.launching.login import Keys, Login, OwnKeys
from pycloudlib.qemu.parts.standard import InstanceType
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.state.spec import MachineSpec
from pycloudlib.qemu.vm.machine import Machine


@dataclass
class FakeInstance:
    """Holds what the launcher gave; notes what is asked of it."""

    machine: Machine
    login: Login
    deleted: bool = False
    ip: str = "127.0.0.1"

    @property
    def name(self) -> str:
        return self.machine.spec.name

    @property
    def telnet_port(self) -> str:
        return str(self.machine.spec.telnet_port)

    def login_command(self) -> str:
        return f"ssh {self.login.username}@{self.ip}"

    def delete(self) -> list[Exception]:
        self.deleted = True
        return []


@dataclass
class FakeBeginning:
    """Notes its steps; one of them may fail, or be interrupted."""

    name: str = "vm"
    origin: str = "from nowhere"
    steps: list[str] = field(default_factory=list)
    failing: str = ""
    error: BaseException = field(default_factory=lambda: OSError("no more"))
    new_key: KeyPair | None = None

    def _step(self, name: str) -> None:
        self.steps.append(name)
        if name == self.failing:
            raise self.error

    @contextlib.contextmanager
    def holding(self, image_dir: Path):  # type: ignore[no-untyped-def]
        self._step("hold")
        try:
            yield
        finally:
            self.steps.append("let go")

    def choose_login(self, keys: Keys, username: str | None, rundir: RunDirectory) -> Login:
        self._step("login")
        return Login(username or "ubuntu", keys.for_machine(rundir))

    def write_files(self, host: Host, rundir: RunDirectory, login: Login) -> None:
        self._step("files")
        rundir.disk.write_bytes(b"disk")

    def describe(self, host: Host, rundir: RunDirectory, lease: PortLease) -> MachineSpec:
        self._step("describe")
        return MachineSpec(
            name=self.name,
            instance_type=InstanceType(1, 64),
            accelerator=host.accelerator,
            disk=rundir.disk,
            seed=None,
            ssh_port=lease.ssh,
            telnet_port=lease.telnet,
            mac="52:54:00:00:00:01",
        )

    def switch_on(self, machine: Machine) -> None:
        self._step("switch on")


@dataclass
class Registered:
    """What was registered, in place of a cloud."""

    instances: list[FakeInstance] = field(default_factory=list)

    def __call__(self, machine: Machine, login: Login) -> FakeInstance:
        instance = FakeInstance(machine, login)
        self.instances.append(instance)
        return instance


def make_launcher(host: Host, directory: Path, registered: Registered) -> Launcher[FakeInstance]:
    """Make a launcher whose cloud has its directory below another."""
    keys = directory / "keys"
    keys.mkdir()
    key = generate_key_pair(keys, "me")
    parent = directory / "instances" / "pycl-qemu-t"
    return Launcher(
        host=host,
        parent_dir=parent,
        working_dir=parent.parent,
        image_dir=directory / "images",
        tag="t",
        keys=Keys(lambda: key, "me", OwnKeys(parent)),
        orphans=Orphans.REAP,
        register=registered,
    )
