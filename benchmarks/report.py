"""From measurements to a table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from benchmarks.results import Results, Run
from benchmarks.scenarios import (
    BEFORE,
    BY_KEY,
    MANY,
    NAMES,
    NOW,
    ORIGINAL,
    OURS,
    OWN_COURSES,
    ROWS,
    SCENARIOS,
    Scenario,
)


@dataclass(frozen=True, slots=True)
class Figure:
    """The figures of a scenario over all rounds.

    Attributes:
        values: The figure of each round, or all of a single one, in the scenario's unit.
        problems: What happened instead, each once.
    """

    values: tuple[float, ...]
    problems: tuple[str, ...]

    @property
    def median(self) -> float | None:
        """Their median; None if there is no value."""
        return statistics.median(self.values) if self.values else None


_NONE = Figure((), ())
_Rows: TypeAlias = list[tuple[str, ...]]
# The row of a table ("" where its rows are scenarios), a scenario, a side.
_Cell: TypeAlias = tuple[str, str, str]


def gather(runs: Iterable[Run], side: str, scenario: str, row: str = "") -> Figure:
    """Collect the figures of all rounds, or all values of a single one, or of all where pooled."""
    found = [
        measurement
        for run in runs
        if run.side == side
        for measurement in run.measurements
        if (measurement.scenario, measurement.row) == (scenario, row)
    ]
    values = tuple(item.figure for item in found if item.figure is not None)
    if len(found) == 1 or BY_KEY[scenario].pooled:
        values = tuple(value for item in found for value in item.values)
    return Figure(values, tuple(dict.fromkeys(item.problem for item in found if item.problem)))


def ratio(base: Figure, figure: Figure) -> float | None:
    """Return how many times less a figure is than its base; None where one is missing."""
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
    runs = results.runs
    cells = dict.fromkeys(
        (item.row, item.scenario, run.side) for run in runs for item in run.measurements
    )
    figures = {cell: gather(runs, cell[2], cell[1], cell[0]) for cell in cells}
    both, alone = _list_scenarios(figures)
    lines = ["# What was measured", ""]
    lines += [f"- {name}: {value}" for name, value in results.facts.items()]
    lines += ["", "Medians, with the least and the most; a ratio of 2 means half as much."]
    if both:
        head = ("scenario", NAMES[ORIGINAL], NAMES[OURS], "ratio", "times")
        lines += ["", *_table(head, both)]
    if alone:
        lines += ["", "What only this package does, against its own base:", ""] if both else [""]
        lines += _table(("what", "took", "ratio", "times"), alone)
    for course, title in ROWS.items():
        lines += _list_rows(figures, course, title)
    lines += _notes(runs)
    leftovers = sum(run.leftovers for run in runs if run.side == ORIGINAL)
    if leftovers:
        lines += ["", f"QEMU processes that the original left running: {leftovers}."]
    text = "\n".join(lines) + "\n"
    return text.replace(MANY, results.facts.get("machines at once", "many"))


def _notes(runs: Sequence[Run]) -> list[str]:
    """Write what else there is to say, each once."""
    notes = [
        f"- {BY_KEY[measurement.scenario].title}, {NAMES[run.side]}: {measurement.note}"
        for run in runs
        for measurement in run.measurements
        if measurement.note
    ]
    return ["", "Notes:", "", *dict.fromkeys(notes)] if notes else []


def _list_scenarios(figures: Mapping[_Cell, Figure]) -> tuple[_Rows, _Rows]:
    """Make the rows of the tables whose rows are scenarios: of both packages, of this one alone."""
    both: _Rows = []
    alone: _Rows = []
    measured = {key for row, key, _ in figures if not row}
    compared = any(side == ORIGINAL for _, _, side in figures)
    for scenario in SCENARIOS:
        if scenario.key not in measured:
            continue
        # The first base that was measured, or the last: then the original's is missing.
        bases = [key for key in scenario.base if key in measured] or scenario.base[-1:]
        base = BY_KEY[bases[0]] if bases else scenario
        ours = figures.get(("", scenario.key, OURS), _NONE)
        if base.course in OWN_COURSES or not compared:
            own = _NONE if base is scenario else figures.get(("", base.key, OURS), _NONE)
            shown = (write_figure(scenario, ours), write_ratio(ratio(own, ours)))
            alone.append((scenario.title, *shown, str(len(ours.values))))
            continue
        original = figures.get(("", base.key, ORIGINAL), _NONE)
        counts = sorted({len(original.values), len(ours.values)})
        shown = (write_figure(scenario, original), write_figure(scenario, ours))
        compare = write_ratio(ratio(original, ours))
        both.append((scenario.title, *shown, compare, "-".join(map(str, counts))))
    return both, alone


def _list_rows(figures: Mapping[_Cell, Figure], course: str, title: str) -> list[str]:
    """Write the table of a course whose rows are sizes or the like, and its columns scenarios."""
    cells = [cell for cell in figures if cell[0] and BY_KEY[cell[1]].course == course]
    columns = [
        (scenario, side)
        for scenario in SCENARIOS
        for side in (OURS, BEFORE, NOW)
        if any(cell[1:] == (scenario.key, side) for cell in cells)
    ]
    if not columns:
        return []
    names = [scenario.title for scenario, _ in columns]
    keys = [(scenario.key, side) for scenario, side in columns]
    if len({side for _, side in columns}) > 1:
        # The first scenario is compared with the other version, otherwise with its base.
        names = [f"{scenario.title}: {NAMES[side]}" for scenario, side in columns]
        pairs = [(keys[0], (keys[0][0], NOW))]
    else:
        pairs = [((base, side), (it.key, side)) for it, side in columns for base in it.base]
    pairs = [pair for pair in pairs if set(pair) <= set(keys)][:1]
    rows: _Rows = []
    for row in dict.fromkeys(row for row, _, _ in cells):
        shown = {(it.key, side): figures.get((row, it.key, side), _NONE) for it, side in columns}
        texts = [
            "" if it is _NONE else write_figure(BY_KEY[key[0]], it) for key, it in shown.items()
        ]
        ratios = [write_ratio(ratio(shown[base], shown[key])) for base, key in pairs]
        rows.append((row, *texts, *ratios))
    return ["", *_table((title, *names, "ratio")[: len(rows[0])], rows)]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, tuple("---" for _ in head), *rows)]
