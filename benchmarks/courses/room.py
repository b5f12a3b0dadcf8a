"""Many launches in a row, in turn without and with waiting for room: when are all ready?"""

from __future__ import annotations

import inspect
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from benchmarks.plan import in_turn
from benchmarks.worker import Bench, delete

if TYPE_CHECKING:
    from pycloudlib.qemu.instance import QemuInstance

_WAYS: dict[str, dict[str, Any]] = {"at once": {}, "wait_for_room=True": {"wait_for_room": True}}


def run(bench: Bench) -> None:
    """Launch them, and wait for each in a thread of its own."""
    known = inspect.signature(bench.cloud.launch).parameters
    ways = [way for way, options in _WAYS.items() if options.keys() <= known.keys()]
    for number in range(1, bench.plan.rounds + 1):
        for way in in_turn(ways, number):
            bench.recorder.row = way
            measure(bench, _WAYS[way])


def measure(bench: Bench, options: dict[str, Any]) -> None:
    """Measure one way."""
    recorder, count = bench.recorder, bench.plan.machines
    machines: list[QemuInstance] = []
    started = time.perf_counter()

    def wait(machine: QemuInstance) -> float:
        machine.wait()
        return time.perf_counter() - started

    def launch_all() -> list[float]:
        with ThreadPoolExecutor(count) as threads:
            waits = []
            for _ in range(count):
                machines.append(bench.launch(**options))
                waits.append(threads.submit(wait, machines[-1]))
            return [each.result() for each in waits]

    try:
        seconds = recorder.time("room-all", launch_all, since=started)
        recorder.record("room-each", sum(seconds) / count)
    finally:
        delete(*machines)
