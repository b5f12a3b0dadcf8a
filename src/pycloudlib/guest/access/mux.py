"""Sessions on an SSH connection that a process of OpenSSH's `ssh` keeps open for other programs.

Such a process (`ControlMaster` in ssh_config(5)) has a socket, on which it takes requests and the
descriptors of a session's streams. The protocol is OpenSSH's PROTOCOL.mux, version 4, the same
since 2010.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import signal
import socket
import struct
import termios
import threading
import tty
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.files import make_socket, make_socket_pair, moved
from pycloudlib.guest.access.loginkey import pack

_VERSION = 4
_HELLO = 0x00000001
_NEW_SESSION, _ALIVE, _TERMINATE, _STOP = 0x10000002, 0x10000004, 0x10000005, 0x10000009
_FAILURES = (0x80000002, 0x80000003)
_EXIT, _OPENED = 0x80000004, 0x80000006
_NO_ESCAPE = 0xFFFFFFFF
_LONGEST_MESSAGE = 1 << 18


class MasterError(Exception):
    """The process that keeps the connection did not open a session, as far as is known."""


class RefusedError(MasterError):
    """It, or the server, refused to open a session; nothing has begun."""


@dataclass(frozen=True, slots=True)
class Terminal:
    """The terminal that a session gets.

    Attributes:
        kind: Its type (`TERM`).
        columns: Its width.
        lines: Its height.
    """

    kind: str
    columns: int
    lines: int


class Master:
    """The control of such a process: one connection to its socket, for one session or request.

    Args:
        path: Its socket, as short as a unix socket's address has to be.
        deadline: Until when it has to answer.

    Raises:
        MasterError: There is none.
    """

    def __init__(self, path: str | Path, deadline: Deadline) -> None:
        self._socket = make_socket(socket.AF_UNIX)
        try:
            with self._asking(deadline):
                self._socket.connect(str(path))
                self._send(struct.pack(">II", _HELLO, _VERSION))
                message = self._receive()
                if struct.unpack_from(">II", message) != (_HELLO, _VERSION):
                    raise MasterError("it speaks another version of the protocol")
        except BaseException:
            self._socket.close()
            raise

    def ask_pid(self, deadline: Deadline) -> int:
        """Ask it which process it is.

        Raises:
            MasterError: It did not answer.
        """
        # Not by the credentials of the socket: it has forked since it listens.
        with self._asking(deadline):
            self._send(struct.pack(">II", _ALIVE, 0))
            message = self._receive()
            return int(struct.unpack_from(">I", message, 8)[0])

    def close(self) -> None:
        """End the connection to it, and so the session."""
        # Wakes whoever reads, unlike closing it.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def stop(self, deadline: Deadline) -> None:
        """Let it open no further session; it ends when those that it has have ended."""
        self._request(_STOP, deadline)

    def end(self, deadline: Deadline) -> None:
        """End it, with its connection and all sessions."""
        self._request(_TERMINATE, deadline)

    def _request(self, kind: int, deadline: Deadline) -> None:
        with self._socket, self._asking(deadline):
            self._send(struct.pack(">II", kind, 0))
            self._receive()

    def open_session(
        self,
        request: bytes,
        streams: tuple[int, int, int],
        deadline: Deadline,
        terminal: str | None,
    ) -> None:
        """Open a session, which begins to run what is asked for.

        Args:
            request: The command line, or nothing for the login shell.
            streams: Descriptors that become its standard streams. The first has the modes and the
                size of a terminal, if it is one.
            deadline: Until when the server has to have opened it.
            terminal: The type of its terminal; None for none.

        Raises:
            RefusedError: It could not be opened; nothing has begun.
            MasterError: It was not opened in time; it still may be.
        """
        flags = struct.pack(">IIIII", terminal is not None, 0, 0, 0, _NO_ESCAPE)
        kind = os.fsencode(terminal or "")
        head = struct.pack(">II", _NEW_SESSION, 0) + pack(b"")
        with self._asking(deadline):
            self._send(head + flags + pack(kind) + pack(request))
            for stream in streams:
                socket.send_fds(self._socket, [b"\0"], [stream])
            message = self._receive()
            number = int.from_bytes(message[:4], "big")
            if number in _FAILURES:
                raise RefusedError(message[12:].decode(errors="replace"))
            if number != _OPENED:
                raise MasterError(f"it answered {number:#x}")

    def wait_for_status(self) -> int:
        """Wait for the end of the session; return its exit status, -1 if it has none."""
        status = -1
        self._socket.settimeout(None)
        with contextlib.suppress(MasterError, OSError, struct.error):
            while True:
                message = self._receive()
                if int.from_bytes(message[:4], "big") == _EXIT:
                    (status,) = struct.unpack_from(">I", message, 8)
        return status

    @contextlib.contextmanager
    def _asking(self, deadline: Deadline) -> Iterator[None]:
        self._socket.settimeout(max(deadline.remaining, 0.001))
        try:
            yield
        except (OSError, struct.error) as error:
            raise MasterError(str(error) or type(error).__name__) from error

    def _send(self, message: bytes) -> None:
        self._socket.sendall(pack(message))

    def _receive(self) -> bytes:
        length = int.from_bytes(self._read(4), "big")
        if length > _LONGEST_MESSAGE:
            raise MasterError(f"it announced {length} bytes")
        return self._read(length)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = self._socket.recv(size - len(data))
            if not chunk:
                raise MasterError("it has ended")
            data += chunk
        return data


class Channel:
    """A session that a master has opened: what this package uses of a `paramiko.Channel`.

    Args:
        master: The control of the master; this channel's alone.
        request: As for `Master.open_session`.
        deadline: Until when it has to be open.
        terminal: Its terminal; None for none.

    Attributes:
        exit_status: Its exit status; -1 as long as there is none.
        status_event: Set when it has ended.

    Raises:
        RefusedError: It could not be opened; nothing has begun.
        MasterError: It was not opened in time. It still may be: its input has ended then.
    """

    def __init__(
        self,
        master: Master,
        request: bytes,
        deadline: Deadline,
        terminal: Terminal | None,
    ) -> None:
        self.exit_status = -1
        self.status_event = threading.Event()
        self._master = master
        self._timeout: float | None = None
        self._closed = False
        # Not the caller's own: the master makes what it is given non-blocking, for all who share
        # it. Sockets, since shutting one down wakes its reader.
        self._input, theirs_in = make_socket_pair()
        self._output, theirs_out = make_socket_pair()
        self._errors, theirs_err = make_socket_pair()
        self._unread = b""
        self._terminal = None if terminal is None else _Input(terminal)
        with contextlib.ExitStack() as stack:
            for end in (theirs_in, theirs_out, theirs_err):
                stack.enter_context(end)
            stdin = theirs_in.fileno() if self._terminal is None else self._terminal.theirs
            try:
                if terminal is not None:
                    self._pid = master.ask_pid(deadline)
                master.open_session(
                    request,
                    (stdin, theirs_out.fileno(), theirs_err.fileno()),
                    deadline,
                    None if terminal is None else terminal.kind,
                )
            except BaseException:
                self.close()
                raise
        if self._terminal is not None:
            self._terminal.make_raw()
        threading.Thread(target=self._wait, name="ssh-session", daemon=True).start()

    def _wait(self) -> None:
        self.exit_status = self._master.wait_for_status()
        self.status_event.set()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether it is closed on this side."""
        return self._closed

    def close(self) -> None:
        """Close it; in any thread."""
        self._closed = True
        self._master.close()
        for stream in (self._input, self._output, self._errors):
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when there is output."""
        return self._output.fileno()

    def settimeout(self, timeout: float | None) -> None:
        """Limit the seconds that each call below waits."""
        self._timeout = timeout
        for stream in (self._input, self._output, self._errors):
            stream.settimeout(timeout)

    def gettimeout(self) -> float | None:
        """Return that limit."""
        return self._timeout

    def recv(self, size: int) -> bytes:
        """Return output; nothing at its end."""
        if self._unread:
            data, self._unread = self._unread[:size], self._unread[size:]
            return data
        return self._output.recv(size)

    def unread(self, data: bytes) -> None:
        """Return output that was received once more, before any other."""
        self._unread = data + self._unread

    def recv_stderr(self, size: int) -> bytes:
        """Return error output; nothing at its end."""
        return self._errors.recv(size)

    def send(self, data: bytes) -> int:
        """Send input, at least a part of it; return how much."""
        if self._terminal is not None:
            return os.write(self._terminal.ours, data)
        return self._input.send(data)

    def sendall(self, data: bytes) -> None:
        """Send input."""
        while data:
            data = data[self.send(data) :]

    def shutdown_write(self) -> None:
        """End the input; a terminal's does not end."""
        if self._terminal is None:
            self._input.shutdown(socket.SHUT_WR)

    def makefile_stderr(self, mode: str) -> io.BufferedReader:
        """Return the error output as a file."""
        return cast("io.BufferedReader", self._errors.makefile(cast("Any", mode)))

    def recv_exit_status(self) -> int:
        """Wait for its end; return its exit status, -1 if it has none."""
        self.status_event.wait()
        return self.exit_status

    def resize_pty(self, columns: int, lines: int) -> None:
        """Set the size of its terminal."""
        if self._terminal is not None:
            self._terminal.resize(columns, lines)
            with contextlib.suppress(OSError):  # it has just ended
                os.kill(self._pid, signal.SIGWINCH)


class _Input:
    """A terminal of this host, from which the master takes the modes and the size of the guest's.

    Only input passes through it: output that came before it is raw would be changed.
    """

    def __init__(self, terminal: Terminal) -> None:
        self.ours, self.theirs = map(moved, pty.openpty())
        self.resize(terminal.columns, terminal.lines)

    def __del__(self) -> None:
        for descriptor in (self.ours, self.theirs):
            os.close(descriptor)

    def make_raw(self) -> None:
        """Let input pass as it is; the guest's terminal has the modes by now."""
        tty.setraw(self.theirs, termios.TCSANOW)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
