"""How a course tells what it measures: one JSON object in a line of standard output each."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import TypeVar

from benchmarks.measurements import Measurement
from benchmarks.plan import Plan

_T = TypeVar("_T")

STEP_LIMIT = 3600.0
"""Seconds that a step may take: eight boots in emulation fit in."""


class TimeUp(BaseException):
    """A step took longer than it may; no `except Exception` on the way holds it up."""


class StepFailedError(Exception):
    """A step did not work; what comes after it in the course cannot be measured."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """End what takes longer, by `TimeUp` in the main thread."""

    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    # Again and again: the first may be lost in a finalizer.
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Recorder:
    """Measures steps and tells what came of them.

    Args:
        wanted: Keys of the scenarios that are to be measured.
    """

    def __init__(self, wanted: Sequence[str]) -> None:
        self._wanted = frozenset(wanted)
        # What is measured has the real standard output for itself; what is printed by packages,
        # or by a QEMU, goes to standard error.
        self._out = os.dup(sys.stdout.fileno())
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def wants(self, *scenarios: str) -> bool:
        """Whether one of some scenarios is to be measured."""
        return not self._wanted.isdisjoint(scenarios)

    def tell(self, scenario: str, *values: float, note: str = "") -> None:
        """Tell what was measured."""
        self._write(Measurement(scenario, values, note=note))

    def fail(self, scenario: str, problem: str) -> None:
        """Tell what happened instead."""
        self._write(Measurement(scenario, problem=problem))

    def time(
        self,
        scenario: str,
        step: Callable[[], _T],
        times: int = 1,
        *,
        since: float | None = None,
        undo: Callable[[_T], object] | None = None,
    ) -> _T:
        """Measure how long a step takes, in seconds; tell it, or why it did not work.

        Args:
            scenario: Key of the scenario.
            step: What to do.
            times: How often.
            since: When that began which the step ends (`time.perf_counter()`); by default, with it.
            undo: What is done with what each time gave; not measured.

        Returns:
            What the last time gave.

        Raises:
            StepFailedError: It raised an error or took too long.
        """
        values = []
        try:
            with limit(STEP_LIMIT):
                for _ in range(times):
                    started = time.perf_counter() if since is None else since
                    result = step()
                    values.append(time.perf_counter() - started)
                    if undo is not None:
                        undo(result)
        except TimeUp:
            self.fail(scenario, f"not done within {STEP_LIMIT:.0f} s")
            raise StepFailedError(scenario) from None
        except Exception as error:
            traceback.print_exc()
            self.fail(scenario, describe(error))
            raise StepFailedError(scenario) from error
        self.tell(scenario, *values)
        return result

    def _write(self, measurement: Measurement) -> None:
        if self.wants(measurement.scenario):
            os.write(self._out, (json.dumps(asdict(measurement)) + "\n").encode())


def describe(error: BaseException) -> str:
    """Say what an error is, in one line."""
    first = str(error).strip().partition("\n")[0][:160]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def run_course(course: Callable[[Plan, Recorder], None]) -> None:
    """Run a course with the plan on the command line; its exit status is 0 if all was measured."""
    plan = Plan.from_argument(sys.argv[1])
    # Ctrl-C comes to the driver, which passes it on as this; SystemExit cleans up on its way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    try:
        course(plan, Recorder(plan.wanted))
    except StepFailedError as error:
        sys.exit(f"stopped at: {error}")
