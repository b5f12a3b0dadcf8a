"""What only this package does with running machines, with its own cold boot as the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.processes import proportional_mib
from benchmarks.worker import Bench, delete, do_nothing, save_bare

if TYPE_CHECKING:
    from pycloudlib.qemu.instance import QemuInstance

TIMES = 5


def run(bench: Bench) -> None:
    """Boot a machine, save it, start copies, go back; then launch what is kept warm."""
    recorder = bench.recorder
    source = recorder.time("ours-boot", bench.boot)
    image = measure_saves(bench, source)
    if recorder.wants("copy"):
        recorder.time("copy", lambda: bench.start_copy(image), TIMES, undo=delete)
    if recorder.wants("copy-own"):
        recorder.time("copy-own", lambda: start_own(bench, image), TIMES, undo=delete)
    if recorder.wants("copy-ssh"):
        bare = save_bare(bench.cloud, source)
        recorder.time("copy-ssh", lambda: bench.start_copy(bare), TIMES, undo=delete)
    if recorder.wants("copies", "copies-memory"):
        measure_copies_at_once(bench, image)
    if recorder.wants("rollback"):
        recorder.time("rollback", lambda: roll_back(source, image), TIMES)
    source.delete()
    if recorder.wants("warm-prepare", "warm"):
        recorder.time("warm-prepare", lambda: bench.boot(warm=True)).delete()
        recorder.time("warm", lambda: bench.boot(warm=True), TIMES, undo=delete)


def measure_saves(bench: Bench, source: QemuInstance) -> str:
    """Save a running machine: first with the start of its helper, then again and again."""

    def save() -> str:
        return bench.cloud.snapshot(source, memory=True)

    image = bench.recorder.time("save-first", save)
    if bench.recorder.wants("save"):
        image = bench.recorder.time("save", save, TIMES)
    return image


def measure_copies_at_once(bench: Bench, image: str) -> None:
    """Start many copies at once, each to its first command."""
    count = bench.plan.machines
    copies = bench.recorder.time("copies", lambda: bench.start_copies(image, count))
    memory = sum(proportional_mib(copy.machine.pid or 0) for copy in copies)
    bench.recorder.record("copies-memory", memory / count)
    delete(*copies)


def start_own(bench: Bench, image: str) -> QemuInstance:
    """Start a copy that has an identity of its own, and wait for it."""
    machine = bench.cloud.launch(image, fresh_identity=True)
    machine.wait()
    return machine


def roll_back(machine: QemuInstance, image: str) -> None:
    """Go back to a saved state, to the first command."""
    machine.rollback(image)
    do_nothing(machine)
