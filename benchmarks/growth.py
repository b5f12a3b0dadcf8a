"""Measure how cost grows: with machines, memory, size of the image, and depth of snapshots.

    python -m benchmarks.growth [--rounds 3] [--output DIRECTORY] [PART ...]

Four sizes each, of this package alone; medians. Writes growth.json and growth.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.processes import proportional_mib
from benchmarks.report import write_number
from pycloudlib import Qemu
from pycloudlib._base.files import replace_atomically
from pycloudlib.qemu.instance import QemuInstance
from scripts.figures import timed
from scripts.measure_live import boot, first_command, own
from scripts.measure_snapshots import DEPTHS, SIZES_MIB, fill, make_chain, make_image

MACHINES = (1, 2, 4, 8)
MEMORY_MIB = (512, 1024, 2048, 4096)
LIVE_DEPTHS = (1, 2, 4, 8)
TYPE = "c1m1024"


@dataclass(frozen=True, slots=True)
class Growth:
    """How cost grows with something.

    Attributes:
        title: What grows.
        columns: What is measured, with its unit.
        rows: Each size, by its name, and the median of each column.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...]], ...]

    def write(self) -> str:
        """Write it as a table, in Markdown."""
        lines = [(self.title, *self.columns), ("---",) * (len(self.columns) + 1)]
        lines += [(size, *map(write_number, values)) for size, values in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured with.

    Attributes:
        cloud: The cloud.
        image: The image that machines boot from.
        directory: For files of the measurement.
        rounds: How often each figure is taken.
    """

    cloud: Qemu
    image: str
    directory: Path
    rounds: int

    def median(self, step: Callable[[], float]) -> float:
        """Take a figure as often as is wanted; give the median."""
        return statistics.median(step() for _ in range(self.rounds))

    def time_launch(self, image: str) -> float:
        """Give the seconds of a launch of a machine whose processors do not run."""
        made: list[QemuInstance] = []
        with own(made):
            return timed(lambda: made.append(self.cloud.launch(image, launch_args=["-S"])))

    def time_copy(self, image: str) -> float:
        """Give the seconds of a copy of a saved machine until its first command is done."""
        made: list[QemuInstance] = []
        with own(made):
            return timed(lambda: made.append(first_command(self.cloud, image)))

    @contextmanager
    def saved(self) -> Iterator[str]:
        """Boot a machine and save it; give the image."""
        with boot(self.cloud, self.image, TYPE) as source:
            yield self.cloud.snapshot(source, memory=True)


def measure_machines(bench: Bench) -> Growth:
    """Launch many machines one after the other, and start many copies at once."""
    rows = []
    with bench.saved() as saved:
        bench.time_copy(saved)  # what a process does once is done
        for count in MACHINES:
            memory: list[float] = []

            def start(count: int = count, memory: list[float] = memory) -> float:
                made: list[QemuInstance] = []
                with own(made):
                    with ThreadPoolExecutor(count) as threads:
                        took = timed(
                            lambda: made.extend(
                                threads.map(
                                    lambda _: first_command(bench.cloud, saved), range(count)
                                )
                            )
                        )
                    memory.append(sum(proportional_mib(copy.machine.pid or 0) for copy in made))
                return took

            def launch(count: int = count) -> float:
                made: list[QemuInstance] = []
                with own(made):
                    return timed(
                        lambda: made.extend(
                            bench.cloud.launch(bench.image, TYPE, launch_args=["-S"])
                            for _ in range(count)
                        )
                    )

            launched, copied = bench.median(launch), bench.median(start)
            rows.append((str(count), (launched, copied, statistics.median(memory))))
    columns = ("`launch()` of all, s", "copies at once, s", "memory of the copies (Pss), MiB")
    return Growth("machines", columns, tuple(rows))


def measure_memory(bench: Bench) -> Growth:
    """Copy machines of more and more memory."""
    rows = []
    for mib in MEMORY_MIB:
        with boot(bench.cloud, bench.image, f"c1m{mib}") as source:
            saved = bench.cloud.snapshot(source, memory=True)

            def copy(saved: str = saved) -> float:
                return bench.time_copy(saved)

            rows.append((f"{mib} MiB", (bench.median(copy),)))
    return Growth("memory", ("copy, s",), tuple(rows))


def measure_image(bench: Bench) -> Growth:
    """Snapshot disks with more and more data, and launch from the snapshots."""
    rows = []
    for mib in SIZES_MIB:
        with bench.cloud.launch(bench.image, launch_args=["-S"]) as machine:
            machine.shutdown()
            fill(machine.instance_path, mib)
            snapshots, launches = [], []
            for _ in range(bench.rounds):
                made: list[str] = []

                def snapshot(machine: QemuInstance = machine, made: list[str] = made) -> None:
                    made.append(bench.cloud.snapshot(machine, clean=False))

                snapshots.append(timed(snapshot))
                launches.append(bench.time_launch(made[0]))
            figures = (statistics.median(snapshots), statistics.median(launches))
            rows.append((f"{mib} MiB", figures))
    return Growth(
        "data added to the image", ("`snapshot()`, s", "`launch()` of it, s"), tuple(rows)
    )


def measure_depth(bench: Bench) -> Growth:
    """Launch from disks of more and more layers."""
    rows = []
    for depth in DEPTHS:
        with tempfile.TemporaryDirectory(dir=bench.directory) as below:
            disk = str(make_chain(make_image(bench.directory), Path(below), depth))

            def launch(disk: str = disk) -> float:
                return bench.time_launch(disk)

            rows.append((str(depth), (bench.median(launch),)))
    return Growth("layers of a disk", ("`launch()`, s",), tuple(rows))


def measure_live_depth(bench: Bench) -> Growth:
    """Save a copy of a copy of a saved machine, and so on, and start copies of each."""
    rows = []
    with bench.saved() as saved:
        image = saved
        for depth in range(1, LIVE_DEPTHS[-1] + 1):
            with first_command(bench.cloud, image) as copy:
                image = bench.cloud.snapshot(copy, memory=True)
            if depth in LIVE_DEPTHS:

                def start(image: str = image) -> float:
                    return bench.time_copy(image)

                rows.append((str(depth), (bench.median(start),)))
    return Growth("saves of copies of saves", ("copy, s",), tuple(rows))


PARTS: dict[str, Callable[[Bench], Growth]] = {
    "machines": measure_machines,
    "memory": measure_memory,
    "image": measure_image,
    "depth": measure_depth,
    "live-depth": measure_live_depth,
}


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="%(default)s")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    measured: dict[str, Growth] = {}
    with Qemu(tag="growth") as cloud:
        cloud.working_dir.mkdir(parents=True, exist_ok=True)
        # A disk that is built on others is believed only below that directory.
        with tempfile.TemporaryDirectory(dir=cloud.working_dir) as name:
            bench = Bench(cloud, cloud.build_image(), Path(name), arguments.rounds)
            for part in arguments.parts or PARTS:
                measured[part] = PARTS[part](bench)
                print(measured[part].write(), flush=True)
                keep(measured, output)


def keep(measured: dict[str, Growth], output: Path) -> None:
    """Write what was measured so far."""
    kept = {part: asdict(growth) for part, growth in measured.items()}
    with replace_atomically(output / "growth.json") as temporary:
        temporary.write_text(json.dumps(kept, indent=1) + "\n")
    with replace_atomically(output / "growth.md") as temporary:
        temporary.write_text("\n".join(growth.write() for growth in measured.values()))


if __name__ == "__main__":
    main()
