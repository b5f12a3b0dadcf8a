"""What is measured: each scenario with its unit and course, and the programs that measure them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from benchmarks.plan import in_turn

ORIGINAL, OURS = "original", "ours"
BEFORE, NOW = "before", "now"
SIDES = (ORIGINAL, OURS)
NAMES = {ORIGINAL: "original", OURS: "this package", BEFORE: "before", NOW: "now"}

MANY = "{machines}"
"""Stands in titles for the number of machines where many run at once."""
CHANGED_MIB = 64


@dataclass(frozen=True, slots=True)
class Scenario:
    """Something that is measured.

    Attributes:
        key: Its name in results and options.
        title: Its name in tables.
        unit: Unit of its values; less is better.
        course: The course that measures it.
        bytes: How much is transferred; the report adds the rate.
        base: The scenarios to compare it with: the first of them that was measured beside it. It
            may be the original's, too.
        pooled: Whether the values of all rounds are put together; otherwise each round counts with
            its median.
    """

    key: str
    title: str
    unit: str
    course: str
    bytes: int = 0
    base: tuple[str, ...] = ()
    pooled: bool = False


_OWN_BOOT = ("ours-boot",)

SCENARIOS = (
    Scenario("import", "`import pycloudlib`", "s", "package"),
    Scenario("size", "installed size, with dependencies", "MB", "package"),
    Scenario("launch", "`launch()` until it returns", "s", "one"),
    Scenario("boot", "`launch()` and `wait()`, cold", "s", "one"),
    Scenario("ordinary", "`launch()` and `wait()`, with user-data", "s", "fast"),
    Scenario("fast", "the same with `fast_boot=True`", "s", "fast", base=("ordinary", "boot")),
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
    Scenario("warm", "`launch(warm=True)` and `wait()`", "s", "ours", base=_OWN_BOOT),
    Scenario("copy", "a copy, until its first command is done", "s", "ours", base=_OWN_BOOT),
    Scenario("copy-ssh", "a copy without a helper, likewise", "s", "ours", base=_OWN_BOOT),
    Scenario("copy-own", "a copy with its own identity, and `wait()`", "s", "ours", base=_OWN_BOOT),
    Scenario("copies", "{machines} copies at once, likewise", "s", "ours", base=_OWN_BOOT),
    Scenario("rollback", "`rollback()`, until a command is done", "s", "ours", base=_OWN_BOOT),
    Scenario("save", "`snapshot(memory=True)`", "s", "ours", base=_OWN_BOOT),
    Scenario("save-first", "the first one, which starts a helper", "s", "ours", base=_OWN_BOOT),
    Scenario("fast-prepare", "once for an image: a fast boot's starting point", "s", "fast"),
    Scenario("fast-disk", "disk of the starting point", "MiB", "fast"),
    Scenario("warm-prepare", "once: what a warm launch starts from", "s", "ours"),
    Scenario("copies-memory", "memory of QEMU (Pss), each of {machines} copies", "MiB", "ours"),
    Scenario("held-first", "the first `launch()` of a process", "s", "launch"),
    Scenario("held", "`launch()`, each following", "s", "launch"),
    Scenario("booted", "`launch()` and `wait()`", "s", "launch"),
    Scenario("late", "from cloud-init's end to the return of `wait()`", "s", "launch"),
    Scenario("rebooted", "`restart()` of it", "s", "launch"),
    Scenario("curl", "`curl` and `sha256sum`", "s", "download"),
    Scenario("fetch", "fetched, verified and stored", "s", "download", base=("curl",)),
    Scenario("fetch-memory", "memory of Python at its peak", "MiB", "download"),
    Scenario("scp-push", "push by `scp`", "s", "transfer"),
    Scenario("own-push", "`push_file()`", "s", "transfer", base=("scp-push",)),
    Scenario("scp-pull", "pull by `scp`", "s", "transfer"),
    Scenario("own-pull", "`pull_file()`", "s", "transfer", base=("scp-pull",)),
    Scenario("connect", "a new connection", "s", "transfer"),
    Scenario("command", "a command on a kept connection", "s", "transfer"),
    Scenario("launches", "`launch()` of all", "s", "machines"),
    Scenario("starts", "copies at once", "s", "machines"),
    Scenario("starts-memory", "memory of the copies (Pss)", "MiB", "machines"),
    Scenario("memory-copy", "copy", "s", "memory"),
    Scenario("disk-snapshot", "`snapshot()`", "s", "data", base=("convert",)),
    Scenario("convert", "`qemu-img convert`", "s", "data"),
    Scenario("data-launch", "`launch()` of the snapshot", "s", "data"),
    Scenario("layers-launch", "`launch()`", "s", "layers"),
    Scenario("layers-read", "64 MiB read in 4 KiB pieces", "s", "layers"),
    Scenario("nested-copy", "copy", "s", "nested"),
    Scenario("save-took", "took", "s", "saves"),
    Scenario("save-paused", "paused", "s", "saves"),
    Scenario("save-outside", "gap between ticks", "s", "saves"),
    Scenario("save-inside", "by the guest's clock", "s", "saves"),
    Scenario("save-disk", "disk", "MiB", "saves"),
    Scenario("save-qemu", "memory of QEMU (Pss)", "MiB", "saves"),
    Scenario("save-python", "of Python", "MiB", "saves"),
    Scenario("room-all", "until all of {machines} are ready", "s", "room"),
    Scenario("room-each", "until one is, on average", "s", "room"),
    Scenario("commands-took", "took", "s", "commands"),
    Scenario("suite-test", "a test", "s", "suite"),
    Scenario("suite-wait", "of that the wait for its machine", "s", "suite", pooled=True),
    Scenario("suite-first-wait", "a worker's first wait", "s", "suite", pooled=True),
    Scenario("suite-command", "its command", "s", "suite", pooled=True),
    Scenario("descriptors", "file descriptors", "", "soak"),
    Scenario("threads", "threads", "", "soak"),
    Scenario("children", "children", "", "soak"),
    Scenario("memory", "resident memory", "MiB", "soak"),
)
BY_KEY = {scenario.key: scenario for scenario in SCENARIOS}

ROWS = {
    "fast": "image",
    "machines": "machines",
    "memory": "memory",
    "data": "data added to the image",
    "layers": "layers of a disk",
    "nested": "saves of copies of saves",
    "saves": "save",
    "room": "launched",
    "commands": "what",
    "suite": "machines of the tests",
    "soak": "after",
}
"""What the rows of a course's table are, where it has a table of its own."""

