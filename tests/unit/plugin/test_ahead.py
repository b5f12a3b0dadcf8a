"""What the plugin starts ahead: what tests of one kind asked for before."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import pytest

from pycloudlib.pytest_plugin.ahead import Ahead, Asked, Case, Wanted, find_next

ONE, OTHER = Asked(Wanted("one")), Asked(Wanted("other"))


@dataclass(eq=False)
class FakeAhead:
    """A machine that was started; notes what becomes of it."""

    asked: Asked
    test: str
    fate: str = "waits"

    def take(self) -> Any:
        self.fate = "taken"
        return self, contextlib.ExitStack()

    def drop(self) -> None:
        self.fate = "dropped"


@dataclass
class Starting:
    """Starts such machines, for as many as there is room."""

    room: int = 100
    started: list[FakeAhead] = field(default_factory=list)

    def __call__(self, asked: Asked, test: Case) -> Any:
        if len(self.started) >= self.room:
            return None
        self.started.append(FakeAhead(asked, test.id))
        return self.started[-1]

    @property
    def fates(self) -> list[tuple[str, str]]:
        return [(machine.test, machine.fate) for machine in self.started]


def case(name: str, kind: Hashable = "a") -> Case:
    return Case(name, name, kind)


def run(ahead: Ahead, tests: list[Case], asked: list[Asked]) -> None:
    """Run tests, each of which asks for one machine."""
    for number, (test, wanted) in enumerate(zip(tests, asked, strict=True)):
        ahead.take(wanted, test)
        ahead.start_for(tests[number + 1 :])
        ahead.end(test.id)


def test_next_test_gets_what_the_last_one_asked_for() -> None:
    starting = Starting()

    run(Ahead(starting, 1), [case("1"), case("2"), case("3")], [ONE] * 3)

    assert [machine.asked for machine in starting.started] == [ONE] * 2
    assert starting.fates == [("2", "taken"), ("3", "taken")]


def test_wrong_guess_is_dropped_and_not_repeated_at_once() -> None:
    starting = Starting()
    tests = [case(str(number)) for number in range(6)]

    run(Ahead(starting, 1), tests, [ONE, OTHER, ONE, ONE, ONE, ONE])

    assert starting.fates == [("1", "dropped"), ("4", "taken"), ("5", "taken")]


def test_tests_of_other_kinds_have_their_own_habits() -> None:
    starting = Starting()
    tests = [case("1"), case("2", "b"), case("3"), case("4", "b")]

    run(Ahead(starting, 1), tests, [ONE, OTHER, ONE, OTHER])

    assert starting.fates == [("3", "taken"), ("4", "taken")]


def test_second_machine_of_a_test_is_not_what_was_started() -> None:
    starting = Starting()
    ahead = Ahead(starting, 1)
    ahead.take(ONE, case("1"))
    ahead.start_for([case("2")])

    assert ahead.take(ONE, case("2")) is not None
    assert ahead.take(ONE, case("2")) is None


def test_test_that_asks_for_nothing_leaves_nothing() -> None:
    starting = Starting()
    ahead = Ahead(starting, 1)
    ahead.take(ONE, case("1"))
    ahead.start_for([case("2")])

    ahead.end("2")

    assert starting.fates == [("2", "dropped")]


def test_next_one_is_started_beside_one_that_is_not_asked_for_yet() -> None:
    starting = Starting()
    ahead = Ahead(starting, 1)
    ahead.take(ONE, case("1"))
    ahead.start_for([case("2")])
    assert ahead.has("2")

    ahead.start_for([case("3")], "2")
    ahead.take(ONE, case("2"))

    assert not ahead.has("2")
    assert starting.fates == [("2", "taken"), ("3", "waits")]


def test_tests_that_run_in_another_order_are_followed() -> None:
    starting = Starting()
    ahead = Ahead(starting, 1)
    ahead.take(ONE, case("1"))
    ahead.start_for([case("2")])

    ahead.start_for([case("3")])
    ahead.start_for([])

    assert starting.fates == [("2", "dropped"), ("3", "dropped")]


@pytest.mark.parametrize(("number", "room", "count"), [(0, 9, 0), (2, 9, 2), (9, 9, 4), (9, 3, 3)])
def test_so_many_are_started_as_are_asked_for_and_fit(number: int, room: int, count: int) -> None:
    starting = Starting(room)
    ahead = Ahead(starting, number)
    ahead.take(ONE, case("0"))

    ahead.start_for([case(str(number)) for number in range(1, 5)])
    ahead.start_for([case(str(number)) for number in range(1, 5)])

    assert starting.fates == [(str(number + 1), "waits") for number in range(count)]
    ahead.close()
    assert all(fate == "dropped" for _test, fate in starting.fates)


def test_tests_that_use_machines_are_found(pytester: pytest.Pytester) -> None:
    items = pytester.getitems(
        """
        import pytest

        @pytest.fixture
        def web(vm_factory): return vm_factory()

        def test_plain(): pass

        def test_vm(vm): pass

        @pytest.mark.skip
        def test_skipped(vm): pass

        @pytest.mark.parametrize("number", [1, 2])
        def test_web(web, number): pass

        @pytest.mark.vm(image="other")
        def test_other(vm): pass
        """
    )

    found = list(find_next(items))

    assert [test.name for test in found] == ["test_vm", "test_web[1]", "test_web[2]", "test_other"]
    assert found[1].kind == found[2].kind
    assert len({test.kind for test in found}) == 3
