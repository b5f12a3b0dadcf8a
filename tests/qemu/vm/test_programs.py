"""A part with a program beside QEMU: started before it, watched, and ended after it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pycloudlib import Qemu
from pycloudlib.errors import CloudError
from pycloudlib.qemu.host.processes import ProcessIdentity
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.parts.part import Part, Program, Start
from pycloudlib.qemu.state.spec import MachineSpec
from tests.qemu.conftest import CloudMaker
from tests.qemu.machines import SMALL, becomes, save

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("own_ports")]

SERVER = """
import socket, sys
listener = socket.socket(fileno=int(sys.argv[1]))
while True:
    connection, _ = listener.accept()
    print("connected", flush=True)
    connections = [connection]
"""


@dataclass(frozen=True, slots=True)
class Echo(Part):
    """A port of the guest that a program of the host serves."""

    command: tuple[str, ...] = (sys.executable, "-c", SERVER, "{fd}")

    def arguments(self, start: Start) -> list[str]:
        socket = f"socket,id=echo,fd={start.channels.programs['echo']}"
        return ["-chardev", socket, "-device", "virtserialport,chardev=echo,name=echo"]

    def programs(self, directory: Path) -> tuple[Program, ...]:
        return (Program("echo", self.command),)


def servers() -> list[int]:
    """List the programs of this kind that this process has started."""
    me = str(os.getpid())
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (directory / "stat").read_text().rpartition(")")[2].split()[1]
            if parent == me and SERVER.encode() in (directory / "cmdline").read_bytes():
                found.append(int(directory.name))
    return found


def give(monkeypatch: pytest.MonkeyPatch, part: Part) -> None:
    """Let all machines of this process have one part more."""
    parts = MachineSpec.parts.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(MachineSpec, "parts", property(lambda spec: (*parts(spec), part)))


@pytest.fixture(autouse=True)
def _echo(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, Echo())


@pytest.fixture
def program(running: QemuInstance) -> Iterator[ProcessIdentity]:
    (identity,) = running.machine.rundir.find_programs()
    yield identity
    assert becomes(lambda: not identity.alive) or running.instance_dir.exists()


def test_program_runs_before_qemu_connects_to_it(
    running: QemuInstance, program: ProcessIdentity
) -> None:
    assert program.alive
    log = running.instance_dir / "echo.log"
    assert becomes(lambda: log.read_text() == "connected\n")
    assert log.stat().st_mode & 0o777 == 0o600
    assert list(running.instance_dir.glob("*echo-socket*")) == []


def test_program_ends_with_qemu_however_that_ends(
    running: QemuInstance, program: ProcessIdentity
) -> None:
    pid = running.machine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert becomes(lambda: not program.alive)


def test_machine_that_is_switched_on_again_has_another(
    running: QemuInstance, program: ProcessIdentity
) -> None:
    running.machine.kill()
    running.start(wait=False)
    (second,) = running.machine.rundir.find_programs()
    assert second.alive
    assert not program.alive
    assert running.delete() == []
    assert not second.alive


def test_another_program_that_deletes_the_machine_ends_it(
    running: QemuInstance, program: ProcessIdentity, make_cloud: CloudMaker
) -> None:
    other = make_cloud("other").get_instance(running.id)
    assert other.delete() == []
    assert not program.alive
    assert not running.instance_dir.exists()


def test_program_that_was_left_alone_ends_at_the_next_start(
    running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its QEMU ended when nobody was there to take note."""
    rundir = running.machine.rundir
    running.machine.kill()
    with subprocess.Popen(["sleep", "1000"]) as left:
        identity = ProcessIdentity.find(left.pid)
        assert identity is not None
        rundir.write_programs([identity])
        running.start(wait=False)
        assert left.wait(20) == -signal.SIGTERM
    assert rundir.find_programs() != [identity]


def test_program_that_cannot_be_executed_is_named_and_nothing_is_left(
    cloud: Qemu, tiny_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, Echo(("/no/such/program", "{fd}")))
    with pytest.raises(CloudError, match="/no/such/program"):
        cloud.launch(str(tiny_image), SMALL)
    assert cloud.created_instances == []
    assert list(cloud.parent_dir.glob("[!.]*")) == []


def test_program_is_ended_when_qemu_does_not_start(
    cloud: Qemu, tiny_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CloudError):
        cloud.launch(str(tiny_image), SMALL, launch_args=["-no-such-option"])
    assert list(cloud.parent_dir.glob("[!.]*")) == []
    assert becomes(lambda: not servers())


def test_program_that_ends_by_itself_is_reported(
    running: QemuInstance, program: ProcessIdentity, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        os.kill(program.pid, signal.SIGKILL)
        assert becomes(lambda: "echo of" in caplog.text)
    assert running.name in caplog.text


def test_copy_has_a_program_of_its_own(
    cloud: Qemu, running: QemuInstance, program: ProcessIdentity
) -> None:
    copy = cloud.launch(str(save(running).image))
    (own,) = copy.machine.rundir.find_programs()
    assert own.alive
    assert own != program
    assert copy.delete() == []
    assert not own.alive
    assert program.alive


def test_damaged_record_is_no_obstacle(
    running: QemuInstance, program: ProcessIdentity, caplog: pytest.LogCaptureFixture
) -> None:
    (running.instance_dir / "programs.json").write_text("{")
    assert running.delete() == []
    assert "programs.json is damaged" in caplog.text
    assert becomes(lambda: not program.alive)


def test_program_goes_with_one_that_crashes(working_dir: Path, tiny_image: Path) -> None:
    code = (
        "import io, os, signal, sys\n"
        "from pycloudlib import Qemu\n"
        "from tests.qemu.vm.test_programs import Echo, MachineSpec\n"
        "parts = MachineSpec.parts.fget\n"
        "MachineSpec.parts = property(lambda spec: (*parts(spec), Echo()))\n"
        "cloud = Qemu('t', config_file=io.StringIO(sys.argv[1]))\n"
        f"vm = cloud.launch(sys.argv[2], '{SMALL}')\n"
        "print(*(one.pid for one in vm.machine.rundir.find_programs()), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    config = f'[qemu]\nworking_dir = "{working_dir}"\naccelerator = "tcg"\n'
    done = subprocess.run(
        [sys.executable, "-c", code, config, str(tiny_image)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)
    assert becomes(lambda: ProcessIdentity.find(pid) is None)
