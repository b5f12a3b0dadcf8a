"""A kernel's last words, looked for on the console while commands run in its guest."""

from __future__ import annotations

import os
from pathlib import Path

from pycloudlib.diagnosis import Cause
from pycloudlib.guest.bootphases import clean_line
from pycloudlib.guest.deadends import find_sign

# Most looks find none of this, which takes no regular expression to say.
_LAST_WORDS = b"end Kernel panic"
# They are the last that a kernel prints, and some fifty lines.
_TAIL_BYTES = 1 << 16


class PanicWatch:
    """Says whether a guest's kernel has panicked, by its console.

    A look costs next to nothing while nothing is printed.

    Args:
        console_log: The file; it may not exist yet.
    """

    def __init__(self, console_log: Path) -> None:
        self._console_log = console_log
        self._looked_at = (0, 0)
        self._found: tuple[Cause, str] | None = None

    def look(self, start: int) -> tuple[Cause, str] | None:
        """Give why and the line that tells; None of a kernel that has not panicked for good.

        Args:
            start: Where in the log the machine's present run begins, in bytes.
        """
        try:
            size = self._console_log.stat().st_size
        except FileNotFoundError:
            return None
        if self._looked_at != (start, size):
            self._looked_at, self._found = (start, size), self._read(max(start, size - _TAIL_BYTES))
        return self._found

    def _read(self, offset: int) -> tuple[Cause, str] | None:
        with self._console_log.open("rb") as log:
            log.seek(offset, os.SEEK_SET)
            tail = log.read()
        if _LAST_WORDS not in tail:
            return None
        found = find_sign([clean_line(line) for line in tail.split(b"\n")], final=True)
        if found is None or found[0].cause not in (Cause.KERNEL_PANIC, Cause.GUEST_MEMORY):
            return None
        return found[0].cause, found[1]
