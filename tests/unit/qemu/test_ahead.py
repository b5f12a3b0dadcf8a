"""Machines that are started ahead: taken, given back, dropped while they start; and pools."""

from __future__ import annotations

import multiprocessing
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pycloudlib.qemu.ahead import MachineAhead, Pool
from pycloudlib.qemu.host.budget import Budget, Capacity
from pycloudlib.qemu.host.ownership import Orphans, Ownership
from pycloudlib.qemu.launching import admission
from pycloudlib.qemu.vm.running import State

ONE = Capacity(1, 512)
LIMIT = 30


def ignore(_holders: str) -> None:
    pass


@dataclass(eq=False)
class FakeMachine:
    """Has a directory until it is deleted."""

    name: str
    instance_dir: Path
    cloud: FakeCloud
    state: State = State.RUNNING
    ready: threading.Event = field(default_factory=threading.Event)
    deleted: threading.Event = field(default_factory=threading.Event)

    @property
    def machine(self) -> SimpleNamespace:
        return SimpleNamespace(state=self.state)

    def wait(self) -> None:
        assert self.ready.wait(LIMIT)
        if self.deleted.is_set():
            raise RuntimeError("it has ended")

    def delete(self) -> list[Exception]:
        self.deleted.set()
        self.ready.set()
        if self in self.cloud.created_instances:
            self.cloud.created_instances.remove(self)
        admission.release(self.instance_dir)
        return []


@dataclass(eq=False)
class FakeCloud:
    """Launches such machines; those of a pool are ready at once, unless it is slow."""

    directory: Path
    tag: str = "pool"
    orphans: Orphans = Orphans.KEEP
    slow: bool = False
    failing: bool = False
    created_instances: list[Any] = field(default_factory=list)

    def launch(self, name: str) -> Any:
        if self.failing:
            raise RuntimeError("no machine today")
        directory = self.directory / name
        directory.mkdir()
        machine = FakeMachine(name, directory, self)
        if not self.slow:
            machine.ready.set()
        self.created_instances.append(machine)
        return machine


@pytest.fixture
def budget(tmp_path: Path) -> Budget:
    """Give a budget in which two machines fit."""
    return Budget(tmp_path / "budget", Capacity(2, 1024), LIMIT)


@pytest.fixture
def cloud(tmp_path: Path) -> FakeCloud:
    return FakeCloud(tmp_path)


def start(budget: Budget, cloud: FakeCloud) -> tuple[MachineAhead, Any]:
    machine = cloud.launch("ahead")

    def begin() -> Any:
        machine.wait()
        return machine

    ahead = MachineAhead.start("ahead", budget, ONE, begin, machine.delete)
    assert ahead is not None
    return ahead, machine


def count_free(budget: Budget) -> int:
    """Count how many machines fit beside those that there are."""
    spares = []
    while (spare := budget.try_spare(ONE, lambda: None)) is not None:
        spares.append(spare)
    for spare in spares:
        spare.release()
    return len(spares)


def test_machine_is_taken_with_its_room(budget: Budget, cloud: FakeCloud) -> None:
    ahead, machine = start(budget, cloud)
    assert count_free(budget) == 1

    taken: Any = ahead.take()

    assert taken[0] is machine
    assert count_free(budget) == 1
    taken[1].close()
    assert count_free(budget) == 2
    assert not machine.deleted.is_set()


def test_machine_that_failed_is_not_taken(budget: Budget, cloud: FakeCloud) -> None:
    cloud.slow = True
    ahead, machine = start(budget, cloud)
    machine.deleted.set()
    machine.ready.set()

    assert ahead.take() is None

    assert count_free(budget) == 2


def test_machine_that_ended_meanwhile_is_not_taken(budget: Budget, cloud: FakeCloud) -> None:
    ahead, machine = start(budget, cloud)
    machine.state = State.OFF

    assert ahead.take() is None

    assert machine.deleted.is_set()
    assert count_free(budget) == 2


