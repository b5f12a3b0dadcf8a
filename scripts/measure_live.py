"""Measure live snapshots: saving, copies, rollback, warm launches, and what they take of memory.

    python scripts/measure_live.py [--rounds 5] [--memory-of 8]

Cold boots and copies are measured in turn, on the same image, so that a busy host is busy for both.
The memory of as many cold machines as copies is measured with `--memory-of`; their boots take most
of the time.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from pycloudlib import Qemu
from pycloudlib.qemu import checkpoint
from pycloudlib.qemu.instance import QemuInstance

TYPE = "c1m1024"
# Tells of each gap between two ticks that is longer than all before, by the guest's clock.
TICKER = """
import time
last, worst, ticks = time.monotonic(), 0.0, 0
while True:
    time.sleep(0.002)
    now = time.monotonic()
    worst, last, ticks = max(worst, now - last), now, ticks + 1
    with open("/run/ticks", "w") as file:
        file.write(f"{ticks} {worst}")
"""


def describe(seconds: list[float]) -> str:
    """Give median and spread."""
    return (
        f"median {statistics.median(seconds):.3f} s, "
        f"{min(seconds):.3f} to {max(seconds):.3f} s over {len(seconds)}"
    )


def timed(work: Callable[[], object]) -> float:
    """Give the seconds that something takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def boot(cloud: Qemu, image: str) -> QemuInstance:
    """Launch a machine and wait until it is ready."""
    instance = cloud.launch(image, TYPE)
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


def pauses(cloud: Qemu, source: QemuInstance, rounds: int) -> tuple[list[float], list[float]]:
    """Save a machine again and again; give durations, and pauses by QEMU's own timestamps.

    Each save has to be of a machine whose memory is its own, or is moved first: both stand still.
    """
    durations, stood = [], []
    for _ in range(rounds):
        with watching(source) as gaps:
            started = time.perf_counter()
            image = cloud.snapshot(source, memory=True)
            durations.append(time.perf_counter() - started)
        stood.extend(gaps)
        cloud.delete_image(image)
    return durations, stood


@contextmanager
def watching(source: QemuInstance) -> Iterator[list[float]]:
    """Collect how long a machine stands still in the block, at each hand-over."""
    import logging  # noqa: PLC0415 - the package tells it in its log

    gaps: list[float] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if source.name in text and "stood still for" in text:
                gaps.append(float(text.partition("stood still for ")[2].split()[0]) / 1000)

    logger = logging.getLogger("pycloudlib.qemu.checkpoint")
    handler = Collector(logging.INFO)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield gaps
    finally:
        logger.removeHandler(handler)


def lost_time(cloud: Qemu, source: QemuInstance) -> tuple[float, float]:
    """Tell how much time a guest loses at a save, and its longest gap between ticks.

    The guest's monotonic clock stands still while it does: what it falls behind ours is the pause,
    as seen from inside.
    """
    source.execute(
        ["systemd-run", "--quiet", "--unit=ticker", "python3", "-c", TICKER], use_sudo=True
    )
    time.sleep(3)
    before = behind(source)
    image = cloud.snapshot(source, memory=True)
    after = behind(source)
    time.sleep(1)
    worst = float(source.execute("cat /run/ticks").split()[1])
    source.execute("systemctl stop ticker", use_sudo=True)
    cloud.delete_image(image)
    return after - before, worst


def behind(source: QemuInstance) -> float:
    """Tell how far the guest's monotonic clock is behind ours, from the shortest of many trips."""
    best = (float("inf"), 0.0)
    for _ in range(40):
        sent = time.monotonic()
        guest = float(source.execute(["cut", "-d", " ", "-f", "1", "/proc/uptime"]))
        came = time.monotonic()
        best = min(best, (came - sent, (sent + came) / 2 - guest))
    return best[1]


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
    parser.add_argument("--memory-of", type=int, default=0)
    arguments = parser.parse_args()
    with Qemu(tag="measure-live") as cloud:
        image = cloud.build_image()
        source = boot(cloud, image)
        print("the first save:", describe([timed(lambda: cloud.snapshot(source, memory=True))]))
        bare = str(checkpoint.save(source.machine, "bare.img", helper=False).image)
        cloud.created_images.append(bare)
        durations, stood = pauses(cloud, source, arguments.rounds)
        print("saves of a copy:", describe(durations), "; it stood still for", describe(stood))
        helped = cloud.snapshot(source, memory=True)

        compare_with_cold(cloud, image, helped, bare, arguments.rounds)
        compare_eight(cloud, helped, arguments.rounds)

        def roll_back() -> None:
            source.rollback(helped)
            source.execute("true")

        rolled = [timed(roll_back) for _ in range(arguments.rounds)]
        print("rollback to its first command:", describe(rolled), flush=True)
        lost, worst = lost_time(cloud, source)
        print(
            f"a save seen from inside: the guest's clock lost {lost * 1000:.0f} ms, its longest "
            f"gap between ticks of 2 ms was {worst * 1000:.0f} ms",
            flush=True,
        )
        measure_memory(cloud, image, helped, arguments.memory_of)


def compare_with_cold(cloud: Qemu, image: str, helped: str, bare: str, rounds: int) -> None:
    """Time copies and cold boots in turn."""
    kinds: dict[str, Callable[[], QemuInstance]] = {
        "copy to its first command, by the helper": lambda: first_command(cloud, helped),
        "copy to its first command, by SSH": lambda: first_command(cloud, bare),
        "cold launch + wait": lambda: boot(cloud, image),
        "copy with an identity of its own, launch + wait": lambda: ready(cloud, helped),
    }
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, start in kinds.items():
            started = time.perf_counter()
            instance = start()
            taken[name].append(time.perf_counter() - started)
            instance.delete()
    base = statistics.median(taken["cold launch + wait"])
    for name, values in taken.items():
        ratio = base / statistics.median(values)
        print(f"{name}: {describe(values)}; {ratio:.0f} times faster", flush=True)


def compare_eight(cloud: Qemu, helped: str, rounds: int) -> None:
    """Time one copy and eight together, in turn."""

    def start(count: int) -> float:
        started = time.perf_counter()
        with ThreadPoolExecutor(count) as threads:
            copies = list(threads.map(lambda _: first_command(cloud, helped), range(count)))
        duration = time.perf_counter() - started
        for copy in copies:
            copy.delete()
        return duration

    taken = {1: [start(1)], 8: [start(8)]}
    for _ in range(rounds - 1):
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


def measure_memory(cloud: Qemu, image: str, saved: str, count: int) -> None:
    """Compare what copies take of memory with what as many cold machines take."""
    if not count:
        return
    with own([first_command(cloud, saved) for _ in range(count)]) as copies:
        time.sleep(2)
        shared = resident(copies)
    at_once = threading.Semaphore(2)
    cold = [cloud.launch(image, TYPE, launch_args=["-S"]) for _ in range(count)]

    def come_up(instance: QemuInstance) -> None:
        with at_once:
            instance.machine.execute("cont")
            instance.wait()

    with own(cold), ThreadPoolExecutor(count) as threads:
        list(threads.map(come_up, cold))
        alone = resident(cold)
    print(
        f"memory of {count}: copies {shared:.0f} MiB, cold machines {alone:.0f} MiB; "
        f"{shared / alone:.0%}"
    )


if __name__ == "__main__":
    main()