GROWTH = ("machines", "memory", "data", "layers", "nested")
"""Courses that are functions of one module."""

OWN_COURSES = ("fast", "ours")
"""Courses of `compare` that only this package can do."""
SAVES = {
    "idle": "no save",
    "first": "the first save of a machine that has booted",
    "second": "a later one, of an idle machine",
    "changed": f"a later one, after {CHANGED_MIB} MiB of changes",
    "busy": "a later one, while 100 MiB are written over and over",
    "filled": "a later one, with two fifths of the memory in use",
    "copy": "of a copy",
    "copy-changed": f"of a copy, after {CHANGED_MIB} MiB of changes",
    "nested": "of a copy of the save before, and so on",
}
"""The steps of the course `saves`."""
COMMANDS = {
    "program": "`pycloudlib --version`: the program alone",
    **{
        f"{step}-{way}": f"{title}, in a copy {name}"
        for way, name in (("helper", "with a helper"), ("ssh", "without one"))
        for step, title in (
            ("exec-first", "`pycloudlib exec NAME -- true`, the first"),
            ("exec", "`pycloudlib exec NAME -- true`, each following"),
            ("copy", "`pycloudlib copy` of 1 KiB"),
            ("push", "`push_file()` of 64 MiB"),
            ("pull", "`pull_file()` of 64 MiB"),
        )
    },
}
"""The steps of the course `commands`."""
SUITE = {
    "boots": "each boots",
    "copies": "copies, made when they are asked for",
    "ahead": "copies, made ahead",
    "ahead-wide": "the same, with processors for two machines a worker",
}
"""The steps of the course `suite`."""
ONCE = ("idle", "first", "boots")
"""Steps that are not repeated."""
OF_GUESTS = ("idle", "busy")
"""What is not measured without a guest."""


@dataclass(frozen=True, slots=True)
class Program:
    """Something that the command line runs.

    Attributes:
        title: What it measures.
        courses: Its courses.
        options: Its options beside those that all have, with their defaults.
        without: Scenarios of these courses that it leaves out.
        sides: What it compares, or this package alone.
        repeats: Whether it repeats whole courses, each time in a new process; otherwise the
            courses repeat what they measure.
        least_rounds: Courses that take long run once in so many rounds.
        by_release: Whether it measures each release; otherwise the first.
        by_memory: Whether it measures machines of each size.
        steps: What its course does, one at a time, in turn with that of the other side; with the
            names in tables.
        step_by_step: Whether all rounds of a step come before the next step; otherwise all steps
            of a round come before the next round.
    """

    title: str
    courses: tuple[str, ...]
    options: Mapping[str, object]
    without: tuple[str, ...] = ()
    sides: tuple[str, ...] = (OURS,)
    repeats: bool = False
    least_rounds: Mapping[str, int] = field(default_factory=dict)
    by_release: bool = False
    by_memory: bool = False
    steps: Mapping[str, str] = field(default_factory=dict)
    step_by_step: bool = False

    @property
    def scenarios(self) -> tuple[str, ...]:
        """The keys of what it measures."""
        return tuple(
            scenario.key
            for scenario in SCENARIOS
            if scenario.course in self.courses and scenario.key not in self.without
        )

    def choose(self, only: tuple[str, ...], skip: tuple[str, ...]) -> tuple[str, ...]:
        """Return the keys of the scenarios to measure: only some or all, by scenario or course."""
        return tuple(
            key
            for key in self.scenarios
            if (not only or not {key, BY_KEY[key].course}.isdisjoint(only))
            and {key, BY_KEY[key].course}.isdisjoint(skip)
        )

    def turns(
        self, rounds: int, wanted: tuple[str, ...], sides: tuple[str, ...] = SIDES
    ) -> list[tuple[int, str, str]]:
        """Return the order: of each round its number, then side and course.

        Within a round each course runs on one side and then on the other, A B; then B A.
        """
        order = []
        for number in range(1, rounds + 1):
            for course in dict.fromkeys(BY_KEY[key].course for key in wanted):
                if (number - 1) % self.least_rounds.get(course, 1):
                    continue
                able = tuple(
                    side for side in sides if side != ORIGINAL or course not in OWN_COURSES
                )
                order += [(number, side, course) for side in in_turn(able, number)]
        return order

    def step_turns(
        self, steps: Iterable[str], sides: tuple[str, ...], rounds: int
    ) -> list[tuple[int, str, str]]:
        """Return the order of steps: of each its round, side and step, A B B A."""
        numbers = range(1, rounds + 1)
        chosen = [step for step in self.steps if step in steps]
        if self.step_by_step:
            order = [(number, step) for step in chosen for number in numbers]
        else:
            order = [(number, step) for number in numbers for step in in_turn(chosen, number)]
        return [
            (number, side, step)
            for number, step in order
            if number == 1 or step not in ONCE
            for side in in_turn(sides, number)
        ]


