"""Machines for the tests that come next, started while the present one runs.

Which machine a test will ask for is not known before it does. But tests that use the same fixtures
and the same marker mostly ask for the same one. So what one of them asked for first is started
ahead for the next; after a wrong guess, only once two in a row have asked for the same.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from pycloudlib.qemu.ahead import MachineAhead
from pycloudlib.qemu.instance import QemuInstance

_FIXTURES = ("vm", "vm_factory", "shared_vm")


@dataclass(frozen=True, slots=True)
class Wanted:
    """The machine that a test wants.

    Attributes:
        image: The id of its image, or of a saved machine.
        instance_type: Its size; None for the default, or that of the saved machine.
        user_data: For cloud-init.
    """

    image: str
    instance_type: str | None = None
    user_data: str | bytes | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What a test has asked for.

    Attributes:
        wanted: The machine.
        options: Further options of its launch.
        shared: Whether it is one that tests use one after another.
    """

    wanted: Wanted
    options: Mapping[str, Any] = field(default_factory=dict)
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """A test, as far as machines are concerned.

    Attributes:
        id: Its node id.
        name: Its name, which begins the names of its machines.
        kind: Equal for tests that are expected to ask for the same machine.
    """

    id: str
    name: str
    kind: Hashable

    @classmethod
    def of(cls, item: pytest.Item) -> Case:
        """Return what there is to know of a test."""
        markers = tuple(repr(marker.kwargs) for marker in item.iter_markers("vm"))
        return cls(item.nodeid, item.name, (frozenset(_fixtures_of(item)), markers))


def find_next(items: Iterable[pytest.Item]) -> Iterator[Case]:
    """Find the tests that use a machine, of those that come next, in their order."""
    for item in items:
        uses_one = any(name in _fixtures_of(item) for name in _FIXTURES)
        if uses_one and item.get_closest_marker("skip") is None:
            yield Case.of(item)


def _fixtures_of(item: pytest.Item) -> Iterable[str]:
    fixtures: Iterable[str] = getattr(item, "fixturenames", ())
    return fixtures


@dataclass(slots=True)
class _Habit:
    """What tests of one kind ask for first.

    Attributes:
        asked: What the last one asked for.
        steady: Whether the next one is expected to ask for the same.
    """

    asked: Asked
    steady: bool = True


class Ahead:
    """The machines that are started ahead for tests.

    Args:
        start: Starts what a test is expected to ask for; returns None if there is no room for it.
        number: For how many tests at most.
    """

    def __init__(self, start: Callable[[Asked, Case], MachineAhead | None], number: int) -> None:
        self._start = start
        self._number = number
        self._habits: dict[Hashable, _Habit] = {}
        self._started: dict[str, tuple[Asked, MachineAhead]] = {}

    def take(self, asked: Asked, test: Case) -> tuple[QemuInstance, contextlib.ExitStack] | None:
        """Return the machine that was started for what a test asks for first; None without one.

        Returns:
            The machine, and its room in the budget until that is closed.
        """
        habit = self._habits.get(test.kind)
        self._habits[test.kind] = _Habit(asked, habit is None or habit.asked == asked)
        expected, ahead = self._started.pop(test.id, (asked, None))
        if ahead is None:
            return None
        if expected == asked:
            return ahead.take()
        ahead.drop()
        return None

    def has(self, test_id: str) -> bool:
        """Whether a machine was started for a test, which has not asked for one yet."""
        return test_id in self._started

    def start_for(self, tests: Iterable[Case], present: str = "") -> None:
        """Start machines for the tests that come next, and end those of others.

        Args:
            tests: The tests that use a machine, in their order.
            present: The test that runs, whose own machine stays, if it has not asked for it yet.
        """
        coming = {test.id: test for test in itertools.islice(tests, self._number)}
        for test_id in self._started.keys() - coming.keys() - {present}:
            self.end(test_id)
        for test in coming.values():
            habit = self._habits.get(test.kind)
            if test.id in self._started or habit is None or not habit.steady:
                continue
            ahead = self._start(habit.asked, test)
            if ahead is None:
                break
            self._started[test.id] = habit.asked, ahead

    def end(self, test_id: str) -> None:
        """End the machine that was started for a test, which has not asked for it."""
        _asked, ahead = self._started.pop(test_id, (None, None))
        if ahead is not None:
            ahead.drop()

    def close(self) -> None:
        """End all of them."""
        for test_id in list(self._started):
            self.end(test_id)
