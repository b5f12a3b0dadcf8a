"""The serial console's log, read step by step in bounded memory: the boots in it, and their signs.

The console is not trusted any further: the guest's users write to it, and other users of this host
can type there.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pycloudlib._base.locks import renew_in_children
from pycloudlib.diagnosis import Cause
from pycloudlib.guest.boot.bootlines import (
    BOOT_STARTS,
    ORDER,
    SIGNS,
    Phase,
    Sign,
    begins_failure,
    clean_line,
    find_phase,
    is_by_kernel,
    is_kernels_start,
)
from pycloudlib.guest.boot.cloudinit import find_console_warning

_log = logging.getLogger(__name__)

# Bytes that are read at once: of more, the beginning and the end. A boot prints some fifty KiB, and
# a serial line is too slow for more than this between two looks.
_MOST_AT_ONCE = 512 << 10
# A longer line is read in pieces, which overlap by more than the bytes of a marker.
_LONGEST_LINE = 4096
_OVERLAP = 256
# Bytes before the position, by which the file is recognized.
_KNOWN_BYTES = 64
# Lines that are kept: a failing kernel prints some fifty.
_KEPT_LINES = 300
_KEPT_WARNINGS = 100
# Lines of a kernel's failure: it prints the reason first.
_FAILURE_LINES = 12
_BLOCK = 64 << 10
_CUT = "…"


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the console, or a piece of one that is long.

    Attributes:
        offset: Where in the log it begins, in bytes.
        text: Its text, without control sequences.
    """

    offset: int
    text: str


@dataclass(frozen=True, slots=True)
class SeenPhase:
    """A phase of the present boot.

    Attributes:
        phase: Which.
        offset: Where in the log it begins, in bytes.
        seen: When that was seen, in `time.monotonic` seconds.
    """

    phase: Phase
    offset: int
    seen: float


@dataclass(frozen=True, slots=True)
class DeadEnd:
    """The end of a boot that does not continue by itself, by a line of the console.

    Attributes:
        cause: Why.
        line: The line.
        offset: Where in the log it is, in bytes.
        is_kernels: Whether the kernel printed it, and prints nothing more.
    """

    cause: Cause
    line: str
    offset: int
    is_kernels: bool