_MACHINES: dict[str, object] = {"rounds": 3, "release": ("bookworm",), "type": "c1m1024"}

PROGRAMS = {
    "compare": Program(
        "the original pycloudlib and this package side by side",
        ("package", "one", "dead", "fast", "many", "ours"),
        {**_MACHINES, "wheel": "", "side": "", "machines": 8, "dead_limit": 300.0},
        without=("ordinary", "fast-disk", "copy-ssh", "copy-own"),
        sides=SIDES,
        repeats=True,
        least_rounds={"many": 3, "ours": 3},
    ),
    "package": Program(
        "the size of an installation, the time of an import", ("package",), {"wheel": ""}
    ),
    "launch": Program(
        "a launch, and how soon `wait()` returns",
        ("launch",),
        {**_MACHINES, "rounds": 10, "type": "c2m1024", "boots": 1},
    ),
    "firstboot": Program(
        "ordinary and fast first boots in turn",
        ("fast",),
        {**_MACHINES, "rounds": 5, "release": ("bookworm", "trixie")},
        by_release=True,
    ),
    "live": Program(
        "copies and rollback, beside cold boots",
        ("ours", "many"),
        {**_MACHINES, "machines": 8},
        without=("warm", "warm-prepare", "save", "save-first", "many-launch", "many-python-memory"),
        repeats=True,
        least_rounds={"many": 3},
    ),
    "growth": Program(
        "how cost grows: machines, memory, data, layers, depth of saves",
        GROWTH,
        _MACHINES,
    ),
    "saves": Program(
        "saves of running machines, beside another version of this package",
        ("saves",),
        {
            **{"rounds": 3, "release": ("bookworm",), "before": "", "side": "", "bare": False},
            **{"memory": (512, 1024, 2048, 4096), "step": tuple(SAVES)},
        },
        sides=(BEFORE, NOW),
        by_memory=True,
        steps=SAVES,
        step_by_step=True,
    ),
    "room": Program(
        "many launches in a row, without and with waiting for room",
        ("room",),
        {**_MACHINES, "rounds": 2, "machines": 8},
    ),
    "commands": Program(
        "commands and files, from the shell and by the library, beside another version",
        ("commands",),
        {**_MACHINES, "before": "", "side": "", "step": tuple(COMMANDS)},
        sides=(BEFORE, NOW),
        steps=COMMANDS,
    ),
    "suite": Program(
        "a suite of tests that each take a machine of their own, by the pytest plugin",
        ("suite",),
        {
            **{**_MACHINES, "rounds": 2, "before": "", "side": "", "step": tuple(SUITE)},
            **{"tests": 30, "boots": 3, "workers": (1, 2), "seconds": (0.0, 2.0)},
        },
        sides=(BEFORE, NOW),
        steps=SUITE,
    ),
    "transfer": Program(
        "commands and copies by SSH, in turn with `scp`",
        ("transfer",),
        {**_MACHINES, "rounds": 5, "mib": 64, "port": 0, "user": "root", "key": ""},
    ),
    "download": Program(
        "a download, in turn with `curl` and `sha256sum`", ("download",), {"rounds": 5, "mib": 600}
    ),
    "soak": Program(
        "many launches, some of whose machines are killed: nothing may grow",
        ("soak",),
        {**_MACHINES, "rounds": 1_000_000, "type": "c1m512", "minutes": 30.0, "kills": 0.3},
    ),
}
