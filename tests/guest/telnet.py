"""A small telnet client for the serial console: enough to log in and run a command."""

from __future__ import annotations

import re
import socket
import time

_COMMANDS = re.compile(rb"\xff(?:[\xfb-\xfe].|\xfa.*?\xff\xf0|[\xf0-\xf9])", re.DOTALL)


class Console:
    """A connection to a machine's serial console."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), 30)
        self._seen = b""

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._socket.close()

    def send(self, line: str) -> None:
        """Type a line."""
        self._socket.sendall(line.encode() + b"\r")

    def expect(self, pattern: str, seconds: float = 120) -> str:
        """Read until a pattern comes; give all that was read up to its end."""
        limit = time.monotonic() + seconds
        while (match := re.search(pattern.encode(), self._seen)) is None:
            self._socket.settimeout(max(0.1, limit - time.monotonic()))
            chunk = self._socket.recv(4096)
            assert chunk, f"the console was closed after {self._seen!r}"
            self._seen = _COMMANDS.sub(b"", self._seen + chunk)
        text, self._seen = self._seen[: match.end()], self._seen[match.end() :]
        return text.decode(errors="replace")
