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
# RFC 854: commands of two bytes, of three, and subnegotiations; 0xff 0xff is a byte of its own.
_TELNET = re.compile(rb"\xff(?:([\xff])|[\xf0-\xf9]|[\xfb-\xfe].|\xfa.*?\xff\xf0)", re.DOTALL)
_CUT_OFF = re.compile(rb"\xff(?:[\xfb-\xfe]?|\xfa.*)\Z", re.DOTALL)


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
        self._pending = b""

    def close(self) -> None:
        """Leave it."""
        self._socket.close()

    def fileno(self) -> int:
        """Give what becomes readable when there is something to receive."""
        return self._socket.fileno()

    def receive(self) -> bytes | None:
        """Give what has come, without telnet's own words; None at the end."""
        try:
            chunk = self._socket.recv(_CHUNK)
        except ConnectionResetError:
            return None
        if not chunk:
            return None
        text, self._pending = strip_telnet(self._pending + chunk)
        return text

    def send(self, data: bytes) -> None:
        """Send what was typed."""
        self._socket.sendall(data.replace(b"\xff", b"\xff\xff"))

    def resize(self, columns: int, lines: int) -> None:
        """Do nothing: a serial line knows no size."""


def strip_telnet(data: bytes) -> tuple[bytes, bytes]:
    """Take telnet's own words out; give the text, and the beginning of a word that is cut off."""
    text = _TELNET.sub(lambda match: match[1] or b"", data)
    if b"\xff" not in data:
        return text, b""
    # Where the data was cut in the middle of a word, that begins after all whole ones.
    end = max((match.end() for match in _TELNET.finditer(data)), default=0)
    cut = _CUT_OFF.search(data, end)
    pending = cut[0] if cut else b""
    return text[: len(text) - len(pending)], pending
