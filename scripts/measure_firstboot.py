"""Measure what it brings when a first boot begins at cloud-init.

    python -m scripts.measure_firstboot [--rounds 5] [--type c1m1024] [RELEASE ...]

Ordinary and fast launches are made in turn, from the same image, each with user-data of its own.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time

from pycloudlib import Qemu
from scripts.figures import describe, timed


def launch(cloud: Qemu, image: str, instance_type: str, number: int, *, fast: bool) -> float:
    """Launch a machine, wait until it is ready, and check that its user-data took effect."""
    user_data = f"#!/bin/sh\necho {number} >/var/tmp/number\n"
    started = time.perf_counter()
    with cloud.launch(image, instance_type, user_data=user_data, fast_boot=fast) as instance:
        instance.wait()
        took = time.perf_counter() - started
        if instance.execute("cat /var/tmp/number") != str(number):
            raise RuntimeError("the user-data did not take effect")
    return took


def measure(cloud: Qemu, release: str, instance_type: str, rounds: int) -> None:
    """Measure one image."""
    image = cloud.build_image(release)
    cloud.prune_warm_images()

    def make_starting_point() -> None:
        cloud.launch(image, instance_type, fast_boot=True, launch_args=["-S"]).delete()

    print(f"{release}: making the starting point: {timed(make_starting_point):.1f} s", flush=True)
    (start,) = (warm for warm in cloud.warm_images() if warm.base == image)
    print(f"{release}: it takes {start.size >> 20} MiB of disk", flush=True)
    ordinary: list[float] = []
    fast: list[float] = []
    for number in range(rounds):
        for way in (False, True) if number % 2 else (True, False):
            took = launch(cloud, image, instance_type, number, fast=way)
            (fast if way else ordinary).append(took)
    ratio = statistics.median(ordinary) / statistics.median(fast)
    print(f"{release}: ordinary launch and wait: {describe(ordinary)}")
    print(f"{release}: fast launch and wait: {describe(fast)}")
    print(f"{release}: {ratio:.2f} times faster", flush=True)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--type", default="c1m1024", help="instance type (default: %(default)s)")
    parser.add_argument("releases", nargs="*", default=["bookworm", "trixie"])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    with Qemu(tag="measure-firstboot") as cloud:
        for release in arguments.releases:
            measure(cloud, release, arguments.type, arguments.rounds)


if __name__ == "__main__":
    main()
