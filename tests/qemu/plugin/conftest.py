"""Suites of tests that pytest runs, whose machines are real ones with guests that have halted.

Only what a guest would have to answer is left out: nothing waits for it, and a save asks no helper
in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pycloudlib.config import ENVIRONMENT_VARIABLE
from pycloudlib.qemu.host.budget import Budget, Capacity
from pycloudlib.qemu.instance import QemuInstance
from tests import ROOT
from tests.qemu.machines import becomes, qemus, save

LIMIT = 120

CONFTEST = """
import contextlib, itertools, json, os, sys, threading
from pathlib import Path

import pytest

from pycloudlib import Qemu
from pycloudlib.qemu.host import resources
from pycloudlib.qemu.host.budget import Budget, Capacity
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.saved import checkpoint
from pycloudlib.qemu.state.spec import make_name
from tests.portrange import claimed_ports
from tests.qemu import machines

# Where another test has a port, a machine would be started once more.
_claims = contextlib.ExitStack()
resources.PORTS = _claims.enter_context(claimed_ports())
WORK = Path(os.environ["SUITE_WORK"])
NOTES = Path(os.environ["SUITE_NOTES"])
_numbers = itertools.count()


def snapshot(cloud, instance, clean=True, *, memory=False, path=None):
    saved = checkpoint.save(instance.machine, f"{make_name('made')}.img", ask_helper=None)
    cloud.created_images.append(str(saved.image))
    return str(saved.image)


QemuInstance.wait = lambda instance, ready_timeout=None, **options: None
Qemu.snapshot = snapshot


def note(kind, *values):
    with NOTES.open("a") as file:
        print(json.dumps([kind, *values]), file=file)


def noted(kind):
    lines = map(json.loads, NOTES.read_text().splitlines()) if NOTES.exists() else ()
    return [values for found, *values in lines if found == kind]


def others(*used):
    # Machines beside those that the test uses, by their processes.
    return sorted(set(machines.qemus(WORK)) - {vm.machine.pid for vm in used})


def one_is_ahead(*used):
    # One has been started beside those in use, and its directory is complete.
    assert machines.becomes(lambda: len(others(*used)) == 1), others(*used)
    (pid,) = others(*used)
    return pid


def audit(event, arguments):
    # How many machines there are at each start of another one.
    if event == "subprocess.Popen":
        words = [os.fsdecode(word) for word in arguments[1]]
        if "-accel" in words and any(f"{WORK}/" in word for word in words):
            note("start", len(machines.qemus(WORK)))


sys.addaudithook(audit)


@pytest.fixture(autouse=True)
def _known(request):
    # What a suite's functions use without an import.
    for function in (note, noted, others, one_is_ahead):
        request.module.__dict__.setdefault(function.__name__, function)
    request.module.__dict__.setdefault("machines", machines)
"""


@dataclass
class Suite:
    """A suite of tests, and what it leaves.

    Attributes:
        directory: Where its files are.
        work: Where its machines are.
        image: The saved machine that its machines are copies of.
    """

    directory: Path
    work: Path
    image: str

    @property
    def notes_file(self) -> Path:
        """The file of what the tests note."""
        return self.directory / "notes"

    def write(self, text: str, *, settings: str = "", conftest: str = "") -> None:
        """Write the tests, the configuration of pytest, and more for the conftest."""
        (self.directory / "test_suite.py").write_text(f"import pytest\n{text}")
        (self.directory / "conftest.py").write_text(f"{CONFTEST}\n{conftest}")
        (self.directory / "pytest.ini").write_text(f"[pytest]\n{settings}\n")

    def noted(self, kind: str) -> list[list[Any]]:
        """Return what was noted of a kind, in order."""
        if not self.notes_file.exists():
            return []
        lines = [json.loads(line) for line in self.notes_file.read_text().splitlines()]
        return [values for found, *values in lines if found == kind]

    @contextmanager
    def running(self, *options: str) -> Iterator[subprocess.Popen[str]]:
        """Run the suite while the block runs."""
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
            "SUITE_WORK": str(self.work),
            "SUITE_NOTES": str(self.notes_file),
        }
        argv = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            f"--vm-image={self.image}",
        ]
        process = subprocess.Popen(
            [*argv, *options],
            cwd=self.directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def wait_until_noted(self, kind: str, process: subprocess.Popen[str]) -> list[Any]:
        """Wait until a run notes something, and return what; fail if it ends before."""
        assert becomes(lambda: bool(self.noted(kind)) or process.poll() is not None, LIMIT)
        assert self.noted(kind), process.communicate()[0]
        return self.noted(kind)[0]

    def run(self, *options: str, **outcomes: int) -> str:
        """Run the suite, check its outcomes and that it leaves nothing, and return its output."""
        with self.running(*options) as process:
            output, _ = process.communicate(timeout=LIMIT)
        words = output.splitlines()[-1]
        for outcome, number in (outcomes or {"passed": 1}).items():
            assert f"{number} {outcome}" in words, output
        assert outcomes.keys() & {"failed", "errors", "error"} or "failed" not in words, output
        self.leaves_nothing()
        return output

    def leaves_nothing(self) -> None:
        """Check that no machine is left, and that nothing of the budget is reserved."""
        assert qemus(self.work) == []
        assert sorted(path.name for path in self.work.glob("pycl-qemu-pytest*/*")) == []
        one = Capacity(1, 64)
        with Budget(self.work.parent / "state" / "budget", one).reserving(one, pytest.fail):
            pass


@pytest.fixture
def suite(
    running: QemuInstance, working_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Suite:
    """Return what runs a suite with copies of a saved machine."""
    image = str(save(running).image)
    running.delete()
    state, directory = tmp_path / "state", tmp_path / "suite"
    state.mkdir()
    directory.mkdir()
    config = tmp_path / "suite.toml"
    config.write_text(
        f'[qemu]\nworking_dir = "{working_dir}"\nstate_dir = "{state}"\naccelerator = "tcg"\n'
    )
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(config))
    # A run is not that of the worker which runs this test.
    for variable in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(variable, raising=False)
    return Suite(directory, working_dir, image)
