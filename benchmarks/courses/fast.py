"""A first boot that begins at cloud-init: an option, to set beside the original's cold boot."""

from __future__ import annotations

from benchmarks.plan import Plan
from benchmarks.recorder import Recorder, run_course
from pycloudlib import Qemu
from pycloudlib.qemu.instance import QemuInstance


def course(plan: Plan, recorder: Recorder) -> None:
    """Make what such launches start from, as the first of them does; then launch one."""
    with Qemu(tag="bench", config_file=plan.config_file) as cloud:

        def prepare() -> None:
            held = cloud.launch(plan.image, plan.instance_type, fast_boot=True, launch_args=["-S"])
            held.delete()

        def boot() -> QemuInstance:
            machine = cloud.launch(plan.image, plan.instance_type, fast_boot=True)
            machine.wait()
            return machine

        recorder.time("fast-prepare", prepare)
        recorder.time("fast", boot).delete()


if __name__ == "__main__":
    run_course(course)
