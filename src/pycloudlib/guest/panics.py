"""A kernel's last words, looked for on the console while commands run in its guest."""

from __future__ import annotations

from pathlib import Path

from pycloudlib.diagnosis import Cause
from pycloudlib.guest.bootphases import clean_line, read_console_tail
from pycloudlib.guest.deadends import find_sign

# Most looks find none of this, which takes no regular expression to say.
_LAST_WORDS = b"end Kernel panic"


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
            self._looked_at, self._found = (start, size), self._read(start)
        return self._found

    def _read(self, start: int) -> tuple[Cause, str] | None:
        tail = read_console_tail(self._console_log, start)
        if _LAST_WORDS not in tail:
            return None
        found = find_sign([clean_line(line) for line in tail.split(b"\n")], final=True)
        if found is None or found[0].cause not in (Cause.KERNEL_PANIC, Cause.GUEST_MEMORY):
            return None
        return found[0].cause, found[1]
