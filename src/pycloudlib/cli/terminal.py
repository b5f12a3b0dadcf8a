"""The local terminal, handed to something remote and restored; standard streams."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from types import FrameType
from typing import Any, Protocol, TextIO, cast

_CHUNK = 1 << 16


class Remote(Protocol):
    """The other end of a terminal."""

    def fileno(self) -> int:
        """Give what becomes readable when there is something to receive."""

    def receive(self) -> bytes | None:
        """Give what has come; None at the end."""

    def send(self, data: bytes) -> None:
        """Send what was typed."""

    def resize(self, columns: int, lines: int) -> None:
        """Take note of the terminal's size."""


def relay(remote: Remote, *, stdin: int = 0, stdout: int = 1, escape: bytes | None = None) -> bool:
    """Hand the terminal to the other end until that ends, or `escape` is typed.

    Args:
        remote: The other end.
        stdin: The terminal that is typed on; made raw meanwhile.
        stdout: Where it is shown what comes.
        escape: The key by which it is left; None for none.

    Returns:
        Whether it was left, not ended.
    """
    with _raw(stdin), _telling_resizes() as resized:
        remote.resize(*terminal_size())
        incoming = remote.fileno()
        waited_for = [incoming, resized, stdin]
        while True:
            ready, _, _ = select.select(waited_for, [], [])
            if resized in ready:
                os.read(resized, _CHUNK)
                remote.resize(*terminal_size())
            if incoming in ready:
                shown = remote.receive()
                if shown is None:
                    return False
                _write_all(stdout, shown)
            if stdin in ready:
                typed = os.read(stdin, _CHUNK)
                before, left, _ = typed.partition(escape) if escape else (typed, b"", b"")
                if before:
                    remote.send(before)
                if left:
                    return True
                if not typed:
                    waited_for.remove(stdin)


def terminal_size() -> tuple[int, int]:
    """Give the columns and lines of the terminal."""
    size = shutil.get_terminal_size()
    return size.columns, size.lines


def is_terminal(*descriptors: int) -> bool:
    """Say whether all of these are terminals."""
    return all(os.isatty(descriptor) for descriptor in descriptors)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            select.select([], [descriptor], [])


@contextlib.contextmanager
def _raw(descriptor: int) -> Iterator[None]:
    """Make a terminal raw; what was set is set again, when a signal ends this process even."""
    if not os.isatty(descriptor):
        yield
        return
    before = termios.tcgetattr(descriptor)
    with ending_by_exception():
        try:
            tty.setraw(descriptor, termios.TCSADRAIN)
            yield
        finally:
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


@contextlib.contextmanager
def ending_by_exception() -> Iterator[None]:
    """Let signals that would end the process raise instead, so that all is put in order first.

    Only the main thread may decide about signals; in any other, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    handlers = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _telling_resizes() -> Iterator[int]:
    """Give a descriptor that becomes readable when the terminal's size has changed."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)

    def tell(_number: int, _frame: FrameType | None) -> None:
        # One that is full has told already.
        with contextlib.suppress(BlockingIOError):
            os.write(theirs, b".")

    before = signal.signal(signal.SIGWINCH, tell)
    try:
        yield ours
    finally:
        signal.signal(signal.SIGWINCH, before)
        os.close(ours)
        os.close(theirs)


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
