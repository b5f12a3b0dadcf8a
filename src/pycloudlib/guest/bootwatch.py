"""Following the boot of a machine while it is waited for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from pycloudlib.guest.bootphases import Phase, PhaseStart
from pycloudlib.guest.console import Console, DeadEnd

_log = logging.getLogger(__name__)

# The console's file is looked at this often; only the bytes that are new are read.
_LOOK_SECONDS = 0.25


class BootWatch:
    """Follows a console and notes when each phase begins.

    Where a boot follows another, its phases begin anew.

    A context manager: a thread follows the console inside its block.

    Args:
        console: The console.
        offset: Where in its log this boot begins, in bytes.
        powered_on: When the power was switched on, in `time.monotonic` seconds.
        on_line: Called with the latest phase and line after each look at the log, new or not.

    Attributes:
        offset: Where in the log this boot begins.
    """

    def __init__(
        self,
        console: Console,
        offset: int,
        powered_on: float,
        on_line: Callable[[Phase | None, str], None] | None = None,
    ) -> None:
        self._console = console
        self.offset = offset
        self._powered_on = powered_on
        self._on_line = on_line
        self._seen = console.look()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="boot-watch", daemon=True)

    def __enter__(self) -> BootWatch:
        # What is there already may be asked about at once.
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    @property
    def timeline(self) -> tuple[PhaseStart, ...]:
        """The phases that were seen in the latest boot, in the order of their beginning."""
        rebooted = self._seen.rebooted
        begun = self._powered_on if rebooted is None else rebooted
        return tuple(
            PhaseStart(seen.phase, seen.seen - begun)
            for seen in self._seen.phases
            if seen.offset >= self.offset
        )

    @property
    def phase(self) -> Phase | None:
        """The latest phase; None before the first sign of life."""
        timeline = self.timeline
        return timeline[-1].phase if timeline else None

    @property
    def dead_end(self) -> DeadEnd | None:
        """Where the boot goes no further, as the console has it; None while it may."""
        return self._seen.find_dead_end(self.offset)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What cloud-init warned of, as "WARNING: the first line of what is wrong"."""
        return self._seen.warnings(self.offset)

    @property
    def lines(self) -> tuple[str, ...]:
        """The latest lines, as text, and those before that tell something."""
        return tuple(self._console.lines)

    @property
    def position(self) -> int:
        """How much there is on the console: as long as that stays, nothing was printed."""
        return self._seen.position

    @property
    def last_line(self) -> str:
        """The latest line with anything in it."""
        last = self._seen.last_line
        return last.text if last.offset >= self.offset else ""

    def _follow(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            self._look()
            if self._on_line is not None:
                try:
                    self._on_line(self.phase, self.last_line)
                except Exception:  # noqa: BLE001 - a callback's error must not end the wait
                    _log.exception("The callback for progress failed and is not called any more")
                    self._on_line = None

    def _look(self) -> None:
        self._seen = self._console.look()
        if self._seen.position < self.offset:
            self.offset = 0  # the log was truncated
