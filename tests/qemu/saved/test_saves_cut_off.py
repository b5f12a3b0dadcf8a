"""A save ends at any moment, by a signal to who saves or to QEMU: all of it is there, or nothing.

The moments are not chosen by what the code does: they are the first call of each of its functions,
and the first return, of which there are some hundreds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pycloudlib import Qemu
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.vm.running import State
from tests.qemu.conftest import CloudMaker
from tests.qemu.machines import becomes, hurry, qemus, runs
from tests.qemu.worker import (
    are_in_order,
    copy_worker,
    output_of,
    reboot,
    rounds,
    start_worker,
    type_in,
    typed,
    works,
)

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("own_ports")]

# Saves a machine; prints when each moment came, or what went wrong; sends a signal at one moment.
SAVER = """
import io, json, os, signal, sys, threading, time
import pycloudlib
from pycloudlib import Qemu
from pycloudlib.errors import CloudError
config, machine = sys.argv[1:3]
fatal, number, victim = map(int, sys.argv[3:])
cloud = Qemu("saver", timestamp_suffix=False, config_file=io.StringIO(config))
vm = cloud.get_instance(machine)
vm.banner_timeout = 0.2
code_of_package = os.path.join(os.path.dirname(pycloudlib.__file__), "")
seen, moments = set(), []

def watch(frame, event, argument):
    code = frame.f_code
    if event not in ("call", "return") or not code.co_filename.startswith(code_of_package):
        return
    if (code, event) not in seen:
        seen.add((code, event))
        place = f"{os.path.basename(code.co_filename)} {code.co_name}"
        moments.append((time.time(), f"{event} {place}"))
        if len(moments) == fatal:
            os.write(2, moments[-1][1].encode() + b"\\n")
            os.kill(victim or os.getpid(), number)

threading.setprofile(watch)
sys.setprofile(watch)
try:
    image = cloud.snapshot(vm, memory=True)
except CloudError as error:
    sys.exit(f"CloudError: {error}")
sys.setprofile(None)
print(json.dumps([image, moments]))
"""


@dataclass(frozen=True)
class Saver:
    """Saves a machine in a program of its own.

    Attributes:
        working_dir: Where its cloud works.
        machine: The machine's id.
    """

    working_dir: Path
    machine: str

    def run(
        self, fatal: int = 0, number: int = 0, victim: int = 0
    ) -> subprocess.CompletedProcess[str]:
        """Save the machine; a signal is sent at a moment, counted from one.

        Args:
            fatal: The moment.
            number: The signal.
            victim: Who gets it; 0 for who saves.
        """
        config = f'[qemu]\nworking_dir = "{self.working_dir}"\naccelerator = "tcg"\n'
        return subprocess.run(
            [sys.executable, "-c", SAVER, config, self.machine, *map(str, (fatal, number, victim))],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


@pytest.fixture
def worker(make_cloud: CloudMaker, tmp_path: Path, working_dir: Path) -> Iterator[QemuInstance]:
    """Give a machine that works, and remove what programs that were killed have left."""
    cloud = make_cloud()
    yield start_worker(cloud, tmp_path / "worker.img")
    assert cloud.clean() == []
    cloud.prune()
    for pid in qemus(working_dir):
        os.kill(pid, signal.SIGKILL)


def choose(moments: list[float], worker: QemuInstance, count: int) -> list[int]:
    """Choose as many moments of before the pause, in it, and after it, all over them."""
    named = {event.name: event.timestamp for event in worker.machine.events}
    stop, resume = named["STOP"], named["RESUME"]
    numbers = range(1, len(moments) + 1)
    parts = [
        [number for number in numbers if moments[number - 1] < stop],
        [number for number in numbers if stop <= moments[number - 1] <= resume],
        [number for number in numbers if resume < moments[number - 1]],
    ]
    return sorted(
        {
            part[len(part) * (2 * step + 1) // (2 * count)]
            for part in parts
            for step in range(count)
            if part
        }
    )


VICTIMS = {
    "killed": (signal.SIGKILL, False),
    "interrupted": (signal.SIGINT, False),
    "without QEMU": (signal.SIGKILL, True),
}


@pytest.mark.parametrize(
    ("how", "count"),
    [
        ("killed", 1),
        ("without QEMU", 1),
        *[pytest.param(how, 10, marks=pytest.mark.thorough) for how in VICTIMS],
    ],
)
def test_machine_is_as_it_was_or_the_save_is_whole_whenever_who_saves_is(
    how: str, make_cloud: CloudMaker, worker: QemuInstance, working_dir: Path, count: int
) -> None:
    cloud, saver = make_cloud("other"), Saver(working_dir, worker.id)
    number, is_qemu = VICTIMS[how]
    type_in(worker, "f")
    done = saver.run()
    assert done.returncode == 0, done.stderr
    image, moments = json.loads(done.stdout)
    check_and_delete(cloud, image)
    files = files_of(worker)
    for moment in choose([time for time, _ in moments], worker, count):
        pid = worker.machine.pid
        assert pid is not None
        ended = saver.run(moment, number, pid if is_qemu else 0)
        at = f"moment {moment} of {len(moments)}: {ended.stderr}"
        if is_qemu:
            # A QEMU that dies is an error of ours, which says so.
            assert ended.returncode == 0 or "CloudError: " in ended.stderr, at
            assert becomes(lambda: worker.machine.state is State.OFF), at
            pid = None
        elif ended.returncode != 0:
            assert ended.returncode == -number or "KeyboardInterrupt" in ended.stderr, at
        if number == signal.SIGKILL and not is_qemu:
            check_one(cloud, worker, pid, at)
        check_what_is_left(cloud, working_dir, at, prune=how == "killed")
        assert files_of(worker) <= files, at
        if is_qemu:
            worker.start(wait=False)
            assert works(worker)
            type_in(worker, "f")
        else:
            check_one(cloud, worker, pid, at)
    if not is_qemu:
        assert are_in_order(rounds(output_of(worker)))
    reboot(worker)


def check_what_is_left(cloud: Qemu, working_dir: Path, at: str, *, prune: bool) -> None:
    """See that there are no saves but whole ones, after what is not whole was pruned."""
    for left in sorted(working_dir.glob("*/snapshots/*.img")):
        if savedmachine.find(left) is not None:
            check_and_delete(cloud, str(left))
    if prune:
        cloud.prune()
    assert list(working_dir.glob("*/snapshots/*")) == [], at


def check_one(cloud: Qemu, worker: QemuInstance, pid: int | None, at: str) -> None:
    """Look at a machine as any program does; it runs, in the process that it had."""
    other = hurry(cloud.get_instance(worker.id))
    assert becomes(lambda: runs(other)), at
    assert other.machine.pid == pid, at
    assert works(worker), at


def check_and_delete(cloud: Qemu, image: str) -> None:
    """See that a save is whole."""
    copy = copy_worker(cloud, image)
    assert typed(copy) == "f"
    assert copy.delete() == []
    cloud.delete_image(image)


def files_of(worker: QemuInstance) -> set[str]:
    return {file.name for file in worker.instance_dir.iterdir() if file.suffix != ".lock"}
