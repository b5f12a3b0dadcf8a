"""The time limit of a wait, passed down from call to call."""

from __future__ import annotations

import contextlib
import numbers
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

_LONGEST = 1e9  # seconds, some thirty years: the system's own waits accept no more


@dataclass(frozen=True, slots=True)
class Deadline:
    """A limit for a wait.

    Attributes:
        started: When the wait began, in `time.monotonic` seconds.
        limit: How long it may take, in seconds.
    """

    started: float
    limit: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """Make the deadline that many seconds from now."""
        return cls(time.monotonic(), min(seconds, _LONGEST))

    @property
    def elapsed(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self.started

    @property
    def remaining(self) -> float:
        """Seconds that are left, never less than 0."""
        return max(0.0, self.limit - self.elapsed)

    @property
    def expired(self) -> bool:
        """Whether no time is left."""
        return self.remaining == 0.0

    def capped(self, seconds: float) -> float:
        """Return the time for one step of the wait: at most `seconds`, never past the deadline."""
        return min(seconds, self.remaining)


def capped(seconds: float, deadline: Deadline | None) -> float:
    """Return the time for one step of a wait, see `Deadline.capped`; None is no deadline."""
    return seconds if deadline is None else deadline.capped(seconds)


def positive(what: str, value: object, unit: str) -> float:
    """Check that a given limit is a positive number, and return it.

    Args:
        what: Its name, for the error.
        value: The limit.
        unit: Its unit, for the error.

    Raises:
        ValueError: It is not a number above 0.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number: Any = value  # mypy knows no comparison of numbers.Real
        if number > 0:
            return float(min(number, _LONGEST))
    raise ValueError(f"{what} is {value!r}, expected a positive number of {unit}")


# The hooks that clients override take no deadline, so a context variable passes it to them.
_current: ContextVar[Deadline | None] = ContextVar("current", default=None)


@contextlib.contextmanager
def use_deadline(deadline: Deadline) -> Iterator[Deadline]:
    """Set the deadline that the hooks called inside keep to."""
    token = _current.set(deadline)
    try:
        yield deadline
    finally:
        _current.reset(token)


def current_deadline() -> Deadline | None:
    """Return the deadline of the wait that the caller is part of, if any."""
    return _current.get()


def command_limit(timeout: float | None) -> float | None:
    """Return the seconds that a command may take: `timeout`, else what its wait has left."""
    deadline = current_deadline()
    return deadline.remaining if timeout is None and deadline is not None else timeout
