"""What is to be measured, and with what; and the order in which things take turns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

_T = TypeVar("_T")


def in_turn(items: Sequence[_T], number: int) -> Sequence[_T]:
    """Return the order of a round, counted from 1: A B, in the next round B A.

    What changes slowly on the host falls on all alike.
    """
    return items if number % 2 else items[::-1]


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True)
class Plan:
    """The options of the command line, and what the driver adds for a course; passed as JSON."""

    course: str = ""
    image: str = _option("", "path of the image that machines boot from")
    config_file: str = _option("", "configuration of the package that is measured")
    scratch: str = _option("", "directory for the course's own files")
    row: str = _option("", "row of the table that the figures belong to, if it has several")
    wanted: tuple[str, ...] = _option((), "keys of the scenarios to measure")

    only: tuple[str, ...] = _option((), "measure only these scenarios or courses")
    skip: tuple[str, ...] = _option((), "leave out these scenarios or courses")
    output: str = _option("build/bench", "directory of everything that is kept")
    append: bool = _option(False, "add to the results that are there")
    report: bool = _option(False, "only print what was measured before")

    wheel: str = _option("", "this package's wheel, from dist/")
    before: str = _option("", "a checkout of the other version")
    side: str = _option("", "measure one side alone")
    rounds: int = _option(3, "how often everything is repeated")
    release: tuple[str, ...] = _option(("bookworm",), "Debian releases of the images")
    type: str = _option("c1m1024", "instance type")
    machines: int = _option(8, "how many machines run at once")
    dead_limit: float = _option(300.0, "seconds to wait for the error of a dead QEMU")
    boots: int = _option(1, "how many machines boot")
    tests: int = _option(30, "how many tests the suite has")
    workers: tuple[int, ...] = _option((1, 2), "how many processes run the suite")
    seconds: tuple[float, ...] = _option((0.0, 2.0), "how long the command of a test takes")
    mib: int = _option(64, "size of the file in MiB")
    port: int = _option(0, "an SSH server on the loopback, instead of a machine")
    user: str = _option("root", "user name at that server")
    key: str = _option("", "private key for it")
    memory: tuple[int, ...] = _option((512, 1024, 2048, 4096), "MiB of memory of the machines")
    step: tuple[str, ...] = _option((), "steps to measure")
    bare: bool = _option(False, "measure machines without a guest")
    minutes: float = _option(30.0, "how long it takes")
    kills: float = _option(0.3, "share of the machines whose QEMU is killed")

    def to_argument(self) -> str:
        """Write it as one argument."""
        return json.dumps(asdict(self))

    @classmethod
    def from_argument(cls, text: str) -> Plan:
        """Read it."""
        return cls.from_options(json.loads(text))

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Plan:
        """Make it of options whose lists are not yet tuples."""
        data: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in options.items()
        }
        return cls(**data)
