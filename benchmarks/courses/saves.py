"""Saves of one running machine: a step for each line of standard input, its figures in return.

It does nothing by itself, so that two of them, of two versions of this package, can take turns.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.plan import Plan
from benchmarks.processes import proportional_mib
from pycloudlib import Qemu

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pycloudlib.qemu.instance import QemuInstance
    from pycloudlib.qemu.qmp import Event

CHANGED_MIB = 64
# How long the guest is left alone before a save, and watched after it.
_SETTLE_SECONDS = 3.0
_WATCH_SECONDS = 1.0
_IDLE_SECONDS = 4.0
_TICK_SECONDS = 0.005
# The ticker repeats a gap for so long.
_FORGET_SECONDS = 2.0
# Linux's SO_TIMESTAMP, which `socket` does not name: when a datagram came, by the kernel's word.
_SO_TIMESTAMP = 29

# Sends a datagram each tick: the longest gap between two ticks of late, by the guest's clock, and
# how long ago it ended, since a datagram may be lost.
TICKER = f"""
import socket, sys, time
target = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
target.connect(("10.0.2.2", int(sys.argv[1])))
last = found = time.monotonic()
worst = 0.0
while True:
    time.sleep({_TICK_SECONDS})
    now = time.monotonic()
    if now - last >= worst or now - found > {_FORGET_SECONDS}:
        worst, found = now - last, now
    last = now
    try:
        target.send(b"%f %f" % (worst, now - found))
    except OSError:
        pass
"""
# Writes to 100 MiB over and over.
BUSY = """
memory = bytearray(100 << 20)
while True:
    for position in range(0, len(memory), 4096):
        memory[position] = (memory[position] + 1) % 256
