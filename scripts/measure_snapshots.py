"""Measure what disk snapshots cost, against copying the disk, and what long chains cost.

python -m scripts.measure_snapshots
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from pycloudlib import Qemu
from pycloudlib.qemu.disk.diskimage import BaseImage, create_overlay, read_layer
from scripts.figures import timed

SIZES_MIB = (0, 256, 1024, 4096)
DEPTHS = (1, 4, 16, 64)
ROUNDS = 5


def fill(disk: Path, mib: int) -> None:
    """Write to a disk as a guest would."""
    # One request may be 2 GiB long at most; the image's own data lies below.
    for done in range(0, mib, 1024):
        command = f"write -P 165 {4096 + done}M {min(1024, mib - done)}M"
        argv: list[str | Path] = ["qemu-io", "-f", "qcow2", "-c", command, disk]
        subprocess.run(argv, check=True, capture_output=True)


def convert(disk: Path, target: Path) -> None:
    """Copy a disk as `qemu-img` does."""
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", disk, target], check=True)
    target.unlink()


def make_image(directory: Path) -> Path:
    """Make a raw disk with a boot sector that stops the processor."""
    image = directory / "tiny.img"
    image.write_bytes(b"\xfa\xf4\xeb\xfd".ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
    return image


def measure_sizes(cloud: Qemu, directory: Path) -> None:
    """Compare a snapshot with a copy of the same disk, in turn."""
    image = cloud.build_image()
    print("data added to the image   snapshot   qemu-img convert   ratio (medians)")
    for mib in SIZES_MIB:
        machine = cloud.launch(image, launch_args=["-S"])
        machine.shutdown()
        fill(machine.instance_path, mib)
        copies, snapshots = [], []
        for _ in range(ROUNDS):
            disk, target = machine.instance_path, directory / "copy.qcow2"
            copies.append(timed(lambda disk=disk, target=target: convert(disk, target)))  # type: ignore[misc]
            snapshots.append(timed(lambda machine=machine: cloud.snapshot(machine, clean=False)))  # type: ignore[misc]
        ratio = statistics.median(copies) / statistics.median(snapshots)
        print(
            f"{mib:8} MiB             {statistics.median(snapshots) * 1000:7.0f} ms   "
            f"{statistics.median(copies) * 1000:10.0f} ms     {ratio:7.0f}"
        )
        machine.delete()


def make_chain(image: Path, directory: Path, depth: int) -> Path:
    """Make a disk of many layers, each of which holds a part of the data."""
    disk = directory / "layer-0.qcow2"
    create_overlay(BaseImage(image, "raw", image.stat().st_size), disk)
    for number in range(1, depth + 1):
        fill(disk, 64)
        above = directory / f"layer-{number}.qcow2"
        create_overlay(read_layer(disk), above)
        disk = above
    return disk


def measure_depths(cloud: Qemu, directory: Path) -> None:
    """Time opening and reading disks of more and more layers."""
    print("layers   launch()   64 MiB read in 4 KiB pieces (medians)")
    for depth in DEPTHS:
        with tempfile.TemporaryDirectory(dir=cloud.working_dir) as below:
            disk = make_chain(make_image(directory), Path(below), depth)
            # fmt: off
            bench: list[str | Path] = [
                "qemu-img", "bench", "-f", "qcow2", "-c", "16384", "-d", "1",
                "-s", "4096", "-o", "4096M", disk,
            ]
            # fmt: on
            reads = [
                timed(lambda: subprocess.run(bench, check=True, capture_output=True))  # noqa: B023
                for _ in range(ROUNDS)
            ]
            launches = []
            for _ in range(ROUNDS):
                started = time.perf_counter()
                machine = cloud.launch(str(disk), launch_args=["-S"])
                launches.append(time.perf_counter() - started)
                machine.delete()
        print(
            f"{depth:6}   {statistics.median(launches) * 1000:5.0f} ms   "
            f"{statistics.median(reads) * 1000:8.0f} ms"
        )


def main() -> None:
    """Measure and print."""
    with Qemu(tag="measure") as cloud, tempfile.TemporaryDirectory() as directory:
        cloud.working_dir.mkdir(parents=True, exist_ok=True)
        measure_sizes(cloud, Path(directory))
        measure_depths(cloud, Path(directory))


if __name__ == "__main__":
    main()
