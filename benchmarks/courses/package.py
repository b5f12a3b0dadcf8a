"""The size of an installation, and how long an import takes."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

from benchmarks.worker import Bench

TIMES = 10
SHOWN = 6
CODE = (
    "import time; start = time.perf_counter(); import pycloudlib;print(time.perf_counter() - start)"
)


def run(bench: Bench) -> None:
    """Measure the installation that this process is of."""
    if bench.recorder.wants("import"):
        time_import()  # the disk's caches are warm from here on
        bench.recorder.record("import", *(time_import() for _ in range(TIMES)))
    parts = measure_parts(Path(sysconfig.get_path("purelib")))
    largest = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in parts.most_common(SHOWN))
    bench.recorder.record("size", sum(parts.values()) / 1e6, note=f"of these MB: {largest}")


def time_import() -> float:
    """Import the package in a fresh interpreter; return the seconds."""
    # -I: neither the environment's nor the directory's modules are seen.
    argv = [sys.executable, "-I", "-c", CODE]
    return float(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)


def measure_parts(directory: Path) -> Counter[str]:
    """Return the bytes of each entry of a directory, compiled files included."""
    sizes: Counter[str] = Counter()
    for file in directory.rglob("*"):
        if file.is_file():
            sizes[file.relative_to(directory).parts[0]] += file.stat().st_size
    return sizes
