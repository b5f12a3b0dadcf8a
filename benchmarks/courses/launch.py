"""What a launch and a restart cost, and how soon `wait()` returns after cloud-init's end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.worker import Bench, delete

if TYPE_CHECKING:
    from pycloudlib.qemu.instance import QemuInstance

RESULT = "/var/lib/cloud/data/result.json"
"""The file that cloud-init writes when its last stage has ended."""


def run(bench: Bench) -> None:
    """Launch machines that do not run, then some that boot."""
    # The first imports libraries.
    bench.recorder.time("held-first", bench.hold).delete()
    bench.recorder.take_turns({"held": bench.hold}, bench.plan.rounds, delete)
    for _ in range(bench.plan.boots):
        measure_boot(bench)


def measure_boot(bench: Bench) -> None:
    """Boot a machine and reboot it."""
    recorder = bench.recorder
    machine = recorder.time("booted", bench.boot)
    returned = time.time()
    ended = float(machine.execute(["find", RESULT, "-printf", "%T@"]))
    ahead, error = compare_clocks(machine)
    recorder.record("late", returned - (ended - ahead), note=f"known to ± {error:.2f} s")
    recorder.time("rebooted", machine.restart)
    machine.delete()


def compare_clocks(machine: QemuInstance, tries: int = 5) -> tuple[float, float]:
    """Return how far the guest's clock is ahead of ours, and how wrong that may be, in seconds."""
    best = (0.0, float("inf"))
    for _ in range(tries):
        before = time.time()
        guest = float(machine.execute("date +%s.%N"))
        after = time.time()
        if (after - before) / 2 < best[1]:
            best = (guest - (before + after) / 2, (after - before) / 2)
    return best
