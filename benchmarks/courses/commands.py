"""Commands and files, from the shell and by the library, in copies with and without a helper.

It waits for the driver before each step, so that two versions of this package can take turns.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.scenarios import COMMANDS
from benchmarks.worker import Bench, delete, save_bare
from pycloudlib.config import ENVIRONMENT_VARIABLE

if TYPE_CHECKING:
    from pycloudlib.qemu.instance import QemuInstance

TIMES = 5
FILE_BYTES = 64 << 20
REMOTE = "/var/tmp/benchmark"  # noqa: S108 - in the guest


class Commands:
    """A machine of each kind, and what is done with them.

    Args:
        bench: What to measure with.

    Attributes:
        steps: What to do in each step.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._images: dict[str, str] = {}
        self._machines: dict[str, QemuInstance] = {}
        self._large, self._small, self._back = (
            Path(bench.plan.scratch, name) for name in ("large", "small", "back")
        )
        self._large.write_bytes(os.urandom(FILE_BYTES))
        self._small.write_bytes(os.urandom(1024))
        self.steps: dict[str, Callable[[], None]] = {
            "boot": self.boot,
            "program": partial(self._time, partial(run_program, "--version"), TIMES),
        }
        for way in ("helper", "ssh"):
            acts: dict[str, Callable[[str], None]] = {
                "exec-first": self.execute_first,
                "exec": self.execute,
                "copy": self.copy,
                "push": self.push,
                "pull": self.pull,
            }
            self.steps |= {f"{step}-{way}": partial(act, way) for step, act in acts.items()}

    def boot(self) -> None:
        """Boot a machine; save it as it is, and with a helper."""
        with self._bench.boot() as source:
            self._images["ssh"] = save_bare(self._bench.cloud, source)
            self._images["helper"] = self._bench.cloud.snapshot(source, memory=True)

    def execute_first(self, way: str) -> None:
        """Run a command in a machine for the first time from the shell."""
        delete(self._machines.pop(way, None))
        name = self._find_name(way)
        self._time(lambda: run_program("exec", name, "--", "true"))

    def execute(self, way: str) -> None:
        """Run commands in a machine in which commands have been run from the shell."""
        name = self._find_name(way)
        run_program("exec", name, "--", "true")
        self._time(lambda: run_program("exec", name, "--", "true"), TIMES)

    def copy(self, way: str) -> None:
        """Copy a small file from the shell."""
        name = self._find_name(way)
        self._time(lambda: run_program("copy", str(self._small), f"{name}:{REMOTE}"), TIMES)

    def push(self, way: str) -> None:
        """Copy a large file to a machine."""
        machine = self._find(way)
        self._time(lambda: machine.push_file(str(self._large), REMOTE))

    def pull(self, way: str) -> None:
        """Copy a large file from a machine."""
        machine = self._find(way)
        machine.execute(["dd", "if=/dev/urandom", f"of={REMOTE}", "bs=1M", "count=64"])
        self._time(lambda: machine.pull_file(REMOTE, str(self._back)))
        if self._back.stat().st_size != FILE_BYTES:
            raise RuntimeError(f"{self._back.stat().st_size} bytes came, not {FILE_BYTES}")

    def _find(self, way: str) -> QemuInstance:
        """Return the machine of a kind: a copy that has run a command."""
        if way not in self._machines:
            self._machines[way] = self._bench.start_copy(self._images[way])
        return self._machines[way]

    def _find_name(self, way: str) -> str:
        """Return what the command line calls the machine of a kind: it is another program's."""
        return f"{self._bench.cloud.tag}/{self._find(way).name}"

    def _time(self, step: Callable[[], object], times: int = 1) -> None:
        self._bench.recorder.time("commands-took", step, times)


def run_program(*arguments: str) -> None:
    """Run the command line of the package in a process of its own."""
    argv = [sys.executable, "-m", "pycloudlib", *arguments]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def run(bench: Bench) -> None:
    """Do the steps that the driver asks for, until there are no more."""
    os.environ[ENVIRONMENT_VARIABLE] = bench.plan.config_file
    course = Commands(bench)
    for step in bench.recorder.steps():
        bench.recorder.row = COMMANDS.get(step, step)
        course.steps[step]()
