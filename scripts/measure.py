"""Measure the package: how large an installation is, and how long an import takes.

python -m scripts.measure dist/*.whl
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from pathlib import Path

from scripts.wheel_install import Installation, open_installation

IMPORTS = 10
SHOWN = 6


def measure_import(installation: Installation) -> list[float]:
    """Import the package in interpreters of their own; give the milliseconds of each import."""
    code = (
        "import time; start = time.perf_counter(); import pycloudlib;"
        "print((time.perf_counter() - start) * 1000)"
    )
    installation.run(code)  # the disk's caches are warm from here on
    return [float(installation.run(code)) for _ in range(IMPORTS)]


def measure_parts(installation: Installation) -> Counter[str]:
    """Give the bytes of each top-level entry of the installation."""
    sizes: Counter[str] = Counter()
    for file in installation.site_packages.rglob("*"):
        if file.is_file():
            sizes[file.relative_to(installation.site_packages).parts[0]] += file.stat().st_size
    return sizes


def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    wheel: Path = parser.parse_args().wheel
    with open_installation(wheel) as installation:
        times = measure_import(installation)
        parts = measure_parts(installation)
    largest = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in parts.most_common(SHOWN))
    print(f"wheel         {wheel.stat().st_size / 1e3:.0f} kB")
    print(f"installation  {parts.total() / 1e6:.1f} MB with all dependencies; {largest}")
    print(
        f"import        {statistics.median(times):.0f} ms, the median of {IMPORTS} fresh "
        f"interpreters ({min(times):.0f} to {max(times):.0f} ms)"
    )


if __name__ == "__main__":
    main()