class Console:
    """A machine's present run and present boot, as its console shows them.

    Each byte is read at most once. If there is much since the last look, its middle is left out: so
    neither time nor memory depends on how much is printed. A log that is truncated, or replaced by
    another one, is read from its beginning. Safe to use from several threads, and after a fork.

    Args:
        log: The file; it may not exist yet.
        find_start: Returns where in it the machine's present run begins, from power-on, in bytes.
    """

    def __init__(self, log: Path, find_start: Callable[[], int] = lambda: 0) -> None:
        self._log = log
        self._find_start = find_start
        self._lock = threading.Lock()
        renew_in_children(self, _lock=threading.Lock)
        self._pid = os.getpid()
        self._run = _Run(0, 0)
        self._file: tuple[int, int] | None = None
        self._known = b""

    def look(self) -> _Run:
        """Read what is new, and return all that is known."""
        if self._pid != os.getpid():
            # Another thread of the parent may have been reading it.
            self._pid = os.getpid()
            self._run = _Run(-1, 0)
        with self._lock:
            try:
                with self._log.open("rb", buffering=0) as log:
                    self._read(log)
            except FileNotFoundError:
                self._begin(self._find_start())
            except OSError as error:
                _log.debug("%s cannot be read: %s", self._log, error)
            return self._run

    @property
    def lines(self) -> Sequence[str]:
        """Lines of the present boot: the latest, and significant ones before them."""
        with self._lock:
            return self._run.lines()

    def _begin(self, start: int, position: int | None = None) -> None:
        if self._run.start != start:
            self._run, self._known = _Run(start, start if position is None else position), b""

    def _read(self, log: BinaryIO) -> None:
        facts = os.fstat(log.fileno())
        identity, size = (facts.st_dev, facts.st_ino), facts.st_size
        start = self._find_start()
        # Where it was truncated, the run begins at its beginning.
        self._begin(start, min(start, size) if start <= size else 0)
        run = self._run
        is_same = identity == (self._file or identity) and size >= run.position
        self._file = identity
        if is_same and size == run.position:
            return
        known = self._known
        if is_same and os.pread(log.fileno(), len(known), run.position - len(known)) != known:
            is_same = False
        if not is_same:
            run = self._run = _Run(start, 0)
        new = size - run.position
        if new > _MOST_AT_ONCE:
            run.take(_pread(log, _MOST_AT_ONCE // 2, run.position))
            run.skip_to(size - _MOST_AT_ONCE // 2)
        run.take(_pread(log, size - run.position, run.position))
        kept = min(_KNOWN_BYTES, run.position)
        self._known = os.pread(log.fileno(), kept, run.position - kept)


def _pread(log: BinaryIO, count: int, offset: int) -> bytes:
    return os.pread(log.fileno(), count, offset)


class _Run:
    """What is known of one run of a machine.

    Attributes:
        start: Where in the log it begins, in bytes.
        position: How much of the log was read; the same as long as nothing is printed.
        boot_start: Where the present boot begins.
        rebooted: When the guest's reboot was seen, in `time.monotonic` seconds; None for the run's
            first boot.
        last_line: The latest line that is not empty.
        phases: Those of the present boot, in order.
    """

    def __init__(self, start: int, position: int) -> None:
        self.start = start
        self.position = position
        self.boot_start = position
        self.rebooted: float | None = None
        self.last_line = Line(position, "")
        # The latest that is not the kernel's.
        self._spoken = Line(position, "")
        # Each with its latest offset.
        self._warnings: dict[str, int] = {}
        self.phases: tuple[SeenPhase, ...] = ()
        self._partial = b""
        self._continued = False
        self._boots = 0
        self._last_start = -1
        self._has_kernel = False
        # The first boot of a copy of a saved machine began in that one.
        self._begun_elsewhere = False
        self._latest: deque[Line] = deque(maxlen=_KEPT_LINES)
        self._signs: dict[Sign, Line] = {}
        self._passed: set[Sign] = set()
        self._failure: list[Line] = []

    @property
    def boots(self) -> int:
        """How often the guest has booted."""
        return max(self._boots + self._begun_elsewhere, 1)

    @property
    def phase(self) -> Phase | None:
        """How far the present boot got; None before its first sign of life."""
        return self.phases[-1].phase if self.phases else None

    def lines(self) -> tuple[str, ...]:
        """Return the latest lines of the present boot, and significant ones before them."""
        latest = [*self._latest]
        if self._partial:
            latest.append(self._open_line())
        first = latest[0].offset if latest else self.position
        significant = {*self._signs.values(), *self._failure}
        before = sorted(
            (line for line in significant if line.offset < first), key=lambda it: it.offset
        )
        return tuple(line.text for line in (*before, *latest))

    def warnings(self, since: int) -> tuple[str, ...]:
        """Return cloud-init's warnings from an offset of the log on, each once."""
        return tuple(text for text, offset in [*self._warnings.items()] if offset >= since)

    def find_dead_end(self, since: int = 0, *, kernels: bool = False) -> DeadEnd | None:
        """Return what ends the present boot, by its lines; None if nothing does.

        Args:
            since: The first offset in the log that counts.
            kernels: Whether to look only for lines of the kernel.
        """
        for sign in SIGNS:
            if not sign.final or (kernels and not sign.kernels):
                continue
            found = self._signs.get(sign)
            if sign.prompt:
                waits = sign.pattern.search(self._spoken.text) is not None
                # A prompt before a later phase was answered.
                passed = bool(self.phases) and self.phases[-1].offset > self._spoken.offset
                # After cloud-init's end, programs that run may print anything.
                done = self.phase is Phase.CLOUD_INIT_DONE
                found = self._spoken if waits and not (passed or done) else None
            elif sign in self._passed:
                continue
            if found is not None and found.offset >= max(since, self.boot_start):
                return DeadEnd(sign.cause, found.text, found.offset, sign.kernels)
        return None

    def take(self, data: bytes) -> None:
        """Read the bytes that follow."""
        offset = self.position - len(self._partial)
        self.position += len(data)
        *whole, self._partial = (self._partial + data).split(b"\n")
        for line in whole:
            for start, piece in _pieces(line):
                self._note(offset + start, piece, is_whole=True)
                self._continued = True
            self._continued = False
            offset += len(line) + 1
        if len(self._partial) > _LONGEST_LINE:
            for start, piece in _pieces(self._partial):
                if len(piece) < _LONGEST_LINE:
                    break
                self._note(offset + start, piece, is_whole=True)
                self._continued = True
            self._partial = self._partial[start:]
            offset += start
        # The boot loader and prompts leave their line open.
        if self._partial:
            self._note(offset, self._partial, is_whole=False)

    def skip_to(self, position: int) -> None:
        """Leave bytes out: a machine that printed so much had not stopped before."""
        self._passed.update(sign for sign in self._signs if sign.final)
        self._latest.append(Line(self.position, _CUT))
        self.position, self._partial, self._continued = position, b"", True

    def _open_line(self) -> Line:
        text = clean_line(self._partial)
        return Line(self.position - len(self._partial), _CUT + text if self._continued else text)

    def _note(self, offset: int, raw: bytes, *, is_whole: bool) -> None:
        continued = self._continued
        end = 0
        for match in BOOT_STARTS.finditer(raw):
            if offset + match.start() > self._last_start:
                self._note_start(offset + match.start(), raw[end : match.start()], match[0])
            # The text before it belongs to the boot before.
            end, continued = match.start(), False
        offset, raw = offset + end, raw[end:]
        text = clean_line(raw)
        line = Line(offset, _CUT + text if continued and text else text)
        if text:
            self.last_line = line
            # The kernel's time may be cut off in an incomplete line.
            if not is_by_kernel(text) and (is_whole or not text.startswith("[")):
                self._spoken = line
        phase = find_phase(raw)
        # Output of user-data may later look like an earlier phase.
        if phase is not None and (self.phase is None or ORDER[phase] > ORDER[self.phase]):
            self.phases = (*self.phases, SeenPhase(phase, offset, time.monotonic()))
            # The boot has continued.
            self._passed.update(sign for sign in self._signs if sign.final and not sign.kernels)
        self._note_signs(line)
        if not is_whole:
            return
        self._begun_elsewhere |= not self._boots and bool(text)
        warning = find_console_warning(text)
        if warning is not None and len(self._warnings) < _KEPT_WARNINGS:
            self._warnings[warning] = offset
        self._latest.append(line)

    def _note_start(self, offset: int, before: bytes, marker: bytes) -> None:
        self._last_start = offset
        is_kernel = is_kernels_start(marker)
        self._begun_elsewhere |= not self._boots and bool(clean_line(before))
        # The first kernel after the firmware belongs to the same boot.
        runs = self._has_kernel or (
            self.phase is not None and ORDER[self.phase] > ORDER[Phase.KERNEL]
        )
        begins = not is_kernel or runs
        if begins:
            if self._boots or self._begun_elsewhere:
                self.rebooted = time.monotonic()
            self.boot_start = offset
            self.phases = ()
            self._latest.clear()
            self._signs.clear()
            self._passed.clear()
            self._failure.clear()
        if begins or not self._boots:
            self._boots += 1
        self._has_kernel = is_kernel

    def _note_signs(self, line: Line) -> None:
        done = self.phase is Phase.CLOUD_INIT_DONE
        for sign in SIGNS:
            if sign.prompt or not sign.pattern.search(line.text):
                continue
            # A repeated sign counts again.
            if sign not in self._signs or sign in self._passed or self._is_known(sign, line):
                self._signs[sign] = line
                self._passed.discard(sign)
            if done and not sign.kernels:
                # From then on, it may be output of user-data.
                self._passed.add(sign)
        if self._failure and self._failure[-1].offset == line.offset:
            self._failure[-1] = line
        elif line.text and (self._failure or begins_failure(line.text)):
            self._failure = [*self._failure, line][:_FAILURE_LINES]

    def _is_known(self, sign: Sign, line: Line) -> bool:
        """Whether a line was read before, when it was incomplete."""
        return self._signs[sign].offset == line.offset


def _pieces(line: bytes) -> Iterator[tuple[int, bytes]]:
    """Cut a line into pieces that overlap, each with its offset."""
    yield 0, line[:_LONGEST_LINE]
    step = _LONGEST_LINE - _OVERLAP
    for start in range(step, len(line) - _OVERLAP, step):
        yield start, line[start : start + _LONGEST_LINE]


def find_last_lines(log: BinaryIO, lines: int) -> int:
    """Return where the last lines of a file begin, in bytes; memory does not depend on its size.

    Args:
        log: The file.
        lines: How many.
    """
    end = log.seek(0, os.SEEK_END)
    # A line feed at the very end ends the last line; it begins none.
    missing = lines + 1
    position = end
    while position:
        count = min(_BLOCK, position)
        position -= count
        log.seek(position)
        block = log.read(count)
        if position + count == end and not block.endswith(b"\n"):
            missing -= 1
        found = block.count(b"\n")
        if found < missing:
            missing -= found
            continue
        place = len(block)
        for _ in range(missing):
            place = block.rindex(b"\n", 0, place)
        return position + place + 1
    return 0
