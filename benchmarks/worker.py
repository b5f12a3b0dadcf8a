"""The process in which a course runs: `python -m benchmarks.worker PLAN`."""

from __future__ import annotations

import importlib
import inspect
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.plan import Plan
from benchmarks.recorder import Recorder, StepFailedError
from benchmarks.scenarios import GROWTH
from pycloudlib import Qemu

if TYPE_CHECKING:
    from pycloudlib.qemu.instance import QemuInstance


@dataclass(frozen=True, slots=True)
class Bench:
    """What courses measure with.

    Attributes:
        cloud: The cloud.
        plan: What to work with.
        recorder: Where to report.
    """

    cloud: Qemu
    plan: Plan
    recorder: Recorder

    def launch(self, image: str = "", **options: Any) -> QemuInstance:
        """Launch a machine from an image, or from the plan's."""
        machine: QemuInstance = self.cloud.launch(
            image or self.plan.image, instance_type=self.plan.type, **options
        )
        return machine

    def boot(self, image: str = "", **options: Any) -> QemuInstance:
        """Launch a machine and wait until it is ready."""
        machine = self.launch(image, **options)
        machine.wait()
        return machine

    def hold(self, image: str = "", **options: Any) -> QemuInstance:
        """Launch a machine whose processors do not run: what remains is the package's own work."""
        return self.launch(image, launch_args=["-S"], **options)

    def start_copy(self, image: str, **options: Any) -> QemuInstance:
        """Start a copy of a saved machine and run a command in it."""
        machine: QemuInstance = self.cloud.launch(image, **options)
        do_nothing(machine)
        return machine

    def start_copies(self, image: str, count: int) -> list[QemuInstance]:
        """Start many copies at once, each to its first command."""
        with ThreadPoolExecutor(count) as threads:
            return list(threads.map(lambda _: self.start_copy(image), range(count)))


def do_nothing(machine: QemuInstance) -> None:
    """Run a command that does nothing."""
    if machine.execute("true").return_code != 0:
        raise RuntimeError("`true` failed")


def delete(*machines: QemuInstance | None) -> None:
    """Delete machines, where there are any."""
    for machine in machines:
        if machine is not None:
            machine.delete()


def save_bare(cloud: Qemu, machine: QemuInstance) -> str:
    """Save a machine as if no helper ran in its guest, by any version; return the image."""
    try:
        save = importlib.import_module("pycloudlib.qemu.saved.checkpoint").save
    except ImportError:
        save = importlib.import_module("pycloudlib.qemu.checkpoint").save
    helpers = {"ask_helper": None, "helper": False}
    options = {
        name: helpers[name] for name in inspect.signature(save).parameters if name in helpers
    }
    image = str(save(machine.machine, f"bare{time.time_ns()}.img", **options).image)
    cloud.created_images.append(image)
    return image


def make_bare_image(directory: Path) -> Path:
    """Make the image of a disk whose boot sector halts the processor."""
    image, halt = directory / "tiny.img", b"\xfa\xf4\xeb\xfd"
    image.write_bytes(halt.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
    return image


def main() -> None:
    """Run a course with the plan on the command line; exit with 0 if all was measured."""
    plan = Plan.from_argument(sys.argv[1])
    # Ctrl-C comes to the driver, which passes it on as this; SystemExit cleans up on its way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    growth = plan.course in GROWTH
    module = importlib.import_module(f"benchmarks.courses.{'growth' if growth else plan.course}")
    run: Callable[[Bench], None] = getattr(module, plan.course if growth else "run")
    recorder = Recorder(plan.wanted, plan.row)
    try:
        with Qemu(tag="bench", config_file=plan.config_file) as cloud:
            run(Bench(cloud, plan, recorder))
    except StepFailedError as error:
        sys.exit(f"stopped at: {error}")


if __name__ == "__main__":
    main()
