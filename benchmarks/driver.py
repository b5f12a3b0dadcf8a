"""Runs the courses in turn, each in its own process, and keeps what they report."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

from benchmarks.plan import Plan
from benchmarks.processes import find_qemu
from benchmarks.report import Figure, write_figure, write_report
from benchmarks.results import Measurement, Results, Run
from benchmarks.scenarios import (
    BEFORE,
    BY_KEY,
    NAMES,
    NOW,
    OF_GUESTS,
    ORIGINAL,
    PROGRAMS,
)
from benchmarks.stage import ROOT, Stage, prepare
from pycloudlib._base.files import replace_atomically

# Seconds that a course may take to clean up after Ctrl-C.
_END_LIMIT = 60.0


class CourseFailedError(Exception):
    """A course ended before its end."""


class Driver:
    """Measures everything that is wanted.

    Args:
        name: Which program.
        plan: The options that it was given.

    Attributes:
        failed: Whether a course of this package failed.
    """

    def __init__(self, name: str, plan: Plan) -> None:
        self._name, self._program = name, PROGRAMS[name]
        self._plan = replace(plan, wanted=self._program.choose(plan.only, plan.skip))
        self._results = Results({})
        self._leftovers = 0
        self.failed = False

    def run(self) -> Results:
        """Run everything in turn; keep what was measured after each run."""
        program, plan = self._program, self._plan
        # Without the other version this one is measured alone.
        alone = BEFORE in program.sides and not plan.before
        sides = (plan.side,) if plan.side else (NOW,) if alone else program.sides
        order = program.turns(plan.rounds if program.repeats else 1, plan.wanted, sides)
        needed = dict.fromkeys(side for _, side, _ in order)
        stage = prepare(plan, needed, original=ORIGINAL in program.sides)
        facts = {"measured": program.title, **stage.list_facts(plan)}
        self._results = Results(facts)
        if plan.append and self._file(".json").exists():
            before = Results.read(self._file(".json"))
            # What is known of a side that is left out this time is kept.
            self._results = Results({**before.facts, **facts}, before.runs)
        if program.repeats:
            plan = replace(plan, rounds=1)
        for release in plan.release if program.by_release else plan.release[:1]:
            row = release if program.by_release else ""
            plan = replace(plan, image=stage.images.get(release, ""), row=row)
            if program.steps:
                for sized in self._list_sizes(plan):
                    with self._surviving(NOW):
                        self._measure_steps(stage, sized, sides)
                continue
            for number, side, course in order:
                print(f"round {number}, {NAMES[side]}, course {course!r} {row}", flush=True)
                with self._surviving(side):
                    self._measure(stage, side, replace(plan, course=course), number)
        return self._results

    @contextlib.contextmanager
    def _surviving(self, side: str) -> Iterator[None]:
        """Report a course that fails; what comes after it is measured."""
        try:
            yield
        except CourseFailedError as error:
            print(f"  {error}", flush=True)
            self.failed = self.failed or side != ORIGINAL

    def _measure(self, stage: Stage, side: str, plan: Plan, number: int) -> None:
        """Run a course and keep what it measured; also that of one that is interrupted."""
        log = self._find_log(side, plan.course, str(number), plan.row)
        with (
            self._keeping(side, plan.course, number) as measured,
            self._starting(stage, side, plan, log) as process,
        ):
            collect(process, log, measured)

    def _list_sizes(self, plan: Plan) -> list[Plan]:
        """Return a plan for each size of machines."""
        if not self._program.by_memory:
            return [plan]
        return [replace(plan, row=f"{mib} MiB", type=f"c1m{mib}") for mib in plan.memory]

    def _measure_steps(self, stage: Stage, plan: Plan, sides: tuple[str, ...]) -> None:
        """Boot a machine on each side, then measure each step in turn."""
        (course,) = self._program.courses
        plan = replace(plan, course=course)
        steps = [step for step in plan.step if not (plan.bare and step in OF_GUESTS)]
        with contextlib.ExitStack() as stack:
            processes = {}
            for side in sides:
                log = self._find_log(side, course, plan.type)
                process = stack.enter_context(self._starting(stage, side, plan, log, steps=True))
                processes[side] = process, log
                do_step(process, "boot", log, [])
            for number, side, step in self._program.step_turns(steps, sides, plan.rounds):
                process, log = processes[side]
                print(f"round {number}, {NAMES[side]}, {plan.row or course}, {step}", flush=True)
                with self._keeping(side, course, number) as measured:
                    do_step(process, step, log, measured)

    @contextlib.contextmanager
    def _starting(
        self, stage: Stage, side: str, plan: Plan, log: Path, *, steps: bool = False
    ) -> Iterator[subprocess.Popen[str]]:
        """Run a course in the environment of a side, in a directory of its own.

        Args:
            stage: What it runs on.
            side: Which package or version.
            plan: What it works with.
            log: Where its output goes.
            steps: Whether it waits for each step.
        """
        environment = stage.environments[side]
        with tempfile.TemporaryDirectory(prefix="pycl-bench-") as name:
            directory = Path(name).resolve()
            scratch = directory / "scratch"
            scratch.mkdir()
            config = stage.write_config(side, directory)
            plan = replace(plan, config_file=str(config), scratch=str(scratch))
            argv = [str(environment.python), "-m", "benchmarks.worker", plan.to_argument()]
            try:
                with (
                    log.open("w") as output,
                    running(argv, output, environment.source, steps=steps) as process,
                ):
                    yield process
            finally:
                self._leftovers = end_qemus(str(directory))

    @contextlib.contextmanager
    def _keeping(self, side: str, course: str, number: int) -> Iterator[list[Measurement]]:
        """Keep what the block measures, and all before it."""
        began, load, started = _now(), os.getloadavg()[0], time.perf_counter()
        measured: list[Measurement] = []
        self._leftovers = 0
        try:
            yield measured
        finally:
            seconds, done = time.perf_counter() - started, tuple(measured)
            run = Run(side, course, number, began, seconds, load, done, self._leftovers)
            self._results = replace(self._results, runs=(*self._results.runs, run))
            with replace_atomically(self._file(".json")) as temporary:
                temporary.write_text(self._results.to_json())
            with replace_atomically(self._file(".md")) as temporary:
                temporary.write_text(write_report(self._results))

    def _file(self, suffix: str) -> Path:
        return Path(self._plan.output, f"{self._name}{suffix}")

    def _find_log(self, *parts: str) -> Path:
        return Path(self._plan.output, "logs", f"{'-'.join(filter(None, parts))}.log")


def do_step(
    process: subprocess.Popen[str], step: str, log: Path, measured: list[Measurement]
) -> None:
    """Have a course do a step, and collect what it measures."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(f"{step}\n")
        process.stdin.flush()
    collect(process, log, measured)


