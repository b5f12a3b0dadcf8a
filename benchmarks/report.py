"""From measurements to a table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.measurements import Results, Run
from benchmarks.scenarios import (
    BY_KEY,
    MANY,
    NAMES,
    ORIGINAL,
    OURS,
    OWN_COURSES,
    SCENARIOS,
    Scenario,
)


@dataclass(frozen=True, slots=True)
class Figure:
    """What a scenario came to over all rounds.

    Attributes:
        values: The figure of each round, in the scenario's unit.
        problems: What happened instead, each once.
    """

    values: tuple[float, ...]
    problems: tuple[str, ...]

    @property
    def median(self) -> float | None:
        """The median over the rounds; None if there is no value."""
        return statistics.median(self.values) if self.values else None


def gather(runs: Iterable[Run], side: str, scenario: str) -> Figure:
    """Collect what all rounds of a package gave for a scenario."""
    found = [
        measurement
        for run in runs
        if run.side == side
        for measurement in run.measurements
        if measurement.scenario == scenario
    ]
    values = tuple(item.figure for item in found if item.figure is not None)
    return Figure(values, tuple(dict.fromkeys(item.problem for item in found if item.problem)))


def ratio(base: Figure, figure: Figure) -> float | None:
    """Say how many times less a figure is than its base; None where one is missing."""
    if base.median is None or not figure.median:
        return None
    return base.median / figure.median


def write_figure(scenario: Scenario, figure: Figure) -> str:
    """Write median, spread and what went wrong."""
    parts = []
    if figure.median is not None:
        small = scenario.unit == "s" and figure.median < 0.1
        unit, factor = ("ms", 1000) if small else (scenario.unit, 1)
        text = f"{write_number(figure.median * factor)} {unit}"
        if len(figure.values) > 1:
            least, most = (write_number(end(figure.values) * factor) for end in (min, max))
            text += f" ({least}-{most})"
        if scenario.bytes and figure.median:
            text += f", {write_number(scenario.bytes / figure.median / 1e6)} MB/s"
        parts.append(text)
    parts += figure.problems
    return "; ".join(parts) or "not measured"


def write_ratio(value: float | None) -> str:
    """Write how many times less something is; below one, it is more."""
    return "" if value is None else write_number(value)


def write_number(value: float) -> str:
    """Write a number with three digits that mean something."""
    if value >= 100:
        return f"{value:.0f}"
    if value >= 10:
        return f"{value:.1f}"
    if value >= 0.0995:
        return f"{value:.2f}"
    return f"{value:.3f}"


def write_report(results: Results) -> str:
    """Write all of it, in Markdown."""
    both, alone = _rows(results.runs)
    lines = ["# Measured side by side", ""]
    lines += [f"- {name}: {value}" for name, value in results.facts.items()]
    lines += [
        "",
        "Medians of the rounds, with the least and the most; a ratio of 2 means half as much.",
    ]
    if both:
        head = ("scenario", *NAMES.values(), "ratio", "rounds")
        lines += ["", *_table(head, both)]
    if alone:
        lines += ["", "What only this package does, against its own cold boot:", ""]
        lines += _table(("what", "took", "ratio", "rounds"), alone)
    lines += _notes(results.runs)
    leftovers = sum(run.leftovers for run in results.runs if run.side == ORIGINAL)
    if leftovers:
        lines += ["", f"QEMU processes that the original left running: {leftovers}."]
    text = "\n".join(lines) + "\n"
    return text.replace(MANY, results.facts.get("machines at once", "many"))


def _notes(runs: Sequence[Run]) -> list[str]:
    """Write what else was told, each once."""
    told = [
        f"- {BY_KEY[measurement.scenario].title}, {NAMES[run.side]}: {measurement.note}"
        for run in runs
        for measurement in run.measurements
        if measurement.note
    ]
    return ["", "What was said:", "", *dict.fromkeys(told)] if told else []


def _rows(runs: Sequence[Run]) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Make the rows of both tables, of the scenarios that were measured."""
    both: list[tuple[str, ...]] = []
    alone: list[tuple[str, ...]] = []
    told = {measurement.scenario for run in runs for measurement in run.measurements}
    for scenario in SCENARIOS:
        if scenario.key not in told:
            continue
        base = BY_KEY.get(scenario.base, scenario)
        ours = gather(runs, OURS, scenario.key)
        if base.course in OWN_COURSES:
            own_base = gather(runs, OURS, scenario.base)
            compared = write_ratio(ratio(own_base, ours))
            alone.append(
                (scenario.title, write_figure(scenario, ours), compared, str(len(ours.values)))
            )
            continue
        original = gather(runs, ORIGINAL, base.key)
        counts = sorted({len(original.values), len(ours.values)})
        both.append(
            (
                scenario.title,
                write_figure(scenario, original),
                write_figure(scenario, ours),
                write_ratio(ratio(original, ours)),
                "-".join(map(str, counts)),
            )
        )
    return both, alone


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, tuple("---" for _ in head), *rows)]
