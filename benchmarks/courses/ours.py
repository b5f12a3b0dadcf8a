"""What only this package does, with its own cold boot of the same image as the base."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.plan import Plan
from benchmarks.processes import proportional_mib
from benchmarks.recorder import Recorder, run_course
from pycloudlib import Qemu
from pycloudlib.qemu.instance import QemuInstance

TIMES = 5


class Course:
    """The steps.

    Args:
        cloud: The cloud.
        plan: What to work with.
        recorder: What to tell.
    """

    def __init__(self, cloud: Qemu, plan: Plan, recorder: Recorder) -> None:
        self.cloud, self.plan, self.recorder = cloud, plan, recorder

    def boot(self, **options: Any) -> QemuInstance:
        """Launch a machine and wait until it is ready."""
        machine = self.cloud.launch(self.plan.image, self.plan.instance_type, **options)
        machine.wait()
        return machine

    def first_command(self, image: str) -> QemuInstance:
        """Start a copy of a saved machine and run a command in it."""
        machine = self.cloud.launch(image)
        do_nothing(machine)
        return machine

    def run(self) -> None:
        """Measure everything that is wanted."""
        source = self.recorder.time("ours-boot", self.boot)
        image = self.measure_saves(source)
        if self.recorder.wants("copy"):
            self.recorder.time("copy", lambda: self.first_command(image), TIMES, undo=delete)
        if self.recorder.wants("copies", "copies-memory"):
            self.measure_copies_at_once(image)
        if self.recorder.wants("rollback"):
            self.recorder.time("rollback", lambda: roll_back(source, image), TIMES)
        source.delete()
        if self.recorder.wants("warm-prepare", "warm"):
            self.measure_warm_launch()

    def measure_saves(self, source: QemuInstance) -> str:
        """Save a running machine: first with the start of its helper, then again and again."""

        def save() -> str:
            return self.cloud.snapshot(source, memory=True)

        image = self.recorder.time("save-first", save)
        if self.recorder.wants("save"):
            image = self.recorder.time("save", save, TIMES)
        return image

    def measure_copies_at_once(self, image: str) -> None:
        """Start many copies at once, each to its first command."""
        count = self.plan.machines

        def start() -> list[QemuInstance]:
            with ThreadPoolExecutor(count) as threads:
                return list(threads.map(lambda _: self.first_command(image), range(count)))

        copies = self.recorder.time("copies", start)
        memory = sum(proportional_mib(copy.machine.pid or 0) for copy in copies)
        self.recorder.tell("copies-memory", memory / count)
        for copy in copies:
            copy.delete()

    def measure_warm_launch(self) -> None:
        """Launch what was launched before: the first such launch boots, waits and saves."""
        self.recorder.time("warm-prepare", lambda: self.boot(warm=True)).delete()
        self.recorder.time("warm", lambda: self.boot(warm=True), TIMES, undo=delete)


def delete(machine: QemuInstance) -> None:
    """Delete a machine."""
    machine.delete()


def do_nothing(machine: QemuInstance) -> None:
    """Run a command that does nothing."""
    if not machine.execute("true").ok:
        raise RuntimeError("`true` failed")


def roll_back(machine: QemuInstance, image: str) -> None:
    """Go back to a saved state, to the first command."""
    machine.rollback(image)
    do_nothing(machine)


def course(plan: Plan, recorder: Recorder) -> None:
    """Measure what only this package does."""
    with Qemu(tag="bench", config_file=plan.config_file) as cloud:
        Course(cloud, plan, recorder).run()


if __name__ == "__main__":
    run_course(course)
