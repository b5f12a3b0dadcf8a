"""The machines that tests share, with those that are got ready for the tests that come next."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pycloudlib.pytest_plugin.ahead import Asked, Case, Wanted
from pycloudlib.pytest_plugin.machines import InUse, Machines, commands_for
from pycloudlib.qemu.ahead import MachineAhead
from pycloudlib.qemu.host.budget import Budget, Capacity
from pycloudlib.qemu.host.ownership import Orphans
from pycloudlib.qemu.vm.running import State

LIMIT = 30


@dataclass(eq=False)
class FakeMachine:
    """Has a directory until it is deleted; counts how often it returned to its beginning."""

    name: str
    instance_dir: Path
    cloud: FakeCloud
    state: State = State.RUNNING
    returns: int = 0

    @property
    def machine(self) -> Any:
        spec = SimpleNamespace(instance_type=SimpleNamespace(memory_mib=64))
        return SimpleNamespace(state=self.state, kill=self.kill, spec=spec)

    def kill(self) -> None:
        self.state = State.OFF

    def wait(self) -> None:
        pass

    def rollback(self, _image: str) -> None:
        self.returns += 1
        self.state = State.RUNNING

    def delete(self) -> list[Exception]:
        self.kill()
        if self.instance_dir.is_dir():
            self.instance_dir.rmdir()
            self.cloud.forget(self)
        return []


@dataclass(eq=False)
class FakeCloud:
    """Launches such machines. What stands in for one is there when nothing holds it back."""

    image_dir: Path
    orphans: Orphans = Orphans.KEEP
    created_instances: list[Any] = field(default_factory=list)
    launched: list[dict[str, Any]] = field(default_factory=list)
    held_back: threading.Event = field(default_factory=threading.Event)

    def launch(self, _image: str, *, name: str, **options: Any) -> Any:
        self.launched.append(options)
        return self.make(name, name)

    def stand_in(self, _image: str) -> Any:
        name: str = self.created_instances[0].name
        assert self.held_back.wait(LIMIT)
        return self.make(name, f"{name}-other")

    def make(self, name: str, directory: str) -> FakeMachine:
        (self.image_dir / directory).mkdir()
        machine = FakeMachine(name, self.image_dir / directory, self)
        self.created_instances.append(machine)
        return machine

    def snapshot(self, _machine: FakeMachine, *, memory: bool) -> str:
        return "start" if memory else ""

    def forget(self, machine: FakeMachine) -> None:
        self.created_instances.remove(machine)


@pytest.fixture
def cloud(tmp_path: Path) -> FakeCloud:
    cloud = FakeCloud(tmp_path)
    cloud.held_back.set()
    return cloud


@pytest.fixture
def number() -> int:
    """Return for how many tests machines are started ahead."""
    return 1


@pytest.fixture
def machines(tmp_path: Path, cloud: FakeCloud, number: int) -> Iterator[Machines]:
    fake: Any = cloud
    budget = Budget(tmp_path / "budget", Capacity(4, 1000), LIMIT)
    machines = Machines(fake, budget, "c1m64", lambda _holders: None, 100, number)
    yield machines
    machines.ahead.close()


@pytest.fixture
def wanted(tmp_path: Path) -> Wanted:
    (tmp_path / "plain.img").touch()
    return Wanted(str(tmp_path / "plain.img"))


def case(name: str, kind: str = "shared") -> Case:
    return Case(name, name, kind)


@dataclass
class Runner:
    """Runs tests step by step, as pytest does, each of which uses the shared machine."""

    machines: Machines
    wanted: Wanted

    def set_up(self, name: str, following: str = "") -> tuple[InUse, Any]:
        """Begin a test; the next one's machine is started when this one's was, or after it."""
        present, coming = case(name), [case(following)] if following else []
        ahead = self.machines.ahead
        if ahead.has(name):
            ahead.start_for(coming, name)
        in_use = InUse(name, present)
        machine = self.machines.share(self.wanted, in_use)
        ahead.start_for(coming)
        return in_use, machine

    def run(self, name: str, following: str = "") -> Any:
        """Run a test that does nothing."""
        in_use, machine = self.set_up(name, following)
        in_use.ending.close()
        return machine


@pytest.fixture
def runner(machines: Machines, wanted: Wanted) -> Runner:
    return Runner(machines, wanted)


def test_two_tests_that_come_next_have_different_machines(runner: Runner, cloud: FakeCloud) -> None:
    first = runner.run("1")
    # While a test runs that does not use it, so that this one is got ready itself.
    runner.machines.ahead.start_for([case("2")])

    in_use, second = runner.set_up("2", "3")
    returns = second.returns
    third = runner.machines.ahead.take(Asked(runner.wanted, shared=True), case("3"))

    assert second is first
    assert third is not None
    assert third[0] is not second
    assert second.returns == returns, "it returned to its beginning while a test used it"
    third[1].close()
    in_use.ending.close()
    assert len(cloud.created_instances) == 2


def test_machine_that_was_given_back_is_not_the_next_tests(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.run("1", "2")
    runner.machines.ahead.start_for([case("3")], "2")
    with monkeypatch.context() as patch:
        patch.setattr(MachineAhead, "take", lambda ahead: ahead.drop())
        in_use, second = runner.set_up("2", "3")

    third = runner.run("3")

    assert third is not second
    assert second.state is State.RUNNING
    in_use.ending.close()


@pytest.mark.parametrize("number", [3])
def test_three_that_come_next_are_two_at_once(runner: Runner, cloud: FakeCloud) -> None:
    in_use, _ = runner.set_up("1")
    runner.machines.ahead.start_for([case("2"), case("3"), case("4")])
    assert [runner.machines.ahead.has(name) for name in "234"] == [True, False, False]
    in_use.ending.close()
    runner.run("2")
    assert len(cloud.created_instances) == 2


@pytest.fixture
def late(cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what stands in only be there when it is asked for, or not wanted any more."""
    cloud.held_back.clear()
    for name in ("take", "drop"):
        method = getattr(MachineAhead, name)

        def let_go(ahead: MachineAhead, method: Any = method) -> Any:
            cloud.held_back.set()
            return method(ahead)

        monkeypatch.setattr(MachineAhead, name, let_go)


