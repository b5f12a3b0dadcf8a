"""Reports of long work to its caller, and their display where there is no callback."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich import progress as bars


@dataclass(frozen=True, slots=True)
class Progress:
    """One report of long work.

    Attributes:
        activity: What is being done, in the present participle ("unpacking packages").
        detail: What happens just now; may be empty.
        done: How much is done, in `unit`; None if unknown.
        total: How much there is to do, in `unit`; None if unknown.
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
    """Ignore a report: the default callback."""


_LOG_INTERVAL = 15.0
_MIB = 1 << 20


@contextlib.contextmanager
def showing_progress(
    asked_for: ProgressCallback | None, log: logging.Logger
) -> Iterator[ProgressCallback]:
    """Yield the callback for long work: the caller's, or one that shows the progress.

    Nothing is shown before the first report.

    Args:
        asked_for: The caller's callback, if any.
        log: Used if standard error is not a terminal.
    """
    if asked_for is not None:
        yield asked_for
    elif sys.stderr.isatty():
        with contextlib.ExitStack() as stack:
            yield _Bars(stack)
    else:
        yield _LogLines(log)


class _Bars:
    """Shows a bar for bytes, and steps that follow each other on one line.

    Most work has nothing to do: the display, and the library for it, are loaded with the first
    report.

    Args:
        stack: Ends the display.
    """

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._display: bars.Progress | None = None
        self._tasks: dict[tuple[str, str], bars.TaskID] = {}

    def __call__(self, report: Progress) -> None:
        display = self._display = self._display or self._stack.enter_context(_open_display())
        counted = report.done is not None and report.unit == "B"
        name = (report.activity, report.detail if counted else "")
        if name not in self._tasks:
            for task in self._tasks.values():
                display.update(task, visible=False)
            self._tasks[name] = display.add_task("", total=None, amount="")
        display.update(
            self._tasks[name],
            description=f"{report.activity} {report.detail}"[:60],
            total=report.total,
            completed=report.done,
            amount=_amount(report) if counted else "",
            visible=True,
        )


def _open_display() -> bars.Progress:
    from rich import progress as bars  # noqa: PLC0415 - heavy
    from rich.console import Console  # noqa: PLC0415 - heavy

    return bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TextColumn("{task.fields[amount]}"),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


class _LogLines:
    """Logs each new activity, and its progress every 15 s."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._latest = ("", "")
        self._begun = (0.0, 0.0)  # when, and how much was done already
        self._told = 0.0

    def __call__(self, report: Progress) -> None:
        now = time.monotonic()
        name = (report.activity, report.detail if report.unit == "B" else "")
        if name != self._latest:
            self._latest, self._begun = name, (now, report.done or 0.0)
        elif now - self._told < _LOG_INTERVAL:
            return
        self._told = now
        self._log.info("%s", self._describe(report, now))

    def _describe(self, report: Progress, now: float) -> str:
        words = [report.activity, report.detail]
        if report.done is not None and report.unit == "B":
            words.append(_amount(report))
            begun, before = self._begun
            rate = (report.done - before) / (now - begun) if now > begun else 0
            if rate:
                words.append(f"({rate / _MIB:.1f} MiB/s{_time_left(report, rate)})")
        elif report.done is not None and report.total:
            words.append(f"{report.done / report.total:.0%}")
        return " ".join(filter(None, words))


def _amount(report: Progress) -> str:
    done = (report.done or 0) / _MIB
    return f"{done:.0f} of {report.total / _MIB:.0f} MiB" if report.total else f"{done:.0f} MiB"


def _time_left(report: Progress, rate: float) -> str:
    if not report.total or report.done is None:
        return ""
    return f", {(report.total - report.done) / rate:.0f} s left"