def collect(process: subprocess.Popen[str], log: Path, measured: list[Measurement]) -> None:
    """Add what a course measures, until its step or the course ends.

    Raises:
        CourseFailedError: It ended otherwise.
    """
    assert process.stdout is not None
    for line in process.stdout:
        if line == "\n":
            return
        measured.append(Measurement.from_json(json.loads(line)))
        _print(measured[-1])
    if process.wait():
        raise CourseFailedError(f"stopped with exit status {process.returncode}: see {log}")


@contextlib.contextmanager
def running(
    argv: list[str], output: IO[str], source: Path | None = None, *, steps: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """Run a course; end it so that it cleans up when an error or Ctrl-C leaves the block.

    Args:
        argv: Its command line.
        output: Where its errors go.
        source: Modules that it imports before those that are installed.
        steps: Whether it reads steps; they end with the block.
    """
    process = subprocess.Popen(
        argv,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(source)} if source else None,
        stdin=subprocess.PIPE if steps else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=output,
        text=True,
        # Ctrl-C is for the driver, which ends the course in a way that it can clean up after.
        start_new_session=True,
    )
    try:
        yield process
        process.communicate()
    except BaseException:
        process.terminate()
        try:
            process.wait(_END_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise


def end_qemus(directory: str) -> int:
    """End the QEMU processes whose machines are below a directory; return how many there were."""
    pids = find_qemu(directory)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(pids)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _print(measurement: Measurement) -> None:
    scenario = BY_KEY[measurement.scenario]
    figure = Figure(() if measurement.figure is None else (measurement.figure,), ())
    row = f"{measurement.row}, " if measurement.row else ""
    text = measurement.problem or write_figure(scenario, figure)
    print(f"  {row}{scenario.key}: {text}", flush=True)
