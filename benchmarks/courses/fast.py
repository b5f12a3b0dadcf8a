"""A first boot that begins at cloud-init, in turn with an ordinary one."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from benchmarks.worker import Bench

if TYPE_CHECKING:
    from pycloudlib.qemu.instance import QemuInstance

MARK = "/var/tmp/number"  # noqa: S108 - in the guest


def run(bench: Bench) -> None:
    """Make what such launches start from, as the first of them does; then launch in turn."""
    recorder = bench.recorder
    numbers, number = itertools.count(), 0

    def boot(*, fast: bool) -> QemuInstance:
        nonlocal number
        # User-data of its own each time: nothing of it can have been kept.
        number = next(numbers)
        user_data = f"#!/bin/sh\necho {number} >{MARK}\n"
        return bench.boot(user_data=user_data, fast_boot=fast)

    def check(machine: QemuInstance) -> None:
        if machine.execute(["cat", MARK]) != str(number):
            raise RuntimeError("the user-data did not take effect")
        machine.delete()

    recorder.time("fast-prepare", lambda: bench.hold(fast_boot=True).delete())
    if recorder.wants("fast-disk"):
        (start,) = bench.cloud.warm_images()
        recorder.record("fast-disk", start.size / 2**20)
    ways = {"ordinary": lambda: boot(fast=False), "fast": lambda: boot(fast=True)}
    recorder.take_turns(ways, bench.plan.rounds, check)
