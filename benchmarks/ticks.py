"""A guest that ticks: for how long it is missed while something happens to it."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass

_TICK_SECONDS = 0.005
# The ticker repeats a gap for so long.
_FORGET_SECONDS = 2.0
# Linux's SO_TIMESTAMP, which `socket` does not name: when the kernel received a datagram.
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


@dataclass(frozen=True, slots=True)
class Tick:
    """A tick of a guest.

    Attributes:
        came: When, by this host's clock.
        gap: Seconds of the longest gap between two ticks of late, by the guest's clock.
        ended: When that gap ended, by this host's clock.
    """

    came: float
    gap: float
    ended: float


class Ticks(threading.Thread):
    """Receives the ticks of a guest.

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
    # A longer one that ended just before may hide it; then the host's is known.
    inside = max((tick.gap for tick in heard if tick.ended >= since), default=outside)
    return inside, outside
