"""What was measured, as values and as JSON; used by the courses, too."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Measurement:
    """One scenario, measured once.

    Attributes:
        scenario: Key of the scenario.
        values: What was measured, in the scenario's unit; several where it is quick to repeat.
        problem: What happened instead, if it could not be measured.
        note: What else there is to say, such as the error that was expected.
        row: Row of the scenario's table, if it has several.
    """

    scenario: str
    values: tuple[float, ...] = ()
    problem: str = ""
    note: str = ""
    row: str = ""

    @property
    def figure(self) -> float | None:
        """The median of the values; None if there is none."""
        return statistics.median(self.values) if self.values else None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measurement:
        """Read one as `asdict` returns it."""
        return cls(**{**data, "values": tuple(data["values"])})


@dataclass(frozen=True, slots=True)
class Run:
    """One course, or one of its steps, run once on one side.

    Attributes:
        side: Which package or version.
        course: Which course.
        round: In which round, from 1 on.
        began: When, as ISO 8601.
        seconds: How long all of it took.
        load: The host's load average over one minute before it began.
        measurements: What was measured.
        leftovers: How many QEMU processes the driver had to end after it.
    """

    side: str
    course: str
    round: int
    began: str
    seconds: float
    load: float
    measurements: tuple[Measurement, ...]
    leftovers: int = 0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Run:
        """Read one as `asdict` returns it."""
        measurements = tuple(Measurement.from_json(item) for item in data["measurements"])
        return cls(**{**data, "measurements": measurements})


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that was measured, and where.

    Attributes:
        facts: What one has to know of the host, the image and the packages.
        runs: The runs, in their order.
    """

    facts: Mapping[str, str]
    runs: tuple[Run, ...] = ()

    def to_json(self) -> str:
        """Write it."""
        data = {"facts": dict(self.facts), "runs": [asdict(run) for run in self.runs]}
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read what `to_json` has written."""
        data = json.loads(path.read_text())
        return cls(data["facts"], tuple(Run.from_json(run) for run in data["runs"]))
