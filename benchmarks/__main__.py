"""Measure the original pycloudlib and this package side by side.

    python -m benchmarks dist/*.whl [--rounds 3] [--only NAME ...] [--skip NAME ...]

Everything is kept in one directory: results.json, which is written after each course, report.md,
and the logs of the courses. Names are those of scenarios or of courses; `--list` lists them.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.driver import Driver, Options
from benchmarks.measurements import Results
from benchmarks.report import write_report
from benchmarks.scenarios import BY_KEY, COURSES, SCENARIOS, choose
from pycloudlib.errors import PycloudlibException


def main() -> int:
    """Read the command line, measure, and print the table."""
    arguments = _parser().parse_args()
    if arguments.list:
        for scenario in SCENARIOS:
            print(f"{scenario.course:8} {scenario.key:20} {scenario.title}")
        return 0
    results_file: Path = arguments.output / "results.json"
    if arguments.report:
        print(write_report(Results.read(results_file)))
        return 0
    options = Options(
        output=arguments.output,
        wheel=arguments.wheel,
        rounds=arguments.rounds,
        wanted=choose(tuple(arguments.only), tuple(arguments.skip)),
        side=arguments.side,
        machines=arguments.machines,
        instance_type=arguments.type,
        release=arguments.release,
        dead_limit=arguments.dead_limit,
        append=arguments.append,
    )
    # As after Ctrl-C: courses clean up, and nothing is left.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        results = Driver(options).run()
    except KeyboardInterrupt:
        print(f"interrupted; what was measured before is in {results_file}")
        return 130
    except PycloudlibException as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(write_report(results))
    return 0


def _parser() -> argparse.ArgumentParser:
    names = (*COURSES, *BY_KEY)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("wheel", type=Path, nargs="?", help="this package's wheel, from dist/")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--only", nargs="+", default=[], choices=names, metavar="NAME", help="scenarios or courses"
    )
    parser.add_argument("--skip", nargs="+", default=[], choices=names, metavar="NAME")
    parser.add_argument("--side", choices=("original", "ours"), help="measure one package alone")
    parser.add_argument("--machines", type=int, default=8, help="how many at once (%(default)s)")
    parser.add_argument("--type", default="c1m1024", help="instance type (default: %(default)s)")
    parser.add_argument("--release", default="bookworm", help="Debian release (%(default)s)")
    parser.add_argument(
        "--dead-limit",
        type=float,
        default=300,
        metavar="SECONDS",
        help="how long the error of a dead QEMU is waited for (%(default)s)",
    )
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="%(default)s")
    parser.add_argument("--append", action="store_true", help="add to the results that are there")
    parser.add_argument("--report", action="store_true", help="only print what was measured before")
    parser.add_argument("--list", action="store_true", help="list courses and scenarios")
    return parser


if __name__ == "__main__":
    sys.exit(main())
