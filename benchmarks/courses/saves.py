"""Saves of one running machine, a step at a time: a guest, or a machine without a guest.

It waits for the driver before each step, so that two versions of this package can take turns; of
either it uses the interface and little else.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.processes import proportional_mib
from benchmarks.scenarios import CHANGED_MIB, SAVES
from benchmarks.ticks import TICKER, Ticks
from benchmarks.worker import Bench, make_bare_image, save_bare
from pycloudlib.errors import ImageInUseError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pycloudlib.qemu.instance import QemuInstance
    from pycloudlib.qemu.vm.qmp import Event

IN_USE_MIB = 256
"""What a machine without a guest has in use: about as much as a guest that has booted."""
_IDLE_SECONDS = 4.0
_MIB = 1 << 20
_PAGE = 4096

# Writes to 100 MiB over and over.
BUSY = """
memory = bytearray(100 << 20)
while True:
    for position in range(0, len(memory), 4096):
        memory[position] = (memory[position] + 1) % 256
"""


class Pauses(logging.Handler):
    """Collects what the package logs of each pause of a guest."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seconds: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Note the pause that a line names, if it does."""
        found = re.search(r"(?:stood still|was paused|paused) for (\d+) ms", record.getMessage())
        if found:
            self.seconds.append(int(found[1]) / 1000)


@contextmanager
def collect_pauses() -> Iterator[Pauses]:
    """Read the package's log in the block."""
    logger, handler = logging.getLogger("pycloudlib"), Pauses()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def add_pauses(events: tuple[Event, ...], since: float) -> float:
    """Add up the time from each STOP to the RESUME that follows it."""
    total, stopped = 0.0, None
    for event in events:
        if event.name == "STOP" and event.timestamp >= since:
            stopped = event.timestamp
        elif event.name == "RESUME" and stopped is not None:
            total, stopped = total + event.timestamp - stopped, None
    return total


def measure_disk(image: Path) -> float:
    """Return the MiB that a saved machine takes of the disk, image and memory."""
    kept = image.with_name(f"{image.name}.live")
    blocks = sum(file.stat().st_blocks for file in (image, *kept.rglob("*")))
    return blocks * 512 / 2**20


class Bare:
    """A machine whose processor halts; its memory is written by this program (ptrace(2)).

    Args:
        bench: What to measure with.

    Attributes:
        steps: What to do in each step.
    """

    # Seconds that the machine is left alone before a save, and watched after one.
    settle, watch = 0.3, 0.2

    def __init__(self, bench: Bench) -> None:
        self.bench, self.record = bench, bench.recorder.record
        self.machine: QemuInstance | None = None
        self.two_fifths = int(bench.plan.type.partition("m")[2]) * 2 // 5
        self._images: list[str] = []
        self._written, self._filled = 0, False
        restore_first = functools.partial(self.restore, 0)
        self.steps: dict[str, tuple[Callable[[], None], ...]] = {
            "boot": (self.boot,),
            "first": (self.measure,),
            "second": (self.measure,),
            "changed": (self.change, self.measure),
            "filled": (self.fill, self.measure),
            "copy": (restore_first, self.measure),
            "copy-changed": (restore_first, self.change, self.measure),
            # A copy of the last save: with each round it is one level deeper.
            "nested": (functools.partial(self.restore, -1), self.measure),
        }

    @property
    def running(self) -> QemuInstance:
        """The machine."""
        assert self.machine is not None, "the first step is boot"
        return self.machine

    def boot(self) -> None:
        """Start a machine, and have as much memory in use as a guest that has booted."""
        image = make_bare_image(Path(self.bench.plan.scratch))
        self.machine = self.bench.launch(str(image))
        time.sleep(1)  # the firmware's
        self._write(16, IN_USE_MIB)

    def restore(self, number: int) -> None:
        """Continue with a copy of a machine that was saved."""
        self.running.delete()
        self.machine = self.bench.cloud.launch(self._images[number])

    def save(self) -> str:
        """Save it; return the image."""
        return save_bare(self.bench.cloud, self.running)

    def change(self) -> None:
        """Write to memory that is in use."""
        self._write(64, CHANGED_MIB)

    def fill(self) -> None:
        """Have two fifths of the memory in use besides, unless it has."""
        if not self._filled:
            self._write(16 + IN_USE_MIB, self.two_fifths)
            self._filled = True

    def measure(self) -> None:
        """Save the machine, and measure."""
        time.sleep(self.settle)
        machine = self.running.machine
        pid = machine.pid
        # The kernel measures the peak of this program's memory anew.
        Path("/proc/self/clear_refs").write_text("5")
        began, started = time.time(), time.perf_counter()
        with collect_pauses() as pauses:
            image = self.save()
        self.record("save-took", time.perf_counter() - started)
        self.record("save-python", _read_peak())
        self._images.append(image)
        time.sleep(self.watch)
        # Where the machine was handed over to another QEMU, that one knows of no stop.
        in_place = machine.pid == pid
        paused = add_pauses(machine.events, began) if in_place else sum(pauses.seconds)
        self.record("save-paused", paused)
        self.record("save-disk", measure_disk(Path(image)))
        self.record_rest(began)
        # The first is copied again and again; the disk would be busy with writing the others.
        if len(self._images) > 2:
            with contextlib.suppress(ImageInUseError):
                self.bench.cloud.delete_image(self._images.pop(1))

    def record_rest(self, _began: float) -> None:
        """Report the memory of QEMU."""
        self.record("save-qemu", proportional_mib(self.running.machine.pid or 0))

    def _write(self, first: int, count: int) -> None:
        """Write to MiB of the memory; no page as another, and none as it was."""
        machine = self.running.machine
        answer = machine.execute("human-monitor-command", {"command-line": "gpa2hva 0"})
        found = re.search(r"\) is (0x[0-9a-f]+)", answer)
        assert found is not None, answer
        content = bytearray(os.urandom(_MIB))
        with Path(f"/proc/{machine.pid}/mem").open("r+b", buffering=0) as memory:
            for place in range(first, first + count):
                for page in range(0, _MIB, _PAGE):
                    self._written += 1
                    content[page : page + 8] = self._written.to_bytes(8, "little")
                memory.seek(int(found[1], 16) + place * _MIB)
                memory.write(content)


