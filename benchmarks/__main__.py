"""Measure this package: `python -m benchmarks NAME`, with `--help` for its options.

Everything is kept in one directory: NAME.json, which is written after each run, NAME.md, and the
logs of the courses.
"""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.driver import Driver
from benchmarks.plan import Plan
from benchmarks.report import write_report
from benchmarks.results import Results
from benchmarks.scenarios import BY_KEY, PROGRAMS, Program
from pycloudlib.errors import PycloudlibException

_OF_ALL = ("only", "skip", "output", "append", "report")


def main() -> int:
    """Read the command line, measure, and print the tables."""
    parser = make_parser()
    given = vars(parser.parse_args())
    if given.pop("list"):
        for name, program in PROGRAMS.items():
            print(f"{name}: {program.title}")
            for key in program.scenarios:
                print(f"  {BY_KEY[key].course:9} {key:20} {BY_KEY[key].title}")
        return 0
    name = given.pop("name")
    if name is None:
        parser.error("name what to measure; --list shows what there is")
    plan = Plan.from_options(given)
    results_file = Path(plan.output, f"{name}.json")
    if plan.report:
        print(write_report(Results.read(results_file)))
        return 0
    # As after Ctrl-C: courses clean up, and nothing is left.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    driver = Driver(name, plan)
    try:
        results = driver.run()
    except KeyboardInterrupt:
        print(f"interrupted; what was measured before is in {results_file}")
        return 130
    except (PycloudlibException, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(write_report(results))
    return int(driver.failed)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--list", action="store_true", help="list programs and what they measure")
    programs = parser.add_subparsers(dest="name", metavar="NAME")
    for name, program in PROGRAMS.items():
        _add_options(programs.add_parser(name, help=program.title), program)
    return parser


def _add_options(parser: argparse.ArgumentParser, program: Program) -> None:
    """Add the options of a program: fields of the plan, with the program's own defaults."""
    names = (*dict.fromkeys(program.courses), *program.scenarios)
    choices = {"only": names, "skip": names, "side": program.sides, "step": tuple(program.steps)}
    for option in fields(Plan):
        if option.name not in (*program.options, *_OF_ALL):
            continue
        default: Any = program.options.get(option.name, option.default)
        flag, text = f"--{option.name.replace('_', '-')}", option.metadata["help"]
        if option.name == "wheel":
            parser.add_argument("wheel", nargs="?", default=default, help=text)
        elif isinstance(default, bool):
            parser.add_argument(flag, action="store_true", help=text)
        else:
            several = isinstance(default, tuple)
            kind = type((*default, "")[0] if several else default)
            shown = " ".join(map(str, default)) if several else default
            parser.add_argument(
                flag,
                type=kind,
                default=default,
                nargs="+" if several else None,
                choices=choices.get(option.name),
                metavar=option.name.upper(),
                help=f"{text} (default: {shown})" if shown else text,
            )


if __name__ == "__main__":
    sys.exit(main())
