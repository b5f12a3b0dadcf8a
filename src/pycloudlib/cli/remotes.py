"""What the local terminal is handed to: a shell or command over SSH, or a serial console."""

from __future__ import annotations

import os
import re
import socket
from typing import TYPE_CHECKING

from pycloudlib.rawtext import to_bytes

if TYPE_CHECKING:
    import paramiko

_CHUNK = 1 << 16
_CONNECT_LIMIT = 10.0
# What QEMU says when somebody connects (chardev/char-socket.c): four times IAC, WILL or DO, and an
# option (RFC 854). All that comes after is the guest's, as it is: QEMU doubles no 0xff.
_WORD_LENGTH = 3
_GREETING_WORDS = 4
_WORD_START = re.compile(rb"(?:\xff(?:[\xfb-\xfe].?)?)?", re.DOTALL)


class SshTerminal:
    """A pseudo-terminal in the guest with a command, or the login shell, on it.

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
        """Give what becomes readable when there is something to receive."""
        return self._channel.fileno()

    def receive(self) -> bytes | None:
        """Give what has come; None at the end."""
        return self._channel.recv(_CHUNK) or None

    def send(self, data: bytes) -> None:
        """Send what was typed."""
        try:
            self._channel.sendall(data)
        except OSError:
            if not self._channel.closed:
                raise  # what it has to say at its end comes still

    def resize(self, columns: int, lines: int) -> None:
        """Take note of the terminal's size."""
        self._channel.resize_pty(columns, lines)

    def wait(self) -> int:
        """Give the exit status; -1 when there is none."""
        with self._channel:
            self._channel.status_event.wait()
            return self._channel.exit_status


class SerialConsole:
    """A machine's serial console, which it offers by telnet.

    Args:
        host: Its address.
        port: Its port.

    Raises:
        OSError: Nobody listens there.
    """

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port), _CONNECT_LIMIT)
        self._socket.settimeout(None)
        self._greeting = Greeting()

    def close(self) -> None:
        """Leave it."""
        self._socket.close()

    def fileno(self) -> int:
        """Give what becomes readable when there is something to receive."""
        return self._socket.fileno()

    def receive(self) -> bytes | None:
        """Give what has come, without QEMU's greeting; None at the end."""
        try:
            chunk = self._socket.recv(_CHUNK)
        except ConnectionResetError:
            return None
        if not chunk:
            return None
        return self._greeting.take_out(chunk)

    def send(self, data: bytes) -> None:
        """Send what was typed."""
        self._socket.sendall(data.replace(b"\xff", b"\xff\xff"))

    def resize(self, columns: int, lines: int) -> None:
        """Do nothing: a serial line knows no size."""


class Greeting:
    """The telnet words by which QEMU greets whoever connects.

    Nothing later is taken for telnet's: a guest could hide what it prints from people, or let an
    endless word be kept here.
    """

    def __init__(self) -> None:
        self._words_left = _GREETING_WORDS
        self._pending = b""

    def take_out(self, data: bytes) -> bytes:
        """Return what has come without the greeting, which may come in pieces."""
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
