"""The local terminal handed to something remote: raw, with its size, and restored on every way out.

`relay` knows nothing of SSH or telnet: both are a `Remote`.
"""

from __future__ import annotations

import contextlib
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
from typing import Protocol

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
