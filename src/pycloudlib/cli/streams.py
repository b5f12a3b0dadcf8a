"""Standard input and outputs of this program: there in any case, and no harm when nobody reads."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


def secure_streams() -> None:
    """Open what is closed of standard input and outputs, so that nothing else takes its place.

    What is told beside a result is dropped where it cannot be written: a full disk or a reader
    that is gone is no reason for a command to fail that has done its work.
    """
    for descriptor in range(3):
        if not _is_usable(descriptor):
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, descriptor)
            if null != descriptor:
                os.close(null)
    # Python has none for what was closed when it began.
    sys.stdin = sys.stdin or _open_null("r")
    sys.stdout = sys.stdout or _open_null("w")
    sys.stderr = cast("TextIO", Notes(sys.stderr or _open_null("w")))


def _is_usable(descriptor: int) -> bool:
    """Say whether it is open for what it is used for: a shell's own script may be in its place."""
    try:
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError:
        return False
    return mode != (os.O_WRONLY if descriptor == 0 else os.O_RDONLY)


def _open_null(mode: str) -> TextIO:
    return cast("TextIO", open(os.devnull, mode, encoding="utf-8", errors="replace"))  # noqa: PTH123


class Notes:
    """A text stream on which what cannot be written is dropped.

    Args:
        stream: The stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, if that is possible."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is kept, if that is possible."""
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # What the stream keeps still goes there, too, when it is closed.
            with open(os.devnull, "wb") as null:  # noqa: PTH123
                os.dup2(null.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
