"""How a course reports what it measures: one JSON object in a line of standard output each."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import TypeVar

from benchmarks.plan import in_turn
from benchmarks.results import Measurement

_T = TypeVar("_T")

STEP_LIMIT = 3600.0
"""Seconds that a step may take: enough for eight boots in emulation."""


class TimeUp(BaseException):
    """A step took longer than it may; no `except Exception` on the way stops it."""


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
    """Measures steps and reports the outcome.

    Args:
        wanted: Keys of the scenarios to measure.
        row: Row of the tables that the figures belong to.

    Attributes:
        row: The same, which a course may change.
    """

    def __init__(self, wanted: Sequence[str], row: str = "") -> None:
        self._wanted = frozenset(wanted)
        self.row = row
        # The real standard output is for measurements alone; what packages or a QEMU print goes
        # to standard error.
        self._out = os.dup(sys.stdout.fileno())
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def steps(self) -> Iterator[str]:
        """Return the steps that the driver asks for, one at a time; report the end of each."""
        for line in sys.stdin:
            yield line.strip()
            os.write(self._out, b"\n")

    def wants(self, *scenarios: str) -> bool:
        """Whether one of some scenarios is to be measured."""
        return not self._wanted.isdisjoint(scenarios)

    def record(self, scenario: str, *values: float, note: str = "") -> None:
        """Report what was measured."""
        self._write(Measurement(scenario, values, note=note, row=self.row))

    def fail(self, scenario: str, problem: str) -> None:
        """Report what happened instead."""
        self._write(Measurement(scenario, problem=problem, row=self.row))

    def time(
        self,
        scenario: str,
        step: Callable[[], _T],
        times: int = 1,
        *,
        since: float | None = None,
        undo: Callable[[_T], object] | None = None,
    ) -> _T:
        """Measure the seconds that a step takes; report them, or why it did not work.

        Args:
            scenario: Key of the scenario.
            step: What to do.
            times: How often.
            since: When that began which the step ends (`time.perf_counter()`); by default, with it.
            undo: What to do with each result; not measured.

        Returns:
            The last result.

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
        self.record(scenario, *values)
        return result

    def take_turns(
        self,
        ways: Mapping[str, Callable[[], _T]],
        rounds: int,
        undo: Callable[[_T], object] | None = None,
    ) -> None:
        """Measure several ways in turn, A B B A.

        Args:
            ways: The scenario of each way, and what to do.
            rounds: How often each.
            undo: What to do with the result of each; not measured.
        """
        wanted = [scenario for scenario in ways if self.wants(scenario)]
        for number in range(1, rounds + 1):
            for scenario in in_turn(wanted, number):
                self.time(scenario, ways[scenario], undo=undo)

    def _write(self, measurement: Measurement) -> None:
        if self.wants(measurement.scenario):
            os.write(self._out, (json.dumps(asdict(measurement)) + "\n").encode())


def describe(error: BaseException) -> str:
    """Describe an error in one line."""
    first = str(error).strip().partition("\n")[0][:160]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
