"""A suite of tests that each take a machine of their own and run a command, run by pytest.

What a test waits for its machine is what pytest measures of its fixtures' setup. It waits for the
driver before each step, so that two versions of this package can take turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.scenarios import SUITE
from benchmarks.worker import Bench
from pycloudlib.config import ENVIRONMENT_VARIABLE

# Reports come here from all workers; a test has one for its fixtures' setup, one for itself, and
# one for their teardown.
CONFTEST = """\
import json
import pytest

@pytest.fixture
def booted(vm_factory):
    return vm_factory(warm=False)

def pytest_runtest_logreport(report):
    if hasattr(report, "node") or not WORKERS:
        worker = report.node.gateway.id if WORKERS else ""
        fields = (worker, report.nodeid, report.when, report.passed, report.start, report.stop)
        with open("reports", "a") as file:
            print(json.dumps(fields), file=file)
"""
TEST = """\
import pytest

@pytest.mark.parametrize("number", range({tests}))
def test_it({fixture}, number):
    assert {fixture}.execute("{command}").ok
"""
_PREFETCH = "--vm-ahead"


@dataclass
class Times:
    """When the phases of the tests began and ended.

    Attributes:
        waits: Seconds of each wait for a machine, but a worker's first.
        first_waits: Seconds of each worker's first.
        commands: Seconds of each command.
        whole: Seconds of each test, on average.
    """

    waits: list[float] = field(default_factory=list)
    first_waits: list[float] = field(default_factory=list)
    commands: list[float] = field(default_factory=list)
    whole: float = 0.0

    @classmethod
    def read(cls, reports: Path) -> Times:
        """Read the reports of a run.

        Raises:
            RuntimeError: A test did not pass.
        """
        times, workers = cls(), defaultdict[str, list[float]](list)
        begin, end, tests = float("inf"), 0.0, set()
        for line in reports.read_text().splitlines():
            worker, test, phase, passed, start, stop = json.loads(line)
            if not passed:
                raise RuntimeError(f"{test} failed")
            begin, end = min(begin, start), max(end, stop)
            tests.add(test)
            if phase == "setup":
                workers[worker].append(stop - start)
            elif phase == "call":
                times.commands.append(stop - start)
        for waits in workers.values():
            times.first_waits.append(waits[0])
            times.waits += waits[1:]
        times.whole = (end - begin) / len(tests)
        return times


class Suite:
    """Runs a suite, again and again.

    Args:
        bench: What to measure with.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._saved = ""
        text = self._pytest("--help", stdout=subprocess.PIPE).stdout
        self._prefetches = _PREFETCH in text

    def do(self, step: str) -> None:
        """Do a step: run the suite with each number of workers, and commands of each length."""
        if step == "boot":
            with self._bench.boot() as source:
                self._saved = self._bench.cloud.snapshot(source, memory=True)
        elif self._prefetches or not step.startswith("ahead"):
            for seconds, workers in self._list_runs(step):
                command = f"sleep {seconds:g}" if seconds else "true"
                row = f"{SUITE[step]}, {workers} worker{'s'[: workers > 1]}, `{command}`"
                self._bench.recorder.row = row
                self._measure(step, workers, command)

    def _list_runs(self, step: str) -> Iterator[tuple[float, int]]:
        """Return how long commands take, and how many workers run them."""
        plan = self._bench.plan
        for seconds in plan.seconds[:1] if step == "boots" else plan.seconds:
            for workers in plan.workers:
                # One worker has processors enough.
                if step != "ahead-wide" or workers > 1:
                    yield seconds, workers

    def _measure(self, step: str, workers: int, command: str) -> None:
        plan, recorder = self._bench.plan, self._bench.recorder
        boots, side_by_side = step == "boots", workers > 1
        tests = plan.boots * workers if boots else plan.tests
        directory = Path(plan.scratch)
        fixture = "booted" if boots else "vm"
        (directory / "conftest.py").write_text(f"WORKERS = {side_by_side}\n{CONFTEST}")
        (directory / "test_suite.py").write_text(
            TEST.format(tests=tests, fixture=fixture, command=command)
        )
        (directory / "pytest.ini").write_text("[pytest]\n")
        reports = directory / "reports"
        reports.unlink(missing_ok=True)
        options = [f"--vm-image={plan.image if boots else self._saved}"]
        options += ["-o", f"vm_instance_type={plan.type}"] if boots else []
        options += ["-n", str(workers)] if side_by_side else []
        options += ["-o", f"vm_processors={2 * workers}"] if step == "ahead-wide" else []
        if self._prefetches and not step.startswith("ahead"):
            options.append(f"{_PREFETCH}=0")
        self._pytest(*options)
        times = Times.read(reports)
        recorder.record("suite-test", times.whole)
        recorder.record("suite-wait", *times.waits)
        recorder.record("suite-first-wait", *times.first_waits)
        recorder.record("suite-command", *times.commands)

    def _pytest(self, *options: str, stdout: int | None = None) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
        return subprocess.run(
            argv, cwd=self._bench.plan.scratch, stdout=stdout, text=True, check=True
        )


def run(bench: Bench) -> None:
    """Do the steps that the driver asks for, until there are no more."""
    os.environ[ENVIRONMENT_VARIABLE] = bench.plan.config_file
    suite = Suite(bench)
    for step in bench.recorder.steps():
        suite.do(step)
