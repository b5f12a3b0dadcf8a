"""What is saved to be measured: a guest that has booted, or memory without a guest.

Both are written for any version of this package: they use its interface and little else.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.plan import Plan
from pycloudlib import Qemu
from pycloudlib.errors import ImageInUseError
from pycloudlib.qemu.saved import checkpoint

if TYPE_CHECKING:
    from pycloudlib.qemu.instance import QemuInstance

CHANGED_MIB = 64
IN_USE_MIB = 256
"""What memory without a guest has in use: about what a guest has that has booted."""
_TICK_SECONDS = 0.005
# The ticker repeats a gap for so long.
_FORGET_SECONDS = 2.0
# Linux's SO_TIMESTAMP, which `socket` does not name: when a datagram came, by the kernel's word.
_SO_TIMESTAMP = 29
_MIB = 1 << 20
_PAGE = 4096

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
    if len(times) == 1:
        raise RuntimeError("the guest does not tick")
    outside = max(after - before for before, after in itertools.pairwise(times))
    # One that is longer, and ended just before, is told in its place: then the host's is known.
    inside = max((tick.gap for tick in heard if tick.ended >= since), default=outside)
    return inside, outside


class Subject(Protocol):
    """A machine that can be saved again and again; at most one lives at a time."""

    @property
    def machine(self) -> QemuInstance:
        """The machine that lives."""

    def boot(self) -> None:
        """Start the first one."""

    def restore(self, image: str) -> None:
        """Go on with a copy of a saved machine instead."""

    def save(self) -> str:
        """Save it; return the image."""

    def forget(self, image: str) -> None:
        """Delete an image that was saved, unless others are built on it."""

    def change(self) -> None:
        """Change memory, without more of it being in use from the second time on."""

    def fill(self) -> None:
        """Have two fifths of the memory in use besides, unless it has."""

    def keep_busy(self, *, on: bool) -> None:
        """Begin or end writing to 100 MiB over and over."""

    def find_gaps(self, since: float) -> tuple[float, float]:
        """Return the longest gap between ticks, by the guest's clock and by the host's."""


class _Machine:
    """What both have in common.

    Args:
        cloud: The cloud.
        plan: What to work with.
    """

    def __init__(self, cloud: Qemu, plan: Plan) -> None:
        self._cloud, self._plan = cloud, plan
        self._machine: QemuInstance | None = None
        self._two_fifths = int(plan.instance_type.partition("m")[2]) * 2 // 5

    @property
    def machine(self) -> QemuInstance:
        """The machine that lives."""
        assert self._machine is not None, "the first step is boot"
        return self._machine

    def forget(self, image: str) -> None:
        """Delete an image that was saved, unless others are built on it."""
        with contextlib.suppress(ImageInUseError):
            self._cloud.delete_image(image)

    def _launch(self) -> None:
        self._machine = self._cloud.launch(self._plan.image, self._plan.instance_type)

    def _replace(self, image: str) -> None:
        self.machine.delete()
        self._machine = self._cloud.launch(image)


class Guest(_Machine):
    """A guest, which ticks."""

    def __init__(self, cloud: Qemu, plan: Plan) -> None:
        super().__init__(cloud, plan)
        self._ticks = Ticks()

    def boot(self) -> None:
        """Boot a machine, and start in it what a save needs, and what ticks."""
        self._launch()
        self.machine.wait()
        self.machine.guest.fixes.start_helper(self.machine.username)
        self._run("ticker", TICKER, str(self._ticks.port))

    def restore(self, image: str) -> None:
        """Start a copy, to its first command."""
        self._replace(image)
        self._execute("true")

    def save(self) -> str:
        """Save it by the public call."""
        return self._cloud.snapshot(self.machine, memory=True)

    def change(self) -> None:
        """Write a file in memory anew."""
        make = f"head -c {CHANGED_MIB * _MIB} /dev/urandom >new"
        self._execute(f"cd /dev/shm && {make} && mv new changes")

    def fill(self) -> None:
        """Write a large file in memory."""
        make = f"rm -f changes; head -c {self._two_fifths * _MIB} /dev/zero | tr '\\0' x >filled"
        self._execute(f"cd /dev/shm && {{ [ -e filled ] || {{ {make}; }}; }}")

    def keep_busy(self, *, on: bool) -> None:
        """Start or stop a program."""
        if on:
            self._run("busy", BUSY)
        else:
            self._execute("systemctl stop busy", use_sudo=True)

    def find_gaps(self, since: float) -> tuple[float, float]:
        """Return what was heard of it."""
        return self._ticks.find_gaps(since)

    def _run(self, unit: str, program: str, *arguments: str) -> None:
        command = ["systemd-run", "--quiet", f"--unit={unit}", "python3", "-c", program]
        self._execute([*command, *arguments], use_sudo=True)

    def _execute(self, command: str | list[str], **options: Any) -> None:
        result = self.machine.execute(command, **options)
        if not result.ok:
            raise RuntimeError(f"{command} failed: {result.stderr}")


class Bare(_Machine):
    """A machine whose processor halts; its memory is written by this program (ptrace(2))."""

    def __init__(self, cloud: Qemu, plan: Plan) -> None:
        super().__init__(cloud, plan)
        self._written = 0
        self._filled = False

    def boot(self) -> None:
        """Start a machine, and have as much memory in use as a guest that has booted."""
        self._launch()
        time.sleep(1)  # the firmware's
        self._write(16, IN_USE_MIB)

    def restore(self, image: str) -> None:
        """Start a copy."""
        self._replace(image)

    def save(self) -> str:
        """Save it as one in which no helper runs."""
        name = f"bare{time.time_ns()}.img"
        image = str(checkpoint.save(self.machine.machine, name, ask_helper=None).image)
        self._cloud.created_images.append(image)
        return image

    def change(self) -> None:
        """Write to memory that is in use."""
        self._write(64, CHANGED_MIB)

    def fill(self) -> None:
        """Write to memory that is not."""
        if not self._filled:
            self._write(16 + IN_USE_MIB, self._two_fifths)
            self._filled = True

    def keep_busy(self, *, on: bool) -> None:
        """Do nothing: it is for guests."""

    def find_gaps(self, since: float) -> tuple[float, float]:
        """Return that there are none."""
        return 0.0, 0.0

    def _write(self, first: int, count: int) -> None:
        """Write to MiB of the memory; no page as another, and none as it was."""
        command = {"command-line": "gpa2hva 0"}
        said = self.machine.machine.execute("human-monitor-command", command)
        found = re.search(r"\) is (0x[0-9a-f]+)", said)
        assert found is not None, said
        content = bytearray(os.urandom(_MIB))
        with Path(f"/proc/{self.machine.machine.pid}/mem").open("r+b", buffering=0) as memory:
            for place in range(first, first + count):
                for page in range(0, _MIB, _PAGE):
                    self._written += 1
                    content[page : page + 8] = self._written.to_bytes(8, "little")
                memory.seek(int(found[1], 16) + place * _MIB)
                memory.write(content)


def make_bare_image(file: Path) -> None:
    """Make the image of a disk whose boot sector halts the processor."""
    halt = b"\xfa\xf4\xeb\xfd"
    file.write_bytes(halt.ljust(510, b"\0") + b"\x55\xaa" + bytes(_MIB))
