"""One point in time by which something has to have happened, handed down from call to call."""

from __future__ import annotations

import time
from dataclasses import dataclass


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
        return cls(time.monotonic(), seconds)

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
        """Whether the time is over."""
        return self.remaining == 0.0

    def capped(self, seconds: float) -> float:
        """Give the time for one step of the wait: at most `seconds`, never past the deadline."""
        return min(seconds, self.remaining)
