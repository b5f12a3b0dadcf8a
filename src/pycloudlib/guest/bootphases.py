"""The phases of a boot, as the serial console tells them."""

from __future__ import annotations

import enum
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pycloudlib.diagnosis import Cause
from pycloudlib.guest.cloudinit import find_console_warning
from pycloudlib.guest.deadends import find_sign

_log = logging.getLogger(__name__)

# The console's file is looked at this often; only the bytes that are new are read.
_LOOK_SECONDS = 0.25
# What a line is looked at for comes early in it; one that never ends must not grow for ever.
_LONGEST_LINE = 4096
_TAIL_BYTES = 64 << 10
# Lines that are looked at for the end of a boot: a kernel's last words are some fifty.
_KEPT_LINES = 300
# Colours and cursor movements, which systemd and firmware print.
_CONTROL = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|[()][0-9AB]|c)|[\x00-\x08\x0b-\x1f\x7f]")


@enum.unique
class Phase(enum.Enum):
    """What a machine does between power-on and ready, in order."""

    FIRMWARE = "firmware"
    BOOT_LOADER = "boot loader"
    KERNEL = "kernel"
    INITRD = "initrd"
    SYSTEMD = "systemd"
    CLOUD_INIT_LOCAL = "cloud-init local"
    CLOUD_INIT_NETWORK = "cloud-init network"
    CLOUD_INIT_CONFIG = "cloud-init config"
    CLOUD_INIT_FINAL = "cloud-init final"
    CLOUD_INIT_DONE = "cloud-init done"


# Its version is short: what is printed may be long, and begin in this manner many times.
_CLOUD_INIT = rb"Cloud-init v\. .{1,100} "

_ORDER = {phase: number for number, phase in enumerate(Phase)}

_SIGNS: tuple[tuple[Phase, re.Pattern[bytes]], ...] = (
    (Phase.FIRMWARE, re.compile(rb"SeaBIOS|BdsDxe|UEFI")),
    (Phase.BOOT_LOADER, re.compile(rb"GRUB|Welcome to GRUB|Booting `")),
    (Phase.KERNEL, re.compile(rb"Linux version |Run /init as init")),
    (Phase.INITRD, re.compile(rb"Begin: Loading essential drivers|Loading, please wait")),
    # To its end: a line is looked at before it is whole, and GRUB welcomes too.
    (Phase.SYSTEMD, re.compile(rb"systemd\[1\]: |Welcome to .{1,200}!")),
    (Phase.CLOUD_INIT_LOCAL, re.compile(_CLOUD_INIT + rb"running 'init-local'")),
    (Phase.CLOUD_INIT_NETWORK, re.compile(_CLOUD_INIT + rb"running 'init'")),
    (Phase.CLOUD_INIT_CONFIG, re.compile(_CLOUD_INIT + rb"running 'modules:config'")),
    (Phase.CLOUD_INIT_FINAL, re.compile(_CLOUD_INIT + rb"running 'modules:final'")),
    (Phase.CLOUD_INIT_DONE, re.compile(_CLOUD_INIT + rb"finished at")),
)


def find_phase(line: bytes) -> Phase | None:
    """Say which phase a line of the console begins; None for most lines."""
    return next((phase for phase, sign in _SIGNS if sign.search(line)), None)


def clean_line(line: bytes) -> str:
    """Give a line of the console as text, without control sequences."""
    return _CONTROL.sub(b"", line).decode(errors="replace").strip()


def read_console_tail(console_log: Path, start: int) -> bytes:
    """Read the end of a console log: as much as a kernel's last words take, and more.

    Args:
        console_log: The file.
        start: Where in it the machine's present run begins, in bytes.

    Raises:
        FileNotFoundError: It does not exist yet.
    """
    with console_log.open("rb") as log:
        end = log.seek(0, os.SEEK_END)
        log.seek(max(start, end - _TAIL_BYTES))
        return log.read()


# The firmware's first line, or that of a kernel that another one started (kexec); not what a
# service prints of one, as systemd forwards it: cloud-init[700]: [    0.000000] Linux version
_FIRMWARE_STARTS = re.compile(rb"SeaBIOS \(version |BdsDxe: loading ")
_BOOT_STARTS = re.compile(
    rb"(?<!\]: )(?:" + _FIRMWARE_STARTS.pattern + rb"|\[ {1,8}0\.0{6}\] Linux version )"
)
_NAME_END = 3  # bytes of what ends a service's name
_LONGEST_START = 64
_CHUNK = 1 << 20


class BootFinder:
    """Finds where on a console the present boot begins, when the guest has rebooted by itself, too.

    Safe to use from several threads: at worst, bytes are looked at twice.

    Args:
        console_log: The file; it may not exist yet.
    """

    def __init__(self, console_log: Path) -> None:
        self._console_log = console_log
        self._scan = _Scan(0, 0, 0, has_kernel=False)

    def find(self, run_start: int) -> int:
        """Return the offset of the present boot in bytes; each byte of the log is read once.

        Args:
            run_start: Where the machine's present run begins, from power-on.
        """
        scan = self._scan
        if scan.run_start != run_start:
            scan = _Scan(run_start, run_start, run_start, has_kernel=False)
        try:
            with self._console_log.open("rb") as log:
                while True:
                    log.seek(scan.position)
                    chunk = log.read(_CHUNK)
                    scan = scan.go_on(chunk)
                    if len(chunk) < _CHUNK:
                        break
        except FileNotFoundError:
            pass
        self._scan = scan
        return scan.boot_start

    def count(self, run_start: int) -> int:
        """Return how often the guest has booted in the machine's present run.

        Args:
            run_start: Where that begins, from power-on.
        """
        self.find(run_start)
        scan = self._scan
        # One that goes on from a saved machine has begun its first boot there.
        return max(scan.boots + scan.begun_elsewhere, 1)


