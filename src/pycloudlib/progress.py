"""What long work tells its caller while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """One report of long work.

    Attributes:
        activity: What is being done, in the present participle ("unpacking packages").
        detail: What happens just now; may be empty.
        done: How much is done, in `unit`; None when it cannot be told.
        total: How much there is to do, in `unit`; None when it cannot be told.
        unit: What `done` and `total` count ("B" for bytes, "step", "s").
    """

    activity: str
    detail: str = ""
    done: float | None = None
    total: float | None = None
    unit: str = ""


ProgressCallback = Callable[[Progress], None]
"""Called with each report, from the thread that does the work; it should return soon."""


def ignore_progress(_report: Progress) -> None:
    """Let a report go unheard: the default callback."""
