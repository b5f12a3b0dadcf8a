"""The host's end of the helper's port, while half of a copy in the guest has the other end.

There is no cipher and no network between the two, and neither is believed: the guest may send
whatever it likes, and hang up at any time.
"""

from __future__ import annotations

import contextlib
import io
import secrets
import select
import socket
import time
from collections.abc import Callable, Iterator
from importlib import resources
from typing import BinaryIO, Protocol, cast

from pycloudlib.guest.programs import copy_in_guest
from pycloudlib.guest.programs.copy_in_guest import END, Send

# Seconds between two checks of whether the other end is there.
_LOOK = 0.5
# Seconds that it may take for anything at all, as for an answer of SFTP.
_STALL_LIMIT = 60.0
_BUFFER = 1 << 18
# What an earlier connection was sent comes first, in lines of any length.
_LONGEST_BEGINNING = 4 << 20


class PortError(Exception):
    """The other end is gone, or does not answer."""


class PortStream:
    """A connection to the port, and the half of a copy at its other end.

    Args:
        sock: The connection.
        check: Called regularly while the other end is waited for; raises where that is in vain.
        buffer: What was received already.

    Attributes:
        token: By what the half in the guest says that it is there.
        records: Sends records; `flush` is to follow.
        answers: The stream that records are read from.
    """

    def __init__(
        self,
        sock: socket.socket,
        check: Callable[[], None],
        buffer: bytearray | None = None,
        stall_limit: float = _STALL_LIMIT,
    ) -> None:
        sock.setblocking(False)
        raw = _Raw(sock, check, bytearray() if buffer is None else buffer, stall_limit)
        self.token = secrets.token_hex(16)
        self.answers: BinaryIO = cast("BinaryIO", io.BufferedReader(raw, _BUFFER))
        self._output = io.BufferedWriter(raw, _BUFFER)
        self.records: Send = copy_in_guest.sender(cast("BinaryIO", self._output))

    def begin(self, on_line: Callable[[bytes], object] = len) -> None:
        """Wait until the half in the guest is there.

        Args:
            on_line: Called with each other line that comes before; may raise.

        Raises:
            PortError: It did not come.
        """
        for line in self.read_lines():
            if line.rstrip(b"\n") == self.token.encode():
                return
            on_line(line)
        raise PortError("the connection ended before a copy had begun")

    def read_lines(self) -> Iterator[bytes]:
        """Read lines to the end of the connection.

        Raises:
            PortError: There are more than what is in the guest has to say.
        """
        received = 0
        while line := self.answers.readline(_LONGEST_BEGINNING):
            received += len(line)
            if received > _LONGEST_BEGINNING:
                raise PortError("what is in the guest sends something else")
            yield line

    def flush(self) -> None:
        """Send what is still held."""
        self._output.flush()

    def end(self) -> None:
        """Let the half in the guest end, after its last record was received."""
        self.records(END, b"")
        self.flush()


class _Raw(io.RawIOBase):
    """Both directions of a connection, without a buffer."""

    def __init__(
        self,
        sock: socket.socket,
        check: Callable[[], None],
        buffer: bytearray,
        stall_limit: float,
    ) -> None:
        super().__init__()
        self._socket = sock
        self._check = check
        self._received = buffer
        self._stall_limit = stall_limit

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        if self._received:
            count = min(len(view), len(self._received))
            view[:count] = self._received[:count]
            del self._received[:count]
            return count
        return self._when(select.POLLIN, lambda: self._socket.recv_into(view))

    def write(self, data: object) -> int:
        return self._when(select.POLLOUT, lambda: self._socket.send(data))  # type: ignore[arg-type]

    def _when(self, event: int, act: Callable[[], int]) -> int:
        """Act as soon as that is possible.

        Raises:
            PortError: The connection is lost, or nothing moves.
        """
        since = time.monotonic()
        poller = select.poll()
        poller.register(self._socket, event)
        while True:
            try:
                return act()
            except BlockingIOError:
                pass
            except OSError as error:
                raise PortError(f"the connection to the port is lost: {error}") from error
            if not poller.poll(_LOOK * 1000):
                self._check()
                if time.monotonic() - since > self._stall_limit:
                    raise PortError(f"nothing was received for {self._stall_limit:.0f} s")


class FilePort(Protocol):
    """Runs the half of a copy in the guest that reads or writes by the port."""

    def is_better(self, size: int) -> bool:
        """Whether a file of a size is copied sooner by it than by an open SSH connection."""

    @property
    def is_ready(self) -> bool:
        """Whether a helper has the port open, so that SSH is not needed."""

    def copying(
        self, role: str, path: str, name: str = "", *, size: int = 0
    ) -> contextlib.AbstractContextManager[PortStream | None]:
        """Run the half in the guest during the block, which gets None where that cannot be.

        Args:
            role: `read`, `write` or `write-regular`.
            path: The path in the guest.
            name: The source's name in a directory; see `copy_in_guest`.
            size: The bytes that are to be copied, if known: others that use the port are waited
                for, not longer than SSH would take.

        Raises:
            paramiko.SSHException: In the block: the guest is gone.
        """


def program() -> str:
    """Return the text of the half in the guest."""
    package = resources.files(copy_in_guest.__package__ or "")
    return package.joinpath("copy_in_guest.py").read_text("utf-8")