def test_machine_that_is_being_started_is_dropped(budget: Budget, cloud: FakeCloud) -> None:
    cloud.slow = True
    ahead, machine = start(budget, cloud)

    ahead.drop()
    ahead.drop()

    assert machine.deleted.is_set()
    assert ahead.is_dropped
    assert ahead.take() is None
    assert count_free(budget) == 2


def test_machine_is_ended_once_it_can_be(budget: Budget) -> None:
    tried = threading.Event()
    ended: list[str] = []

    def begin() -> Any:
        assert tried.wait(LIMIT)
        ended.append("made")
        return None

    def undo() -> None:
        tried.set()
        if not ended:
            raise RuntimeError("it is not there yet")
        ended.append("ended")

    ahead = MachineAhead.start("slow", budget, ONE, begin, undo)
    assert ahead is not None

    ahead.drop()

    assert ended[0] == "made"
    assert ended[-1] == "ended"


def test_others_who_wait_get_its_room(budget: Budget, cloud: FakeCloud) -> None:
    cloud.slow = True
    ahead, machine = start(budget, cloud)

    with budget.reserving(Capacity(2, 1024), ignore):
        assert machine.deleted.is_set()
        assert ahead.take() is None


def test_nothing_is_started_without_room(budget: Budget) -> None:
    def begin() -> Any:
        raise AssertionError("it was not to be started")

    with budget.reserving(Capacity(2, 1024), ignore):
        assert MachineAhead.start("none", budget, ONE, begin, begin) is None


