"""Measure live snapshots: copies, rollback, and what they take of memory.

    python -m scripts.measure_live [--rounds 5] [--type c1m1024] [PART ...]

Cold boots and copies are measured in turn, on the same image, so that a busy host is busy for both.
What a save costs, `benchmarks.saves` measures.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pycloudlib import Qemu
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.saved import checkpoint
from scripts.figures import describe, timed


def boot(cloud: Qemu, image: str, instance_type: str) -> QemuInstance:
    """Launch a machine and wait until it is ready."""
    instance = cloud.launch(image, instance_type)
    instance.wait()
    return instance


def first_command(cloud: Qemu, image: str) -> QemuInstance:
    """Launch a copy and run a command in it."""
    instance = cloud.launch(image)
    if not instance.execute("true").ok:
        raise RuntimeError("the first command failed")
    return instance


@contextmanager
def own(instances: list[QemuInstance]) -> Iterator[list[QemuInstance]]:
    """Delete machines at the end."""
    try:
        yield instances
    finally:
        for instance in instances:
            instance.delete()


def resident(instances: list[QemuInstance]) -> float:
    """Add up what machines take of memory, in MiB; what they share is counted once (Pss)."""
    total = 0
    for instance in instances:
        for line in Path(f"/proc/{instance.machine.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=8, help="machines whose memory is compared")
    parser.add_argument("--type", default="c1m1024", help="instance type")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    arguments = parser.parse_args()
    parts = arguments.parts or list(PARTS)
    with Qemu(tag="measure-live") as cloud:
        image = cloud.build_image()
        source = boot(cloud, image, arguments.type)
        bench = Bench(cloud, image, source, arguments.type, arguments.rounds, arguments.count)
        for part in parts:
            PARTS[part](bench)


@dataclass
class Bench:
    """What is measured with.

    Attributes:
        cloud: The cloud.
        image: The image that machines boot from.
        source: A machine that has booted.
        instance_type: Its size.
        rounds: How often each figure is taken.
        count: How many machines are compared at once.
    """

    cloud: Qemu
    image: str
    source: QemuInstance
    instance_type: str
    rounds: int
    count: int

    def save(self) -> str:
        """Save the source, with a helper."""
        return self.cloud.snapshot(self.source, memory=True)

    def save_bare(self) -> str:
        """Save the source as if no helper ran in it."""
        name = f"bare{time.time()}.img"
        image = str(checkpoint.save(self.source.machine, name, ask_helper=None).image)
        self.cloud.created_images.append(image)
        return image


def measure_rollback(bench: Bench) -> None:
    """Time going back, to the first command."""
    image = bench.save()

    def roll_back() -> None:
        bench.source.rollback(image)
        bench.source.execute("true")

    rolled = [timed(roll_back) for _ in range(bench.rounds)]
    print("rollback to its first command:", describe(rolled), flush=True)


def measure_copies(bench: Bench) -> None:
    """Time copies and cold boots in turn."""
    cloud, helped, bare = bench.cloud, bench.save(), bench.save_bare()
    kinds: dict[str, Callable[[], QemuInstance]] = {
        "copy to its first command, by the helper": lambda: first_command(cloud, helped),
        "copy to its first command, by SSH": lambda: first_command(cloud, bare),
        "cold launch + wait": lambda: boot(cloud, bench.image, bench.instance_type),
        "copy with an identity of its own, launch + wait": lambda: ready(cloud, helped),
    }
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(bench.rounds):
        for name, start in kinds.items():
            started = time.perf_counter()
            instance = start()
            taken[name].append(time.perf_counter() - started)
            instance.delete()
    base = statistics.median(taken["cold launch + wait"])
    for name, values in taken.items():
        ratio = base / statistics.median(values)
        print(f"{name}: {describe(values)}; {ratio:.0f} times faster", flush=True)


def measure_eight(bench: Bench) -> None:
    """Time one copy and eight together, in turn."""
    cloud, helped = bench.cloud, bench.save()

    def start(count: int) -> float:
        started = time.perf_counter()
        with ThreadPoolExecutor(count) as threads:
            copies = list(threads.map(lambda _: first_command(cloud, helped), range(count)))
        duration = time.perf_counter() - started
        for copy in copies:
            copy.delete()
        return duration

    taken = {1: [start(1)], 8: [start(8)]}
    for _ in range(bench.rounds - 1):
        for count, values in taken.items():
            values.append(start(count))
    one, eight = taken[1], taken[8]
    ratio = statistics.median(eight) / statistics.median(one)
    print(
        f"one copy: {describe(one)}; eight together: {describe(eight)}; {ratio:.1f} times",
        flush=True,
    )


def ready(cloud: Qemu, image: str) -> QemuInstance:
    """Launch a copy that is somebody of its own, and wait for it."""
    instance = cloud.launch(image, fresh_identity=True)
    instance.wait()
    return instance


def measure_memory(bench: Bench) -> None:
    """Compare what copies take of memory with what as many cold machines take."""
    cloud, count, saved = bench.cloud, bench.count, bench.save()
    with own([first_command(cloud, saved) for _ in range(count)]) as copies:
        time.sleep(2)
        shared = resident(copies)
    at_once = threading.Semaphore(2)
    cold = [
        cloud.launch(bench.image, bench.instance_type, launch_args=["-S"]) for _ in range(count)
    ]

    def come_up(instance: QemuInstance) -> None:
        with at_once:
            instance.machine.execute("cont")
            instance.wait()

    with own(cold), ThreadPoolExecutor(count) as threads:
        list(threads.map(come_up, cold))
        alone = resident(cold)
    print(
        f"memory of {count}: copies {shared:.0f} MiB, cold machines {alone:.0f} MiB; "
        f"{shared / alone:.0%}",
        flush=True,
    )


PARTS: dict[str, Callable[[Bench], None]] = {
    "copies": measure_copies,
    "eight": measure_eight,
    "rollback": measure_rollback,
    "memory": measure_memory,
}


if __name__ == "__main__":
    main()
