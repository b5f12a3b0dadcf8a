from __future__ import annotations

import threading
import time
from fractions import Fraction
from typing import Any

import pytest

from pycloudlib._base.deadline import Deadline, positive


def began(seconds_ago: float, limit: float) -> Deadline:
    return Deadline(time.monotonic() - seconds_ago, limit)


def test_new_deadline_has_all_its_time() -> None:
    deadline = Deadline.after(1000)

    assert not deadline.expired
    assert deadline.limit == 1000
    assert 900 < deadline.remaining <= 1000
    assert 0 <= deadline.elapsed < 100


def test_time_passes() -> None:
    deadline = began(400, limit=1000)

    assert 400 <= deadline.elapsed < 500
    assert 500 < deadline.remaining <= 600


@pytest.mark.parametrize("limit", [0, -5, 10])
def test_time_that_is_over_is_never_negative(limit: float) -> None:
    deadline = began(20, limit)

    assert deadline.expired
    assert deadline.remaining == 0
    assert deadline.capped(5) == 0


def test_step_takes_what_it_asks_for_while_there_is_enough() -> None:
    assert Deadline.after(1000).capped(5) == 5


def test_step_never_goes_past_the_deadline() -> None:
    assert began(995, limit=1000).capped(60) <= 5


def test_wait_without_end_never_expires() -> None:
    deadline = Deadline.after(float("inf"))

    assert not deadline.expired
    assert deadline.capped(5) == 5


def test_deadline_cannot_be_moved() -> None:
    deadline = Deadline.after(1)

    with pytest.raises(AttributeError):
        deadline.limit = 5  # type: ignore[misc]


@pytest.mark.parametrize("wrong", [0, -1, 0.0, float("nan"), True, "5", None, b"5", [5], 1j])
def test_what_is_no_time_is_named(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"timeout is .*, expected a positive number of seconds"):
        positive("timeout", wrong, "seconds")


@pytest.mark.parametrize("value", [1, 0.001, Fraction(1, 3), 10**400, float("inf"), 1e300])
def test_times_of_any_kind_and_size_can_be_waited_for(value: Any) -> None:
    seconds = positive("timeout", value, "seconds")
    assert 0 < seconds < threading.TIMEOUT_MAX
    assert 0 < Deadline.after(float("inf")).remaining < threading.TIMEOUT_MAX
