"""Launch, use and delete machines for a long time, some of them killed meanwhile: nothing may grow.

Copies of one saved machine; each runs a command and is deleted. Of some, QEMU is killed while the
command runs: then the error has to say so.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import paramiko

from benchmarks.processes import own_resident_mib
from benchmarks.recorder import StepFailedError
from benchmarks.worker import Bench
from pycloudlib.diagnosis import Cause
from pycloudlib.errors import PycloudlibException

if TYPE_CHECKING:
    from pycloudlib.qemu.instance import QemuInstance

SHOWN_EVERY = 25
# By how much each may have grown since the first rounds: caches, and what comes and goes.
SLACK = {"descriptors": 2, "threads": 1, "children": 0, "memory": 20}


def measure() -> dict[str, float]:
    """Return what this process uses: open files, threads, children, MiB of resident memory."""
    gc.collect()
    return {
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": threading.active_count(),
        "children": len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()),
        "memory": own_resident_mib(),
    }


def run(bench: Bench) -> None:
    """Save a machine, then launch copies for so long, or so many rounds."""
    plan, cloud = bench.plan, bench.cloud
    with bench.boot(fast_boot=True) as source:
        image = cloud.snapshot(source, memory=True)
    moments = random.Random(1)  # noqa: S311 - it is to be the same again
    ends = time.monotonic() + plan.minutes * 60
    first, killed, number = measure(), 0, 0
    while time.monotonic() < ends and number < plan.rounds:
        number += 1
        with cloud.launch(image) as machine:
            killed += use(machine, kill=moments.random() < plan.kills, moments=moments)
        if number == SHOWN_EVERY:
            first = measure()  # by now everything is loaded that is loaded when first used
        if number % SHOWN_EVERY == 0:
            report(bench, number, killed, measure())
    last = measure()
    report(bench, number, killed, last)
    left = [str(path.parent) for path in cloud.parent_dir.glob("*/machine.json")]
    if left or any(last[name] > first[name] + more for name, more in SLACK.items()):
        bench.recorder.fail("memory", f"Something has grown, or was left behind: {left}")
        raise StepFailedError("soak")


def report(bench: Bench, number: int, killed: int, usage: dict[str, float]) -> None:
    """Report what is used after so many rounds."""
    bench.recorder.row = f"{number} rounds, {killed} killed"
    for scenario, value in usage.items():
        bench.recorder.record(scenario, value)


def use(machine: QemuInstance, *, kill: bool, moments: random.Random) -> bool:
    """Run a command in a machine; return whether it was killed meanwhile, and the error said so."""
    pid = machine.machine.pid
    killer = threading.Timer(moments.uniform(0, 0.5), os.kill, (pid, signal.SIGKILL))
    if not kill:
        assert machine.execute("echo here") == "here"
        return False
    killer.start()
    try:
        while machine.execute("echo here").ok:
            pass
    except (PycloudlibException, paramiko.SSHException) as error:
        diagnosis = getattr(error, "diagnosis", None)
        if diagnosis is None or diagnosis.cause is not Cause.QEMU_KILLED:
            raise
    finally:
        killer.join()
    return True
