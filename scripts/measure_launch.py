"""Measure what a launch costs, and how soon `wait()` returns after cloud-init's end.

    python scripts/measure_launch.py [--launches 10] [--boots 1]

Each launch but the first is of a machine whose processors do not run (QEMU's `-S`): it is the
package's own work that is measured, with the accelerator known.
"""

from __future__ import annotations

import argparse
import statistics
import time

from pycloudlib import Qemu
from pycloudlib.qemu.instance import QemuInstance

# The file that cloud-init writes when its last stage has ended.
RESULT = "/var/lib/cloud/data/result.json"


def describe(seconds: list[float]) -> str:
    """Give median and spread."""
    return (
        f"median {statistics.median(seconds):.3f} s, "
        f"{min(seconds):.3f} to {max(seconds):.3f} s over {len(seconds)}"
    )


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


def measure_wait(cloud: Qemu, image: str) -> tuple[float, float, float]:
    """Boot a machine; give the boot's time, how late `wait()` returned, and the error of that."""
    instance = cloud.launch(image, "c2m1024")
    started = time.perf_counter()
    instance.wait()
    returned = time.time()
    boot = time.perf_counter() - started
    ended = float(instance.execute(["find", RESULT, "-printf", "%T@"]))
    offset, error = guest_time_of(instance)
    instance.delete()
    return boot, returned - (ended - offset), error


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
            boot, late, error = measure_wait(cloud, image)
            print(
                f"wait(): {boot:.1f} s, returned {late:.2f} s after cloud-init's end "
                f"(known to ± {error:.2f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