class Guest(Bare):
    """A guest that has booted, which ticks."""

    settle, watch = 3.0, 1.0

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self._ticks = Ticks()
        stop_busy = functools.partial(self._execute, "systemctl stop busy", use_sudo=True)
        start_busy = functools.partial(self._start, "busy", BUSY)
        self.steps["idle"] = (self.idle,)
        self.steps["busy"] = (start_busy, self.measure, stop_busy)

    def boot(self) -> None:
        """Boot a machine, and start in it what a save needs, and what ticks."""
        self.machine = self.bench.boot()
        machine: Any = self.machine
        if hasattr(machine, "guest"):
            machine.guest.fixes.start_helper(machine.username)
        else:  # an older version
            machine.start_helper()
        self._start("ticker", TICKER, str(self._ticks.port))

    def restore(self, number: int) -> None:
        """Continue with a copy, to its first command."""
        super().restore(number)
        self._execute("true")

    def save(self) -> str:
        """Save it by the public call."""
        return self.bench.cloud.snapshot(self.running, memory=True)

    def change(self) -> None:
        """Write a file in memory anew."""
        make = f"head -c {CHANGED_MIB * _MIB} /dev/urandom >new"
        self._execute(f"cd /dev/shm && {make} && mv new changes")

    def fill(self) -> None:
        """Write a large file in memory."""
        make = f"rm -f changes; head -c {self.two_fifths * _MIB} /dev/zero | tr '\\0' x >filled"
        self._execute(f"cd /dev/shm && {{ [ -e filled ] || {{ {make}; }}; }}")

    def idle(self) -> None:
        """Watch the guest as long as it is watched around a save."""
        time.sleep(self.settle)
        began = time.time()
        time.sleep(_IDLE_SECONDS)
        self.record("save-python", _read_peak())
        self.record_rest(began)

    def record_rest(self, began: float) -> None:
        """Report the guest's gaps since a time, too."""
        inside, outside = self._ticks.find_gaps(began)
        self.record("save-inside", inside)
        self.record("save-outside", outside)
        super().record_rest(began)

    def _start(self, unit: str, program: str, *arguments: str) -> None:
        command = ["systemd-run", "--quiet", f"--unit={unit}", "python3", "-c", program]
        self._execute([*command, *arguments], use_sudo=True)

    def _execute(self, command: str | list[str], **options: Any) -> None:
        result = self.running.execute(command, **options)
        if not result.ok:
            raise RuntimeError(f"{command} failed: {result.stderr}")


def _read_peak() -> float:
    """Return the MiB of this program's memory at its peak."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def run(bench: Bench) -> None:
    """Do the steps that the driver asks for, until there are no more."""
    course, memory = Bare(bench) if bench.plan.bare else Guest(bench), bench.recorder.row
    for step in bench.recorder.steps():
        bench.recorder.row = f"{SAVES.get(step, step)}, {memory}"
        for act in course.steps[step]:
            act()
