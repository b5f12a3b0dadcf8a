"""The local terminal, connected to a remote one and restored afterwards; standard streams."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import shutil
import signal
import socket
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, TextIO, cast

from pycloudlib._base.documents import to_bytes

if TYPE_CHECKING:
    import paramiko

_CHUNK = 1 << 16
_CONNECT_LIMIT = 10.0
# QEMU greets whoever connects (chardev/char-socket.c) with four times IAC, WILL or DO, and an
# option (RFC 854). All bytes after that are the guest's, unchanged: QEMU does not double 0xff.
_WORD_LENGTH = 3
_GREETING_WORDS = 4
_WORD_START = re.compile(rb"(?:\xff(?:[\xfb-\xfe].?)?)?", re.DOTALL)


class Remote(Protocol):
    """The other end of a terminal."""

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when there is output."""

    def receive(self) -> bytes | None:
        """Return the output; None at the end."""

    def send(self, data: bytes) -> None:
        """Send input."""

    def resize(self, columns: int, lines: int) -> None:
        """Set the size of the terminal."""


def relay(remote: Remote, *, stdin: int = 0, stdout: int = 1, escape: bytes | None = None) -> bool:
    """Connect the terminal to the other end until that ends, or `escape` is typed.

    Args:
        remote: The other end.
        stdin: The terminal whose input is sent; raw meanwhile.
        stdout: Where output is written.
        escape: The key that disconnects; None for none.

    Returns:
        Whether the key was typed; False if the other end has ended.
    """
    with _raw(stdin), _resize_events() as resized:
        remote.resize(*terminal_size())
        incoming = remote.fileno()
        sources = [incoming, resized, stdin]
        while True:
            ready, _, _ = select.select(sources, [], [])
            if resized in ready:
                os.read(resized, _CHUNK)
                remote.resize(*terminal_size())
            if incoming in ready:
                output = remote.receive()
                if output is None:
                    return False
                write_all(stdout, output)
            if stdin in ready:
                typed = os.read(stdin, _CHUNK)
                before, key, _ = typed.partition(escape) if escape else (typed, b"", b"")
                if before:
                    remote.send(before)
                if key:
                    return True
                if not typed:
                    sources.remove(stdin)


def terminal_size() -> tuple[int, int]:
    """Return the columns and lines of the terminal."""
    size = shutil.get_terminal_size()
    return size.columns, size.lines


def is_terminal(*descriptors: int) -> bool:
    """Whether all descriptors are terminals."""
    return all(os.isatty(descriptor) for descriptor in descriptors)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all data, even if the descriptor does not block."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            select.select([], [descriptor], [])


@contextlib.contextmanager
def _raw(descriptor: int) -> Iterator[None]:
    """Make a terminal raw inside the block; its settings are restored even if a signal ends it."""
    if not os.isatty(descriptor):
        yield
        return
    before = termios.tcgetattr(descriptor)
    with exiting_on_signals():
        try:
            tty.setraw(descriptor, termios.TCSADRAIN)
            yield
        finally:
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


