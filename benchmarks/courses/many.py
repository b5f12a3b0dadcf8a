"""Many machines at once: launched one after the other, then waited for.

In turn, too: they boot at the same time, and the original's cannot be waited for from several
threads ("This event loop is already running").
"""

from __future__ import annotations

import time

from benchmarks.plan import Plan
from benchmarks.processes import find_qemu, own_resident_mib, proportional_mib
from benchmarks.recorder import Recorder, describe, run_course
from pycloudlib import Qemu
from pycloudlib.qemu.instance import QemuInstance


def course(plan: Plan, recorder: Recorder) -> None:
    """Start them all."""
    with Qemu(tag="bench", config_file=plan.config_file) as cloud:
        before = own_resident_mib()

        def launch_all() -> list[QemuInstance]:
            return [
                cloud.launch(plan.image, instance_type=plan.instance_type)
                for _ in range(plan.machines)
            ]

        def wait_for_all() -> None:
            problems = [found for found in map(wait_for, machines) if found]
            if problems:
                raise RuntimeError(
                    f"{len(problems)} of {len(machines)} were not ready: {problems[0]}"
                )

        started = time.perf_counter()
        machines = recorder.time("many-launch", launch_all)
        recorder.time("many-boot", wait_for_all, since=started)
        disks = [machine.id.partition("::")[0] for machine in machines]
        pids = [pid for disk in disks for pid in find_qemu(disk)]
        recorder.tell("many-qemu-memory", sum(map(proportional_mib, pids)) / plan.machines)
        recorder.tell("many-python-memory", (own_resident_mib() - before) / plan.machines)


def wait_for(machine: QemuInstance) -> str:
    """Wait until a machine is ready; say what went wrong."""
    try:
        machine.wait()
    except Exception as error:  # noqa: BLE001 - told, with how many others it happened to
        return describe(error)
    return ""


if __name__ == "__main__":
    run_course(course)
