"""One machine's life: one boot serves most scenarios."""

from __future__ import annotations

import filecmp
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.processes import find_qemu, own_resident_mib, resident_mib
from benchmarks.recorder import Recorder
from benchmarks.worker import Bench, do_nothing

if TYPE_CHECKING:
    from pycloudlib.qemu.instance import QemuInstance

COMMANDS = 50
OUTPUT_BYTES = 10_000_000
FILE_BYTES = 64 << 20


def run(bench: Bench) -> None:
    """Follow a machine from its launch to its end."""
    recorder = bench.recorder
    started = time.perf_counter()
    machine = recorder.time("launch", bench.launch)
    recorder.time("boot", machine.wait, since=started)
    measure_commands(machine, recorder)
    if recorder.wants("push", "pull"):
        measure_files(machine, Path(bench.plan.scratch), recorder)
    disk = machine.id.partition("::")[0]
    recorder.record("qemu-memory", sum(resident_mib(pid) for pid in find_qemu(disk)))
    recorder.record("python-memory", own_resident_mib())
    if recorder.wants("restart"):
        recorder.time("restart", machine.restart)
    if recorder.wants("power-cycle"):
        recorder.time("power-cycle", lambda: power_cycle(machine))
    if recorder.wants("snapshot", "snapshot-boot"):
        original, cloud = machine, bench.cloud
        image = recorder.time("snapshot", lambda: cloud.snapshot(original, clean=False))
        machine = recorder.time("snapshot-boot", lambda: bench.boot(image))
    recorder.time("delete", machine.delete)


def measure_commands(machine: QemuInstance, recorder: Recorder) -> None:
    """Run commands that do nothing, then one that prints much."""

    def print_much() -> None:
        output = machine.execute(f"head -c {OUTPUT_BYTES} /dev/zero | tr '\\0' x")
        if len(output) != OUTPUT_BYTES:
            raise RuntimeError(f"{len(output)} bytes of output came, not {OUTPUT_BYTES}")

    if recorder.wants("execute-first", "execute"):
        recorder.time("execute-first", lambda: do_nothing(machine))
        recorder.time("execute", lambda: do_nothing(machine), times=COMMANDS)
    if recorder.wants("output"):
        recorder.time("output", print_much)


def measure_files(machine: QemuInstance, scratch: Path, recorder: Recorder) -> None:
    """Copy a file to the guest and back, and compare."""
    there, back = scratch / "there", scratch / "back"
    there.write_bytes(os.urandom(FILE_BYTES))
    remote = "/var/tmp/benchmark"  # noqa: S108 - in the guest
    recorder.time("push", lambda: machine.push_file(str(there), remote))
    recorder.time("pull", lambda: machine.pull_file(remote, str(back)))
    if not filecmp.cmp(there, back, shallow=False):
        raise RuntimeError("what came back is not what was sent")
    machine.execute(["rm", remote])


def power_cycle(machine: QemuInstance) -> None:
    """Switch off and on, and wait until it is ready."""
    machine.shutdown()
    machine.start()