@contextlib.contextmanager
def exiting_on_signals() -> Iterator[None]:
    """Raise SystemExit for signals that would end the process, so that `finally` blocks run.

    Only the main thread may set signal handlers; in any other, nothing is done.
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
def _resize_events() -> Iterator[int]:
    """Yield a descriptor that becomes readable when the terminal's size has changed."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)

    def report(_number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(BlockingIOError):  # full, so readable already
            os.write(theirs, b".")

    before = signal.signal(signal.SIGWINCH, report)
    try:
        yield ours
    finally:
        signal.signal(signal.SIGWINCH, before)
        os.close(ours)
        os.close(theirs)


class SshTerminal:
    """A pseudo-terminal in the guest that runs a command, or the login shell.

    Args:
        channel: An open channel.
        command: The command line; None for the login shell.
        size: Columns and lines of the local terminal.
    """

    def __init__(
        self, channel: paramiko.Channel, command: str | None, size: tuple[int, int]
    ) -> None:
        self._channel = channel
        channel.get_pty(os.environ.get("TERM", "xterm"), *size)
        if command is None:
            channel.invoke_shell()
        else:
            channel.exec_command(to_bytes(command))

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when there is output."""
        return self._channel.fileno()

    def receive(self) -> bytes | None:
        """Return the output; None at the end."""
        return self._channel.recv(_CHUNK) or None

    def send(self, data: bytes) -> None:
        """Send input."""
        try:
            self._channel.sendall(data)
        except OSError:
            if not self._channel.closed:
                raise  # else there may be output still

    def resize(self, columns: int, lines: int) -> None:
        """Set the size of the terminal."""
        self._channel.resize_pty(columns, lines)

    def wait(self) -> int:
        """Wait for the end, and return the exit status; -1 if there is none."""
        with self._channel:
            self._channel.status_event.wait()
            return self._channel.exit_status


class SerialConsole:
    """A machine's serial console, by telnet.

    Args:
        host: Its address.
        port: Its port.

    Raises:
        OSError: Nothing listens there.
    """

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port), _CONNECT_LIMIT)
        self._socket.settimeout(None)
        self._greeting = Greeting()

    def close(self) -> None:
        """Disconnect."""
        self._socket.close()

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when there is output."""
        return self._socket.fileno()

    def receive(self) -> bytes | None:
        """Return the output, without QEMU's greeting; None at the end."""
        try:
            chunk = self._socket.recv(_CHUNK)
        except ConnectionResetError:
            return None
        return self._greeting.remove_from(chunk) if chunk else None

    def send(self, data: bytes) -> None:
        """Send input."""
        self._socket.sendall(data.replace(b"\xff", b"\xff\xff"))

    def resize(self, columns: int, lines: int) -> None:
        """Do nothing: a serial line has no size."""


class Greeting:
    """The telnet commands with which QEMU greets whoever connects.

    Nothing later is taken for telnet's: a guest could hide its output from the user, or have an
    endless command buffered here.
    """

    def __init__(self) -> None:
        self._words_left = _GREETING_WORDS
        self._pending = b""

    def remove_from(self, data: bytes) -> bytes:
        """Return received data without the greeting, which may come in pieces."""
        data = self._pending + data
        self._pending = b""
        while self._words_left:
            word = data[:_WORD_LENGTH]
            if not _WORD_START.fullmatch(word):
                self._words_left = 0
            elif len(word) < _WORD_LENGTH:
                self._pending = word
                return b""
            else:
                data = data[_WORD_LENGTH:]
                self._words_left -= 1
        return data


def secure_streams() -> None:
    """Open closed standard streams on /dev/null, so that no other file takes their descriptors.

    Standard error drops what cannot be written: a full disk, or a reader that has gone, is no
    reason for a command to fail that has done its work.
    """
    for descriptor in range(3):
        if not _is_usable(descriptor):
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, descriptor)
            if null != descriptor:
                os.close(null)
    # Python has none for a descriptor that was closed when it started.
    sys.stdin = sys.stdin or _open_null("r")
    sys.stdout = sys.stdout or _open_null("w")
    sys.stderr = cast("TextIO", _DroppingStream(sys.stderr or _open_null("w")))


def _is_usable(descriptor: int) -> bool:
    """Whether it is open in the right direction: a shell may have its script in its place."""
    try:
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError:
        return False
    return mode != (os.O_WRONLY if descriptor == 0 else os.O_RDONLY)


def _open_null(mode: str) -> TextIO:
    return cast("TextIO", open(os.devnull, mode, encoding="utf-8", errors="replace"))  # noqa: PTH123


class _DroppingStream:
    """A text stream that drops what cannot be written.

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
        """Write what is buffered, if that is possible."""
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # What the stream has buffered goes there, too, when it is closed.
            with open(os.devnull, "wb") as null:  # noqa: PTH123
                os.dup2(null.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