@pytest.mark.usefixtures("late")
def test_shared_machine_is_deleted_while_the_other_one_starts(
    runner: Runner, cloud: FakeCloud
) -> None:
    in_use, first = runner.set_up("1", "2")
    assert first.delete() == []
    in_use.ending.close()

    second = runner.run("2")

    assert second.name != first.name
    assert cloud.created_instances == [second]


@pytest.mark.usefixtures("late")
def test_shared_machine_is_kept_while_the_other_one_starts(
    runner: Runner, cloud: FakeCloud
) -> None:
    in_use, first = runner.set_up("1", "2")
    assert runner.machines.keep(first, in_use)
    in_use.ending.close()

    second = runner.run("2")

    assert first.state is State.RUNNING
    assert second.name != first.name
    assert cloud.created_instances == [second]


def test_kept_machine_is_named_by_its_directory(runner: Runner) -> None:
    first = runner.run("1", "2")
    second = runner.run("2")
    assert first.name == second.name

    assert f"/{second.instance_dir.name}\n" in commands_for(second)


def test_machine_ahead_does_not_wait_for_what_it_has_reserved(
    machines: Machines, wanted: Wanted, cloud: FakeCloud
) -> None:
    in_use = InUse("1", case("1", "own"))
    machines.make(wanted, in_use, {"wait_for_room": True})
    machines.ahead.start_for([case("2", "own")])

    taken = machines.ahead.take(Asked(wanted, {"wait_for_room": True}), case("2", "own"))

    assert taken is not None
    taken[1].close()
    in_use.ending.close()
    assert [options["wait_for_room"] for options in cloud.launched] == [True, False]
