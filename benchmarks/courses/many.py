"""Many machines at once: launched one after the other, then waited for.

In turn, too: they boot at the same time, and the original's cannot be waited for from several
threads ("This event loop is already running").
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.processes import find_qemu, own_resident_mib, proportional_mib
from benchmarks.recorder import describe
from benchmarks.worker import Bench

if TYPE_CHECKING:
    from pycloudlib.qemu.instance import QemuInstance


def run(bench: Bench) -> None:
    """Start them all."""
    count, recorder = bench.plan.machines, bench.recorder
    before, started = own_resident_mib(), time.perf_counter()
    machines = recorder.time("many-launch", lambda: [bench.launch() for _ in range(count)])
    recorder.time("many-boot", lambda: wait_for_all(machines), since=started)
    disks = [machine.id.partition("::")[0] for machine in machines]
    pids = [pid for disk in disks for pid in find_qemu(disk)]
    recorder.record("many-qemu-memory", sum(map(proportional_mib, pids)) / count)
    recorder.record("many-python-memory", (own_resident_mib() - before) / count)


def wait_for_all(machines: list[QemuInstance]) -> None:
    """Wait until all are ready; raise an error that says for how many that failed."""
    problems = []
    for machine in machines:
        try:
            machine.wait()
        except Exception as error:  # noqa: BLE001 - reported with how many others it happened to
            problems.append(describe(error))
    if problems:
        raise RuntimeError(f"{len(problems)} of {len(machines)} were not ready: {problems[0]}")
