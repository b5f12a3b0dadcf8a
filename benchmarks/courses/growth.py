"""How cost grows: with machines, memory, data on the disk, layers below it, and depth of saves."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.processes import proportional_mib
from benchmarks.worker import Bench, delete, make_bare_image
from pycloudlib.qemu.disk.diskimage import BaseImage, create_overlay, read_layer

if TYPE_CHECKING:
    from pycloudlib.qemu.instance import QemuInstance

MACHINES = (1, 2, 4, 8)
MEMORY_MIB = (512, 1024, 2048, 4096)
DATA_MIB = (0, 256, 1024, 4096)
LAYERS = (1, 4, 16, 64)
SAVES = (1, 2, 4, 8)


def machines(bench: Bench) -> None:
    """Launch machines that do not run, one after the other, and start copies at once."""
    recorder, rounds = bench.recorder, bench.plan.rounds

    def launch() -> list[QemuInstance]:
        return [bench.hold() for _ in range(count)]

    def start() -> list[QemuInstance]:
        return bench.start_copies(saved, count)

    def measure(copies: list[QemuInstance]) -> None:
        memory = sum(proportional_mib(copy.machine.pid or 0) for copy in copies)
        recorder.record("starts-memory", memory)
        delete(*copies)

    with bench.boot() as source:
        saved = bench.cloud.snapshot(source, memory=True)
        bench.start_copy(saved).delete()  # what a process does once is done
        for count in MACHINES:
            recorder.row = str(count)
            recorder.take_turns({"launches": launch}, rounds, lambda made: delete(*made))
            recorder.take_turns({"starts": start}, rounds, measure)


def memory(bench: Bench) -> None:
    """Save machines of more and more memory, and start copies."""
    for mib in MEMORY_MIB:
        sized = replace(bench, plan=replace(bench.plan, type=f"c1m{mib}"))
        with sized.boot() as source:
            saved = bench.cloud.snapshot(source, memory=True)
            time_copies(bench, "memory-copy", saved, f"{mib} MiB")


def nested(bench: Bench) -> None:
    """Save a copy of a saved machine, a copy of that, and so on, and start copies of each."""
    with bench.boot() as source:
        image = bench.cloud.snapshot(source, memory=True)
        for depth in range(1, SAVES[-1] + 1):
            with bench.start_copy(image) as copy:
                image = bench.cloud.snapshot(copy, memory=True)
            if depth in SAVES:
                time_copies(bench, "nested-copy", image, str(depth))


def time_copies(bench: Bench, scenario: str, image: str, row: str) -> None:
    """Start copies of a saved machine, one after the other."""
    bench.recorder.row = row
    ways = {scenario: lambda: bench.start_copy(image)}
    bench.recorder.take_turns(ways, bench.plan.rounds, delete)


def data(bench: Bench) -> None:
    """Snapshot disks with more and more data, in turn with copying them, and launch from that."""
    copy, images = Path(bench.plan.scratch, "copy.qcow2"), [""]

    def snapshot() -> None:
        images.append(bench.cloud.snapshot(machine, clean=False))

    def convert() -> None:
        run_tool("qemu-img", "convert", "-O", "qcow2", machine.instance_path, copy)

    def clean_up(held: QemuInstance | None) -> None:
        copy.unlink(missing_ok=True)
        delete(held)

    ways = {
        "disk-snapshot": snapshot,
        "convert": convert,
        "data-launch": lambda: bench.hold(images[-1]),
    }
    for mib in DATA_MIB:
        bench.recorder.row = f"{mib} MiB"
        with bench.hold() as machine:
            machine.shutdown()
            fill(machine.instance_path, mib)
            bench.recorder.take_turns(ways, bench.plan.rounds, clean_up)


def layers(bench: Bench) -> None:
    """Launch from disks of more and more layers, and read what was written last."""
    disk = Path()

    def read() -> None:
        # 64 MiB in pieces of 4 KiB.
        options = ("-f", "qcow2", "-c", "16384", "-d", "1", "-s", "4096", "-o", "4096M")
        run_tool("qemu-img", "bench", *options, disk)

    ways = {"layers-launch": lambda: bench.hold(str(disk)), "layers-read": read}
    # A disk that is built on others is accepted only below that directory.
    bench.cloud.working_dir.mkdir(parents=True, exist_ok=True)
    for depth in LAYERS:
        bench.recorder.row = str(depth)
        with tempfile.TemporaryDirectory(dir=bench.cloud.working_dir) as name:
            disk = make_chain(Path(name), depth)
            bench.recorder.take_turns(ways, bench.plan.rounds, delete)


def make_chain(directory: Path, depth: int) -> Path:
    """Make a disk of many layers, each with 64 MiB of data."""
    image, disk = make_bare_image(directory), directory / "layer-0.qcow2"
    create_overlay(BaseImage(image, "raw", image.stat().st_size), disk)
    for number in range(1, depth + 1):
        fill(disk, 64)
        above = directory / f"layer-{number}.qcow2"
        create_overlay(read_layer(disk), above)
        disk = above
    return disk


def fill(disk: Path, mib: int) -> None:
    """Write to a disk as a guest would."""
    # One request may be 2 GiB long at most; the image's own data lies below.
    for done in range(0, mib, 1024):
        command = f"write -P 165 {4096 + done}M {min(1024, mib - done)}M"
        run_tool("qemu-io", "-f", "qcow2", "-c", command, disk)


def run_tool(*argv: str | Path) -> None:
    """Run a program of QEMU's."""
    subprocess.run(argv, check=True, capture_output=True)
