"""Measure what a save of a running machine costs, beside another version of this package.

    git worktree add build/before COMMIT
    python -m benchmarks.saves --before build/before [--memory 512 1024] [--rounds 3] [STEP ...]
    python -m benchmarks.saves --before build/before --bare

Of each size each version boots a machine; then they take turns, A B B A, save by save, while the
other's machine is idle. Without a guest (`--bare`) nothing boots, and the machine's memory is
written from outside: what is measured then is the save alone, in a minute or two.

Writes saves.json and saves.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.courses.saves import Save
from benchmarks.plan import Plan
from benchmarks.report import write_number
from benchmarks.subjects import CHANGED_MIB, make_bare_image
from pycloudlib import Qemu
from pycloudlib._base.files import replace_atomically

ROOT = Path(__file__).resolve().parent.parent
BEFORE, NOW = "before", "now"
MEMORY_MIB = (512, 1024, 2048, 4096)
ONCE = ("idle", "first")
OF_GUESTS = ("idle", "busy")
"""What is not measured without a guest."""
STEPS = {
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
COLUMNS = {
    "took": "took, s",
    "paused": "paused, ms",
    "outside": "gap between ticks, ms",
    "inside": "by the guest's clock, ms",
    "disk_mib": "disk, MiB",
    "qemu_mib": "memory of QEMU (Pss), MiB",
    "python_mib": "of Python, MiB",
}


@dataclass(frozen=True, slots=True)
class Taken:
    """One save.

    Attributes:
        side: Which version's.
        memory_mib: The machine's memory.
        step: Which kind of save.
        save: What it cost.
    """

    side: str
    memory_mib: int
    step: str
    save: Save


class Worker:
    """A process with one version's machine, which does one step at a time.

    Args:
        source: The version's source.
        plan: What it works with.
        log: Where its errors go.
    """

    def __init__(self, source: Path, plan: Plan, log: Path) -> None:
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.courses.saves", plan.to_argument()],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(source)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._log = log

    def do(self, step: str) -> Save | None:
        """Do a step; return what it measured."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{step}\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a step failed: see {self._log}")
        figures = json.loads(line)
        return None if figures is None else Save(**figures)

    def close(self) -> None:
        """Let it delete its machine and images, and end."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def turns(steps: Iterable[str], sides: Sequence[str], rounds: int) -> Iterator[tuple[str, str]]:
    """Return the order of the saves: of each its step and its version, A B B A."""
    for step in steps:
        for number in range(1 if step in ONCE else rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                yield step, side


def measure(
    sources: dict[str, Path], plan: Plan, order: Sequence[tuple[str, str]], output: Path
) -> Iterator[Taken]:
    """Boot a machine by each version's code, then save them in turn."""
    memory = int(plan.instance_type.partition("m")[2])
    with contextlib.ExitStack() as stack:
        workers = {}
        for side, source in sources.items():
            # State is each version's own; the images are everybody's.
            state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pycl-saves-")))
            config = state / "pycloudlib.toml"
            settings = {"state_dir": str(state), "image_dir": plan.scratch}
            lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
            config.write_text("\n".join(["[qemu]", *lines]) + "\n")
            own = Plan(**{**asdict(plan), "config_file": str(config)})
            worker = Worker(source, own, output / f"{side}-{memory}.log")
            stack.callback(worker.close)
            workers[side] = worker
            worker.do("boot")
        for step, side in order:
            save = workers[side].do(step)
            assert save is not None
            yield Taken(side, memory, step, save)