"""


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


@dataclass(frozen=True, slots=True)
class Tick:
    """What was heard of a guest's tick.

    Attributes:
        came: When, by this host's clock.
        gap: Seconds of the longest gap between two ticks of late, by the guest's clock.
        ended: When that gap ended, by this host's clock.
    """

    came: float
    gap: float
    ended: float


class Ticks(threading.Thread):
    """Hears the ticks of a guest.

    Attributes:
        port: Where it listens.
        heard: What has come.
    """

    def __init__(self) -> None:
        super().__init__(name="ticks", daemon=True)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMP, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        self.heard: list[Tick] = []
        self.start()

    def run(self) -> None:
        """Note when each tick came, and what it says."""
        while True:
            data, (stamp, *_), _, _ = self._socket.recvmsg(64, socket.CMSG_SPACE(16))
            seconds, microseconds = memoryview(stamp[2]).cast("q")
            gap, age = map(float, data.split())
            came = seconds + microseconds / 1e6
            self.heard.append(Tick(came, gap, came - age))

    def find_gaps(self, since: float) -> tuple[float, float]:
        """Return the longest gap since a time, by the guest's clock and by the host's."""
        return find_gaps(self.heard, since)


def find_gaps(heard: Sequence[Tick], since: float) -> tuple[float, float]:
    """Return the longest gap since a time, by the guest's clock and by the host's."""
    times = [since, *(tick.came for tick in heard if tick.came >= since)]
    gaps = [tick.gap for tick in heard if tick.ended >= since]
    if not gaps:
        raise RuntimeError("the guest does not tick")
    return max(gaps), max(after - before for before, after in itertools.pairwise(times))


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
    """The steps, in the order they have to come; one machine lives at a time.

    Args:
        cloud: The cloud.
        plan: What to work with.
    """

    def __init__(self, cloud: Qemu, plan: Plan) -> None:
        self._cloud, self._plan = cloud, plan
        self._ticks = Ticks()
        self._machine: QemuInstance | None = None
        self._images: list[str] = []
        self.steps: dict[str, Callable[[], Save | None]] = {
            "launch": self._launch,
            "ready": self._make_ready,
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

    @property
    def machine(self) -> QemuInstance:
        """The machine that lives."""
        assert self._machine is not None, "the first steps are launch and ready"
        return self._machine

    def _launch(self) -> None:
        self._machine = self._cloud.launch(self._plan.image, self._plan.instance_type)

    def _make_ready(self) -> None:
        """Wait for the machine, and start in it what a save needs, and what ticks."""
        self.machine.wait()
        self.machine.start_helper()
        self._run("ticker", TICKER, str(self._ticks.port))

    def _run(self, unit: str, program: str, *arguments: str) -> None:
        command = ["systemd-run", "--quiet", f"--unit={unit}", "python3", "-c", program]
        self._execute([*command, *arguments], use_sudo=True)

    def _execute(self, command: str | list[str], **options: Any) -> None:
        result = self.machine.execute(command, **options)
        if not result.ok:
            raise RuntimeError(f"{command} failed: {result.stderr}")

    def _idle(self) -> Save:
        """Watch the guest as long as it is watched around a save."""
        time.sleep(_SETTLE_SECONDS)
        began = time.time()
        time.sleep(_IDLE_SECONDS)
        return Save(0, 0, *self._ticks.find_gaps(began), 0, self._qemu_mib(), _read_peak())

    def _save(self) -> Save:
        """Save the machine as it is."""
        machine = self.machine
        time.sleep(_SETTLE_SECONDS)
        pid = machine.machine.pid
        _reset_peak()
        began, started = time.time(), time.perf_counter()
        with collect_pauses() as pauses:
            image = self._cloud.snapshot(machine, memory=True)
        took = time.perf_counter() - started
        self._images.append(image)
        time.sleep(_WATCH_SECONDS)
        # Where the machine was handed over to another QEMU, that one knows of no stop.
        paused = sum(pauses.seconds)
        if machine.machine.pid == pid:
            paused = add_pauses(machine.machine.events, began)
        gaps = self._ticks.find_gaps(began)
        return Save(took, paused, *gaps, measure_disk(Path(image)), self._qemu_mib(), _read_peak())

    def _qemu_mib(self) -> float:
        return proportional_mib(self.machine.machine.pid or 0)

    def _change(self) -> None:
        """Change memory of the guest; other pages than the last time."""
        make = f"head -c {CHANGED_MIB << 20} /dev/urandom >new"
        self._execute(f"cd /dev/shm && {make} && mv new changes")

    def _save_changed(self) -> Save:
        self._change()
        return self._save()

    def _save_filled(self) -> Save:
        """Save it with two fifths of its memory in use, of which nothing changes."""
        mib = int(self._plan.instance_type.partition("m")[2]) * 2 // 5
        make = f"rm -f changes; head -c {mib << 20} /dev/zero | tr '\\0' x >filled"
        self._execute(f"cd /dev/shm && {{ [ -e filled ] || {{ {make}; }}; }}")
        return self._save()

    def _save_busy(self) -> Save:
        """Save it while it writes to its memory as fast as it can."""
        self._run("busy", BUSY)
        try:
            return self._save()
        finally:
            self._execute("systemctl stop busy", use_sudo=True)

    def _copy(self, image: str) -> None:
        """Go on with a copy of a saved machine instead."""
        self.machine.delete()
        self._machine = self._cloud.launch(image)
        self._execute("true")

    def _save_copy(self) -> Save:
        self._copy(self._images[0])
        return self._save()

    def _save_changed_copy(self) -> Save:
        self._copy(self._images[0])
        return self._save_changed()

    def _save_nested(self) -> Save:
        """Save a copy of the last save: with each round it is one level deeper."""
        self._copy(self._images[-1])
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
        course = Course(cloud, plan)
        for line in sys.stdin:
            save = course.steps[line.strip()]()
            answer = None if save is None else asdict(save)
            os.write(out, f"{json.dumps(answer)}\n".encode())


if __name__ == "__main__":
    main()