def test_nothing_is_started_where_no_thread_can_be(
    budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_thread = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("ahead"):
            raise RuntimeError("can't start new thread")
        start_thread(thread)

    monkeypatch.setattr(threading.Thread, "start", start)

    def begin() -> Any:
        raise AssertionError("it was not to be started")

    assert MachineAhead.start("none", budget, ONE, begin, begin) is None
    assert count_free(budget) == 2


def test_interrupted_wait_ends_the_machine(budget: Budget, cloud: FakeCloud) -> None:
    machine = cloud.launch("ahead")

    def begin() -> Any:
        raise KeyboardInterrupt  # as the wait for it would be

    ahead = MachineAhead.start("ahead", budget, ONE, begin, machine.delete)
    assert ahead is not None

    with pytest.raises(KeyboardInterrupt):
        ahead.take()

    assert machine.deleted.is_set()
    assert count_free(budget) == 2


def make_pool(cloud: FakeCloud, budget: Budget, size: int = 1) -> Pool:
    fake: Any = cloud
    return Pool(fake, cloud.launch, size, ONE, budget)


def test_pool_starts_the_next_when_one_is_taken(budget: Budget, cloud: FakeCloud) -> None:
    with make_pool(cloud, budget) as pool:
        first: Any = pool.take()
        second: Any = pool.take()
        assert first is not second
        assert Ownership.find(first.instance_dir).orphans is Orphans.KEEP  # type: ignore[union-attr]
        assert not first.deleted.is_set()

    assert cloud.created_instances == [first, second]
    assert count_free(budget) == 0
    second.delete()
    assert count_free(budget) == 1


def test_machines_that_wait_end_with_the_program(budget: Budget, cloud: FakeCloud) -> None:
    with make_pool(cloud, budget, 2):
        while len(cloud.created_instances) < 2 or not all(
            Ownership.find(machine.instance_dir) for machine in cloud.created_instances
        ):
            threading.Event().wait(0.01)
        owned = [Ownership.find(machine.instance_dir) for machine in cloud.created_instances]

    assert [owner and owner.orphans for owner in owned] == [Orphans.REAP] * 2
    assert cloud.created_instances == []


def test_pool_takes_what_is_ready_first(budget: Budget, cloud: FakeCloud) -> None:
    cloud.slow = True
    with make_pool(cloud, budget, 2) as pool:
        while len(cloud.created_instances) < 2:
            threading.Event().wait(0.01)
        ready = cloud.created_instances[1]
        ready.ready.set()
        while not pool.ready:
            threading.Event().wait(0.01)

        assert pool.take() is ready

        ready.delete()


def test_pool_replaces_a_machine_that_has_ended(budget: Budget, cloud: FakeCloud) -> None:
    with make_pool(cloud, budget) as pool:
        while not cloud.created_instances:
            threading.Event().wait(0.01)
        dead = cloud.created_instances[0]
        dead.state = State.OFF

        taken: Any = pool.take()

        assert taken is not dead
        assert dead.deleted.is_set()


def test_pool_without_room_launches_when_it_is_asked(budget: Budget, cloud: FakeCloud) -> None:
    with budget.reserving(Capacity(2, 1024), ignore):
        pool = make_pool(cloud, budget)
        assert cloud.created_instances == []
    with pool:
        taken = pool.take()
        assert cloud.created_instances[0] is taken


def test_pool_whose_launches_fail_says_so(budget: Budget, cloud: FakeCloud) -> None:
    cloud.failing = True
    with make_pool(cloud, budget) as pool, pytest.raises(RuntimeError, match="no machine today"):
        pool.take()
    assert count_free(budget) == 2


def test_pool_is_refilled_after_its_room_was_wanted(budget: Budget, cloud: FakeCloud) -> None:
    with make_pool(cloud, budget) as pool:
        with budget.reserving(Capacity(2, 1024), ignore):
            assert cloud.created_instances == []
        first = pool.take()
        second = pool.take()
        assert first is not second


def test_pool_serves_threads(budget: Budget, cloud: FakeCloud) -> None:
    taken: list[Any] = []

    with make_pool(cloud, budget, 2) as pool:
        threads = [
            threading.Thread(target=lambda: taken.append(pool.take()), daemon=True)
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)

    assert len(set(map(id, taken))) == 4
    assert sorted(map(id, cloud.created_instances)) == sorted(map(id, taken))


def test_closed_pool_has_no_machines(budget: Budget, cloud: FakeCloud) -> None:
    pool = make_pool(cloud, budget, 2)
    pool.close()
    pool.close()

    assert cloud.created_instances == []
    assert count_free(budget) == 2
    with pytest.raises(ValueError, match="pool is closed"):
        pool.take()


def test_interrupted_end_is_done_by_the_next_one(budget: Budget, cloud: FakeCloud) -> None:
    machine = cloud.launch("ahead")
    interrupts = [KeyboardInterrupt()]

    def undo() -> None:
        if interrupts:
            raise interrupts.pop()
        machine.delete()

    ahead = MachineAhead.start("ahead", budget, ONE, lambda: machine, undo)
    assert ahead is not None
    with pytest.raises(KeyboardInterrupt):
        ahead.drop()
    assert not ahead.has_ended

    with budget.reserving(Capacity(2, 1024), ignore):  # has it dropped again
        assert ahead.has_ended
        assert machine.deleted.is_set()


def test_interrupted_close_of_a_pool_is_done_by_the_next_one(
    budget: Budget, cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(cloud, budget, 2)

    def interrupt(ahead: MachineAhead) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MachineAhead, "drop", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pool.close()

    pool.close()

    assert cloud.created_instances == []
    assert count_free(budget) == 2


def _use_in_child(ahead: MachineAhead, pool: Pool) -> None:
    pool.close()
    ahead.drop()
    os._exit(0 if ahead.take() is None else 1)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child_ends_nothing(budget: Budget, cloud: FakeCloud) -> None:
    cloud.slow = True
    ahead, machine = start(budget, cloud)
    pool = make_pool(cloud, budget)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_use_in_child, args=(ahead, pool))

    child.start()
    child.join(LIMIT)

    try:
        assert child.exitcode == 0
        assert not machine.deleted.is_set()
    finally:
        child.kill()
        pool.close()
        ahead.drop()
