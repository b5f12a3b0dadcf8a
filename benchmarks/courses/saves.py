"""Saves of one running machine: a step for each line of standard input, its figures in return.

It does nothing by itself, so that two of them, of two versions of this package, can take turns.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.plan import Plan
from benchmarks.processes import proportional_mib
from benchmarks.subjects import Bare, Guest, Subject
from pycloudlib import Qemu

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pycloudlib.qemu.vm.qmp import Event

_IDLE_SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class Save:
    """What a save cost.

    Attributes:
        took: Seconds of `snapshot(memory=True)`.
        paused: Seconds that the guest stood still in all, by QEMU's own timestamps.
        inside: Seconds of the longest gap between two ticks of the guest, by the guest's clock.
        outside: The same by this host's clock: what the guest is missed for.
        disk_mib: MiB that the save takes of the disk.
        qemu_mib: MiB of memory of QEMU after it (Pss).
        python_mib: MiB of memory of this program at its most, meanwhile.
    """

    took: float
    paused: float
    inside: float
    outside: float
    disk_mib: float
    qemu_mib: float
    python_mib: float


class Pauses(logging.Handler):
    """Collects what the package logs of each pause of a guest."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seconds: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Note the pause that a line speaks of, if it does."""
        found = re.search(r"stood still for (\d+) ms", record.getMessage())
        if found:
            self.seconds.append(int(found[1]) / 1000)


@contextmanager
def collect_pauses() -> Iterator[Pauses]:
    """Listen to the package's log in the block."""
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


class Course:
    """The steps, in the order they have to come.

    Args:
        subject: What is saved.
        settle: Seconds that it is left alone before a save.
        watch: Seconds that it is watched after one.
    """

    def __init__(self, subject: Subject, settle: float, watch: float) -> None:
        self._subject = subject
        self._settle, self._watch = settle, watch
        self._images: list[str] = []
        self.steps: dict[str, Callable[[], Save | None]] = {
            "boot": subject.boot,
            "idle": self._idle,
            "first": self._save,
            "second": self._save,
            "changed": self._save_changed,
            "busy": self._save_busy,
            "filled": self._save_filled,
            "copy": self._save_copy,
            "copy-changed": self._save_changed_copy,
            "nested": self._save_nested,
        }

    def _idle(self) -> Save:
        """Watch the guest as long as it is watched around a save."""
        time.sleep(self._settle)
        began = time.time()
        time.sleep(_IDLE_SECONDS)
        return Save(0, 0, *self._subject.find_gaps(began), 0, self._qemu_mib(), _read_peak())

    def _save(self) -> Save:
        """Save the machine as it is."""
        time.sleep(self._settle)
        machine = self._subject.machine.machine
        pid = machine.pid
        _reset_peak()
        began, started = time.time(), time.perf_counter()
        with collect_pauses() as pauses:
            image = self._subject.save()
        took, peak = time.perf_counter() - started, _read_peak()
        self._images.append(image)
        time.sleep(self._watch)
        # Where the machine was handed over to another QEMU, that one knows of no stop.
        in_place = machine.pid == pid
        paused = add_pauses(machine.events, began) if in_place else sum(pauses.seconds)
        gaps = self._subject.find_gaps(began)
        save = Save(took, paused, *gaps, measure_disk(Path(image)), self._qemu_mib(), peak)
        # The first is copied again and again; the disk would be busy with writing the others.
        if len(self._images) > 2:
            self._subject.forget(self._images.pop(1))
        return save

    def _qemu_mib(self) -> float:
        return proportional_mib(self._subject.machine.machine.pid or 0)

    def _save_changed(self) -> Save:
        self._subject.change()
        return self._save()

    def _save_filled(self) -> Save:
        self._subject.fill()
        return self._save()

    def _save_busy(self) -> Save:
        self._subject.keep_busy(on=True)
        try:
            return self._save()
        finally:
            self._subject.keep_busy(on=False)

    def _save_copy(self) -> Save:
        self._subject.restore(self._images[0])
        return self._save()

    def _save_changed_copy(self) -> Save:
        self._subject.restore(self._images[0])
        return self._save_changed()

    def _save_nested(self) -> Save:
        """Save a copy of the last save: with each round it is one level deeper."""
        self._subject.restore(self._images[-1])
        return self._save()


def _reset_peak() -> None:
    """Let the kernel forget how much memory this program had at its most."""
    Path("/proc/self/clear_refs").write_text("5")


def _read_peak() -> float:
    """Return the MiB of memory that this program had at its most since."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def main() -> None:
    """Do the steps that come, until there are no more."""
    # What is measured has the real standard output for itself.
    out = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    plan = Plan.from_argument(sys.argv[1])
    with Qemu(tag="saves", config_file=plan.config_file) as cloud:
        course = Course(Guest(cloud, plan), settle=3, watch=1)
        if "guest" not in plan.wanted:
            course = Course(Bare(cloud, plan), settle=0.3, watch=0.2)
        for line in sys.stdin:
            save = course.steps[line.strip()]()
            answer = None if save is None else asdict(save)
            os.write(out, f"{json.dumps(answer)}\n".encode())


if __name__ == "__main__":
    main()
