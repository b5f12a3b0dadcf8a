"""The steps of a launch, with a fake that begins: their order, and what is undone."""

from __future__ import annotations

from pathlib import Path

import pytest

from pycloudlib.errors import InstanceExistsError
from pycloudlib.qemu.launching.beginning import Host
from pycloudlib.qemu.launching.launcher import Launcher
from pycloudlib.qemu.launching.login import OwnKeys
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.vm.process import PortTakenError
from tests.unit.qemu.launching.fakes import (
    FakeBeginning,
    FakeInstance,
    Registered,
    make_launcher,
)

STEPS = ["hold", "login", "files", "describe", "switch on", "let go"]


@pytest.fixture
def registered() -> Registered:
    return Registered()


@pytest.fixture
def launcher(host: Host, tmp_path: Path, registered: Registered) -> Launcher[FakeInstance]:
    return make_launcher(host, tmp_path, registered)


def leases(host: Host) -> list[str]:
    directory = host.ports.directory
    return sorted(file.name for file in directory.glob("[0-9]*")) if directory.exists() else []


def test_steps_follow_each_other_and_the_machine_is_registered(
    launcher: Launcher[FakeInstance],
    registered: Registered,
    host: Host,
) -> None:
    beginning = FakeBeginning()

    instance = launcher.start(beginning, "me")

    assert beginning.steps == STEPS
    assert registered.instances == [instance]
    rundir = instance.machine.rundir
    assert rundir.path == launcher.parent_dir / "vm"
    assert rundir.read_spec() == instance.machine.spec
    assert rundir.read_login().username == "me"
    assert leases(host)


@pytest.mark.parametrize("failing", STEPS[:-1])
@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_nothing_is_left_of_a_launch_whose_step_fails(
    failing: str,
    error: BaseException,
    launcher: Launcher[FakeInstance],
    registered: Registered,
    host: Host,
) -> None:
    beginning = FakeBeginning(failing=failing, error=error)

    with pytest.raises(type(error)):
        launcher.start(beginning, None)

    assert beginning.steps[-2 if failing != "hold" else -1] == failing
    assert registered.instances == []
    assert not launcher.parent_dir.exists()
    assert leases(host) == []


def test_port_that_is_taken_is_another_at_the_next_try(
    launcher: Launcher[FakeInstance],
) -> None:
    class Late(FakeBeginning):
        def switch_on(self, machine: object) -> None:
            super().switch_on(machine)  # type: ignore[arg-type]
            if self.steps.count("switch on") < 3:
                raise PortTakenError("taken")

    beginning = Late()
    launcher.start(beginning, None)
    assert beginning.steps.count("describe") == 3


def test_name_of_another_is_refused_and_that_one_stays(
    launcher: Launcher[FakeInstance],
) -> None:
    launcher.start(FakeBeginning(), None)
    with pytest.raises(InstanceExistsError):
        launcher.start(FakeBeginning(), None)
    assert RunDirectory(launcher.parent_dir / "vm").read_spec().name == "vm"


class TestOwnKeys:
    def test_key_goes_with_the_object_and_machines_have_a_copy(self, tmp_path: Path) -> None:
        keys = OwnKeys(tmp_path / "cloud")
        key = keys.make("me")
        rundir = RunDirectory(tmp_path / "vm")
        rundir.path.mkdir()
        kept = keys.for_machine(key, rundir)

        assert keys.holds(key)
        assert not keys.holds(kept)
        assert kept.public_key_content == key.public_key_content
        assert kept.private_key_path == str(rundir.path / "id_ed25519")
        assert Path(str(kept.private_key_path)).stat().st_mode & 0o777 == 0o600
        del keys
        assert not (tmp_path / "cloud").exists()
        assert Path(str(kept.private_key_path)).exists()

    def test_key_that_is_removed_is_held_no_more(self, tmp_path: Path) -> None:
        keys = OwnKeys(tmp_path / "cloud")
        key = keys.make("me")
        keys.remove()
        keys.remove()
        assert not keys.holds(key)
        assert not (tmp_path / "cloud").exists()

    def test_key_of_the_user_stays_where_it_is(self, tmp_path: Path) -> None:
        other = OwnKeys(tmp_path / "other").make("me")
        keys = OwnKeys(tmp_path / "cloud")
        assert not keys.holds(other)
        assert not keys.holds(None)
        assert keys.for_machine(other, RunDirectory(tmp_path / "vm")) is other