@dataclass(frozen=True, slots=True)
class _Scan:
    """How far a log was looked through for beginnings of boots, and what was found."""

    run_start: int
    position: int
    boot_start: int
    has_kernel: bool
    boots: int = 0
    begun_elsewhere: bool = False

    def go_on(self, chunk: bytes) -> _Scan:
        """Look through the bytes that follow; a start that may be cut off is left for later."""
        boot_start, has_kernel, boots, end = self.boot_start, self.has_kernel, self.boots, 0
        begun_elsewhere = self.begun_elsewhere
        # What is cut off from before it was looked at whole with the bytes before.
        known = _NAME_END if self.position > self.run_start else 0
        for match in _BOOT_STARTS.finditer(chunk, known):
            is_kernel = _FIRMWARE_STARTS.match(match[0]) is None
            # The first kernel after the firmware belongs to the same boot.
            if not is_kernel or has_kernel:
                boot_start = self.position + match.start()
            if not is_kernel or has_kernel or not boots:
                begun_elsewhere |= not boots and bool(clean_line(chunk[end : match.start()]))
                boots += 1
            has_kernel, end = is_kernel, match.end()
        seen = max(end, len(chunk) - _LONGEST_START)
        begun_elsewhere |= not boots and bool(clean_line(chunk[end:seen]))
        position = self.position + seen
        return _Scan(self.run_start, position, boot_start, has_kernel, boots, begun_elsewhere)


@dataclass(frozen=True, slots=True)
class PhaseStart:
    """When a phase was first seen.

    Attributes:
        phase: Which.
        seconds: Seconds after the power was switched on.
    """

    phase: Phase
    seconds: float


class BootWatch:
    """Follows a console log and notes when each phase begins.

    Where a boot follows another, its phases begin anew.

    A context manager: a thread follows the log inside its block.

    Args:
        console_log: The file; it may not exist yet.
        offset: Where in it this boot begins, in bytes.
        powered_on: When the power was switched on, in `time.monotonic` seconds.
        on_line: Called with the latest phase and line after each look at the log, new or not.
    """

    def __init__(
        self,
        console_log: Path,
        offset: int,
        powered_on: float,
        on_line: Callable[[Phase | None, str], None] | None = None,
    ) -> None:
        self._console_log = console_log
        self._position = offset
        self._powered_on = powered_on
        self._on_line = on_line
        self._partial = b""
        self._last_line = ""
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._dead_end: tuple[Cause, str] | None = None
        self._timeline: list[PhaseStart] = []
        # By their text, in order; of all boots that are followed.
        self._warnings: dict[str, None] = {}
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
        return tuple(self._timeline)

    @property
    def phase(self) -> Phase | None:
        """The latest phase; None before the first sign of life."""
        return self._timeline[-1].phase if self._timeline else None

    @property
    def dead_end(self) -> tuple[Cause, str] | None:
        """Why the boot goes no further by itself, and the line that tells; None while it may."""
        return self._dead_end

    @property
    def warnings(self) -> tuple[str, ...]:
        """What cloud-init warned of, as "WARNING: the first line of what is wrong"."""
        return tuple(self._warnings)

    @property
    def lines(self) -> tuple[str, ...]:
        """The latest lines, as text."""
        return tuple(self._lines)

    @property
    def position(self) -> int:
        """How much there is on the console: as long as that stays, nothing was printed."""
        return self._position

    @property
    def last_line(self) -> str:
        """The latest line with anything in it."""
        return self._last_line

    def _follow(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            self._look()
            if self._on_line is not None:
                try:
                    self._on_line(self.phase, self._last_line)
                except Exception:  # noqa: BLE001 - a callback's error must not end the wait
                    _log.exception("The callback for progress failed and is not called any more")
                    self._on_line = None

    def _look(self) -> None:
        try:
            with self._console_log.open("rb") as log:
                log.seek(self._position)
                new = log.read()
        except FileNotFoundError:
            return
        self._position += len(new)
        *lines, rest = (self._partial + new).split(b"\n")
        self._partial = rest[-_LONGEST_LINE:]
        for line in lines:
            text = clean_line(line[:_LONGEST_LINE])
            self._note(line[:_LONGEST_LINE])
            if (warning := find_console_warning(text)) is not None:
                self._warnings.setdefault(warning)
            self._lines.append(text)
        # GRUB and prompts leave their line open.
        self._note(self._partial)
        if new:
            # What user-data prints from then on is its own affair.
            done = self.phase is Phase.CLOUD_INIT_DONE
            console = [*self._lines, clean_line(self._partial)]
            found = find_sign(console, final=True, kernels=done)
            self._dead_end = None if found is None else (found[0].cause, found[1])

    def _begins_anew(self, line: bytes) -> bool:
        """Whether a line begins another boot than the one that was followed so far."""
        match = _BOOT_STARTS.search(line)
        if match is None or self.phase is None:
            return False
        begun = Phase.FIRMWARE if _FIRMWARE_STARTS.match(match[0]) else Phase.KERNEL
        return _ORDER[self.phase] > _ORDER[begun]

    def _note(self, line: bytes) -> None:
        if self._begins_anew(line):
            # The guest has rebooted by itself: nothing of the boot before counts, but what was
            # warned of in it.
            self._powered_on = time.monotonic()
            self._timeline.clear()
            self._lines.clear()
            self._dead_end = None
        text = clean_line(line)
        self._last_line = text or self._last_line
        phase = find_phase(line)
        # Later on, what user-data prints may look like an earlier phase.
        if phase is not None and (self.phase is None or _ORDER[phase] > _ORDER[self.phase]):
            self._timeline.append(PhaseStart(phase, time.monotonic() - self._powered_on))
