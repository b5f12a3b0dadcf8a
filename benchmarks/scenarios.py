"""What is measured: each scenario, its unit, and the course that measures it."""

from __future__ import annotations

from dataclasses import dataclass

ORIGINAL, OURS = "original", "ours"
SIDES = (ORIGINAL, OURS)
NAMES = {ORIGINAL: "original", OURS: "this package"}

MANY = "{machines}"
"""Stands in titles for the number of machines where there are many at once."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """Something that is measured.

    Attributes:
        key: What it is called in results and options.
        title: What it is called in tables.
        unit: Unit of its values: s, MB or MiB; less is better.
        course: The course that measures it.
        bytes: How much is transferred; its rate is told, too.
        base: For what only this package does: the scenario that it is compared with; it may be
            the original's, too.
    """

    key: str
    title: str
    unit: str
    course: str
    bytes: int = 0
    base: str = ""


SCENARIOS = (
    Scenario("import", "`import pycloudlib`", "s", "package"),
    Scenario("size", "installed size, with dependencies", "MB", "package"),
    Scenario("launch", "`launch()` until it returns", "s", "one"),
    Scenario("boot", "`launch()` and `wait()`, cold", "s", "one"),
    Scenario("fast", "the same with `fast_boot=True`", "s", "fast", base="boot"),
    Scenario("execute-first", '`execute("true")`, the first', "s", "one"),
    Scenario("execute", '`execute("true")`, each following', "s", "one"),
    Scenario("output", "output of 10 MB", "s", "one", bytes=10_000_000),
    Scenario("push", "`push_file()` of 64 MiB", "s", "one", bytes=64 << 20),
    Scenario("pull", "`pull_file()` of 64 MiB", "s", "one", bytes=64 << 20),
    Scenario("qemu-memory", "resident memory of QEMU", "MiB", "one"),
    Scenario("python-memory", "resident memory of the Python process", "MiB", "one"),
    Scenario("restart", "`restart()`", "s", "one"),
    Scenario("power-cycle", "`shutdown()` and `start()`", "s", "one"),
    Scenario("snapshot", "`snapshot(clean=False)` of a running machine", "s", "one"),
    Scenario("snapshot-boot", "`launch()` of the snapshot and `wait()`", "s", "one"),
    Scenario("delete", "`delete()` of a running machine", "s", "one"),
    Scenario("dead", "a QEMU that ends at once, until the error", "s", "dead"),
    Scenario("many-launch", "{machines} machines, until launched", "s", "many"),
    Scenario("many-boot", "{machines} machines, until all are ready", "s", "many"),
    Scenario("many-qemu-memory", "memory of QEMU (Pss), each of {machines}", "MiB", "many"),
    Scenario("many-python-memory", "memory of Python, each of {machines}", "MiB", "many"),
    Scenario("ours-boot", "`launch()` and `wait()`, cold: the base", "s", "ours"),
    Scenario("warm", "`launch(warm=True)` and `wait()`", "s", "ours", base="ours-boot"),
    Scenario("copy", "a copy, until its first command is done", "s", "ours", base="ours-boot"),
    Scenario("copies", "{machines} copies at once, likewise", "s", "ours", base="ours-boot"),
    Scenario("rollback", "`rollback()`, until a command is done", "s", "ours", base="ours-boot"),
    Scenario("save", "`snapshot(memory=True)`", "s", "ours", base="ours-boot"),
    Scenario("save-first", "the first one, which starts a helper", "s", "ours", base="ours-boot"),
    Scenario("fast-prepare", "once for an image: a fast boot's starting point", "s", "fast"),
    Scenario("warm-prepare", "once: what a warm launch starts from", "s", "ours"),
    Scenario("copies-memory", "memory of QEMU (Pss), each of {machines} copies", "MiB", "ours"),
)
BY_KEY = {scenario.key: scenario for scenario in SCENARIOS}
COURSES = tuple(dict.fromkeys(scenario.course for scenario in SCENARIOS))

OWN_COURSES = ("fast", "ours")
"""Courses of what only this package does."""

LEAST_ROUNDS = {"many": 3, "ours": 3}
"""Courses that take long are run fewer times: once in so many rounds."""


def choose(only: tuple[str, ...], skip: tuple[str, ...]) -> tuple[str, ...]:
    """Give the keys of the scenarios to measure.

    Args:
        only: Keys of scenarios or courses; all when empty.
        skip: Keys of scenarios or courses that are left out.
    """
    return tuple(
        scenario.key
        for scenario in SCENARIOS
        if (not only or scenario.key in only or scenario.course in only)
        and scenario.key not in skip
        and scenario.course not in skip
    )


def turns(rounds: int, wanted: tuple[str, ...]) -> list[tuple[int, str, str]]:
    """Give the order: of each round its number, then package and course.

    Within a round each course runs on one package and then on the other, A B; in the next round,
    B A: what changes slowly on the host falls on both alike.
    """
    order = []
    for number in range(1, rounds + 1):
        for course in COURSES:
            if not any(BY_KEY[key].course == course for key in wanted):
                continue
            if (number - 1) % LEAST_ROUNDS.get(course, 1):
                continue
            sides = (OURS,) if course in OWN_COURSES else SIDES
            order += [(number, side, course) for side in (sides if number % 2 else sides[::-1])]
    return order
