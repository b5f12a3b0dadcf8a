"""Measure what a launch and a restart cost, and how soon `wait()` returns after cloud-init's end.

    python -m scripts.measure_launch [--launches 10] [--boots 1]

Each launch but the first is of a machine whose processors do not run (QEMU's `-S`): it is the
package's own work that is measured, with the accelerator known.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

from pycloudlib import Qemu
from pycloudlib.qemu.instance import QemuInstance
from scripts.figures import describe

# The file that cloud-init writes when its last stage has ended.
RESULT = "/var/lib/cloud/data/result.json"


def measure_launches(cloud: Qemu, image: str, count: int) -> list[float]:
    """Time launches, one after the other."""
    durations = []
    for _ in range(count + 1):
        started = time.perf_counter()
        instance = cloud.launch(image, launch_args=["-S"])
        durations.append(time.perf_counter() - started)
        instance.delete()
    return durations[1:]


def guest_time_of(instance: QemuInstance, tries: int = 5) -> tuple[float, float]:
    """Tell how far the guest's clock is ahead of ours, and how wrong that may be, in seconds."""
    best = (0.0, float("inf"))
    for _ in range(tries):
        before = time.time()
        guest = float(instance.execute("date +%s.%N"))
        after = time.time()
        if (after - before) / 2 < best[1]:
            best = (guest - (before + after) / 2, (after - before) / 2)
    return best


@dataclass(frozen=True, slots=True)
class BootFigures:
    """What a machine's boot and reboot took, in seconds.

    Attributes:
        boot: From launch to the return of `wait()`.
        late: From cloud-init's end to the return of `wait()`.
        error: How wrong `late` may be.
        restart: From `restart()` to its return.
    """

    boot: float
    late: float
    error: float
    restart: float


def measure_boot(cloud: Qemu, image: str) -> BootFigures:
    """Boot a machine and reboot it."""
    instance = cloud.launch(image, "c2m1024")
    started = time.perf_counter()
    instance.wait()
    returned = time.time()
    boot = time.perf_counter() - started
    ended = float(instance.execute(["find", RESULT, "-printf", "%T@"]))
    offset, error = guest_time_of(instance)
    started = time.perf_counter()
    instance.restart()
    restart = time.perf_counter() - started
    instance.delete()
    return BootFigures(boot, returned - (ended - offset), error, restart)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--launches", type=int, default=10)
    parser.add_argument("--boots", type=int, default=1)
    arguments = parser.parse_args()
    with Qemu(tag="measure") as cloud:
        image = cloud.build_image()
        print("launch():", describe(measure_launches(cloud, image, arguments.launches)))
        for _ in range(arguments.boots):
            figures = measure_boot(cloud, image)
            print(
                f"cold boot {figures.boot:.1f} s; wait() returned {figures.late:.2f} s after "
                f"cloud-init's end (known to ± {figures.error:.2f} s); "
                f"restart {figures.restart:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
