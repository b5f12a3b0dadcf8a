"""One point in time by which something has to have happened, handed down from call to call."""

from __future__ import annotations

import numbers
import time
from dataclasses import dataclass
from typing import Any

_LONGEST = 1e9  # seconds, some thirty years: what the system's own waits can do with


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
    """Read a limit that was given, as a number of seconds or minutes.

    Args:
        what: What it is called.
        value: What was given.
        unit: What it is a number of.

    Raises:
        ValueError: It is not a number above 0.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number: Any = value  # of what numbers.Real says, mypy knows no comparison
        if number > 0:
            return float(min(number, _LONGEST))
    raise ValueError(f"{what} is {value!r}, expected a positive number of {unit}")