def write_report(taken: Sequence[Taken]) -> str:
    """Write a table for each kind of save, in Markdown."""
    sides = [side for side in (BEFORE, NOW) if any(save.side == side for save in taken)]
    # Without a guest there are no gaps.
    names = [name for name in COLUMNS if any(getattr(item.save, name) for item in taken)]
    columns = [f"{COLUMNS[name]}: {side}" for name in names for side in sides]
    head = ("memory", *columns, *(("times faster",) if len(sides) == 2 else ()))
    text = ""
    for step, title in STEPS.items():
        rows = [_write_row(taken, sides, step, memory, names) for memory in _sizes(taken, step)]
        if rows:
            table = (head, ("---",) * len(head), *rows)
            text += f"{title}:\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in table) + "\n"
    return text


def _sizes(taken: Iterable[Taken], step: str) -> list[int]:
    return sorted({item.memory_mib for item in taken if item.step == step})


def _write_row(
    taken: Sequence[Taken], sides: Sequence[str], step: str, memory: int, names: Sequence[str]
) -> tuple[str, ...]:
    """Write what a kind of save cost at one size: medians, with the least and the most."""
    saves = {
        side: [
            item.save
            for item in taken
            if (item.side, item.step, item.memory_mib) == (side, step, memory)
        ]
        for side in sides
    }
    cells = [f"{memory} MiB"]
    for name in names:
        factor = 1000 if COLUMNS[name].endswith("ms") else 1
        cells += [
            write_spread([getattr(save, name) * factor for save in saves[side]]) for side in sides
        ]
    if len(sides) == 2:
        before, now = (
            statistics.median(save.took for save in saves[side]) if saves[side] else 0
            for side in sides
        )
        cells.append(write_number(before / now) if before and now else "")
    return tuple(cells)


def write_spread(values: Sequence[float]) -> str:
    """Write the median, with the least and the most if there are several."""
    if not values:
        return ""
    text = write_number(statistics.median(values))
    if len(values) > 1:
        text += f" ({write_number(min(values))}-{write_number(max(values))})"
    return text


def read(file: Path) -> list[Taken]:
    """Read what `keep` has written."""
    return [
        Taken(**{**item, "save": Save(**item["save"])}) for item in json.loads(file.read_text())
    ]


def keep(taken: Sequence[Taken], output: Path) -> None:
    """Write what was measured so far."""
    with replace_atomically(output / "saves.json") as temporary:
        temporary.write_text(json.dumps([asdict(item) for item in taken], indent=1) + "\n")
    with replace_atomically(output / "saves.md") as temporary:
        temporary.write_text(write_report(taken))


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", type=Path, help="a checkout of the other version")
    parser.add_argument("--side", choices=(BEFORE, NOW), help="measure one version alone")
    parser.add_argument("--memory", type=int, nargs="+", default=MEMORY_MIB, metavar="MIB")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--bare", action="store_true", help="measure machines without a guest")
    parser.add_argument("--release", default="bookworm", help="Debian release (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="%(default)s")
    parser.add_argument("--append", action="store_true", help="add to the results that are there")
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}")
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    sources = {NOW: ROOT / "src"}
    if arguments.before is not None:
        sources = {BEFORE: arguments.before.resolve() / "src", **sources}
    if arguments.side is not None:
        sources = {arguments.side: sources[arguments.side]}
    steps = [step for step in STEPS if not arguments.steps or step in arguments.steps]
    taken = read(output / "saves.json") if arguments.append else []
    wanted: tuple[str, ...] = ("guest",)
    with Qemu(tag="saves") as cloud:
        image_dir = str(cloud.image_dir)
        if arguments.bare:
            steps = [step for step in steps if step not in OF_GUESTS]
            wanted, image = (), str(output.resolve() / "bare.img")
            make_bare_image(Path(image))
        else:
            image = cloud.build_image(arguments.release)
    for memory in arguments.memory:
        plan = Plan(image, f"c1m{memory}", "", image_dir, 1, wanted, 0)
        order = tuple(turns(steps, tuple(sources), arguments.rounds))
        for item in measure(sources, plan, order, output):
            taken.append(item)
            print(item, flush=True)
            keep(taken, output)
    print(write_report(taken))


if __name__ == "__main__":
    main()
