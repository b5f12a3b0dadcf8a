"""An SSH server of our own, in this process: it runs commands on this host, as a guest would."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest
from paramiko.common import AUTH_SUCCESSFUL, OPEN_FAILED_CONNECT_FAILED, OPEN_SUCCEEDED
from paramiko.sftp import SFTP_OK

from pycloudlib.guest.access.portstream import FilePort, PortError, PortStream, program
from pycloudlib.instance import BaseInstance
from pycloudlib.key import KeyPair

_HOST_KEY = paramiko.ECDSAKey.generate()
SHELL = ("sh", "-c")


def replace_program(
    directory: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str | None
) -> None:
    """Let the guest have a shell script for a program; or none, and no other program but `sh`."""
    programs = directory / "programs"
    programs.mkdir()
    path = f"{programs}:{os.environ['PATH']}"
    if script is None:
        (programs / "sh").symlink_to("/bin/sh")
        path = str(programs)
    else:
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", path)


class ServedFiles(paramiko.SFTPServerInterface):
    """Files of this host; a relative path begins at the directory."""

    def __init__(self, server: paramiko.ServerInterface, directory: Path) -> None:
        super().__init__(server)
        self._directory = directory

    def _on(self, path: str, look: Any) -> Any:
        try:
            # Not by `/`, which would drop a slash at the end.
            return look(path if path.startswith("/") else f"{self._directory}/{path}")
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno or 0)

    def canonicalize(self, path: str) -> str:
        return path

    def stat(self, path: str) -> Any:
        return self._on(path, lambda file: paramiko.SFTPAttributes.from_stat(Path(file).stat()))

    def lstat(self, path: str) -> Any:
        return self._on(path, lambda file: paramiko.SFTPAttributes.from_stat(os.lstat(file)))

    def open(self, path: str, flags: int, attr: Any) -> Any:
        return self._on(path, lambda file: _File(os.open(file, flags, 0o666), flags))


class _File(paramiko.SFTPHandle):
    """A file that is open; written without a buffer, so that no error comes late.

    As OpenSSH's server does, it goes to a place in the file before it reads, and before it writes
    without appending: no FIFO and no terminal lets it.
    """

    def __init__(self, descriptor: int, flags: int) -> None:
        super().__init__(flags)
        self._descriptor = descriptor
        self._appends = bool(flags & os.O_APPEND)

    def close(self) -> None:
        os.close(self._descriptor)

    def stat(self) -> Any:
        return paramiko.SFTPAttributes.from_stat(os.fstat(self._descriptor))

    def read(self, offset: int, length: int) -> Any:
        try:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.read(self._descriptor, length)
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno or 0)

    def write(self, offset: int, data: Any) -> Any:
        try:
            if not self._appends:
                os.lseek(self._descriptor, offset, os.SEEK_SET)
            os.write(self._descriptor, data)
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno or 0)
        return SFTP_OK


class FileServer(paramiko.SFTPServer):
    """Hangs up when it is done, as sshd's does."""

    def finish_subsystem(self) -> None:
        super().finish_subsystem()
        assert self.sock is not None
        self.sock.close()


class _Server(paramiko.ServerInterface):
    """Accepts everybody, and runs what is asked for.

    Args:
        directory: Where commands run.
        most: How many sessions a connection may have; those of commands that run on count, too.
        sizes: Takes the sizes of terminals.
    """

    def __init__(self, directory: Path, most: int, sizes: list[tuple[int, int]]) -> None:
        self.directory = directory
        self.sizes = sizes
        self._most = most
        self._sessions: set[int] = set()
        self._ptys: dict[int, int] = {}

    def check_auth_password(self, username: str, password: str) -> int:
        return AUTH_SUCCESSFUL

    def get_allowed_auths(self, username: str) -> str:
        return "password"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        if len(self._sessions) >= self._most:
            return OPEN_FAILED_CONNECT_FAILED
        self._sessions.add(chanid)
        return OPEN_SUCCEEDED

    def check_channel_subsystem_request(self, channel: paramiko.Channel, name: str) -> bool:
        # Its place is free with its channel, as nothing is left of it that runs.
        self._sessions.discard(channel.chanid)
        return super().check_channel_subsystem_request(channel, name)

    def check_channel_pty_request(
        self,
        channel: paramiko.Channel,
        term: bytes,
        width: int,
        height: int,
        pixelwidth: int,
        pixelheight: int,
        modes: bytes,
    ) -> bool:
        self._ptys[channel.chanid] = 0
        self.sizes.append((width, height))
        return True

    def check_channel_window_change_request(
        self, channel: paramiko.Channel, width: int, height: int, *_pixels: int
    ) -> bool:
        self.sizes.append((width, height))
        if terminal := self._ptys.get(channel.chanid):
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        return True

    def check_channel_shell_request(self, channel: paramiko.Channel) -> bool:
        return self._start(channel, ["sh"])

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        return self._start(channel, [*SHELL, os.fsdecode(command)])

    def _start(self, channel: paramiko.Channel, argv: list[str]) -> bool:
        run = self._run_on_terminal if channel.chanid in self._ptys else self._run
        threading.Thread(target=run, args=(channel, argv), daemon=True).start()
        return True

    def _run(self, channel: paramiko.Channel, argv: list[str]) -> None:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.directory,
            bufsize=0,
            start_new_session=True,
        )
        assert process.stdin is not None

        def feed() -> None:
            with contextlib.suppress(OSError):
                while data := channel.recv(1 << 15):
                    process.stdin.write(data)  # type: ignore[union-attr]
            with contextlib.suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]

        def drain(source: Any, send: Any) -> None:
            with contextlib.suppress(OSError, EOFError):
                while data := source.read(1 << 15):
                    send(data)

        threading.Thread(target=feed, daemon=True).start()
        drains = [
            threading.Thread(target=drain, args=(process.stdout, channel.sendall)),
            threading.Thread(target=drain, args=(process.stderr, channel.sendall_stderr)),
        ]
        for thread in drains:
            thread.start()
        for thread in drains:
            thread.join()
        self._finish(channel, process.wait())

    def _run_on_terminal(self, channel: paramiko.Channel, argv: list[str]) -> None:
        ours, theirs = pty.openpty()
        width, height = self.sizes[0]
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self._ptys[channel.chanid] = ours
        process = subprocess.Popen(
            argv,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=self.directory,
            env={**os.environ, "PS1": "$ "},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
        )
        os.close(theirs)

        def feed() -> None:
            with contextlib.suppress(OSError):
                while data := channel.recv(1 << 15):
                    os.write(ours, data)

        threading.Thread(target=feed, daemon=True).start()
        with contextlib.suppress(OSError):
            while data := os.read(ours, 1 << 15):
                channel.sendall(data)
        self._finish(channel, process.wait())

    def _finish(self, channel: paramiko.Channel, status: int) -> None:
        self._sessions.discard(channel.chanid)
        with contextlib.suppress(OSError, EOFError):
            if status >= 0:
                channel.send_exit_status(status)
            channel.close()


class ListeningServer:
    """The same behind a port of this host, for programs that log in by a key: any key.

    Args:
        directory: Where commands run.
        most_sessions: How many sessions a connection may have.

    Attributes:
        port: The port.
        host_key: Its host key, as `type base64`.
        sizes: The sizes that terminals were given.
        transports: Its side of all connections.
        ended: The exit statuses of all that has run.
        silent: While this is set, no session is opened, nor refused: nobody is there.
        on_login: Called for each login.
        answers_requests: Whether requests on a session are answered.
        prelude: Run before each command, as a shell's start-up file.
    """

    def __init__(self, directory: Path, most_sessions: int = 10) -> None:
        self.directory = directory
        self.host_key = f"{_HOST_KEY.get_name()} {_HOST_KEY.get_base64()}"
        self.sizes: list[tuple[int, int]] = []
        self.transports: list[paramiko.Transport] = []
        self.ended: list[int] = []
        self.silent = threading.Event()
        self.on_login: Callable[[], object] = lambda: None
        self.answers_requests = True
        self.prelude = ""
        self._most_sessions = most_sessions
        self._over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> ListeningServer:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        self.hang_up()

    def hang_up(self) -> None:
        """Close all connections."""
        for transport in self.transports:
            transport.close()

    @property
    def connections(self) -> int:
        """How many connections have been made."""
        return len(self.transports)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                transport = paramiko.Transport(connection)
                transport.add_server_key(_HOST_KEY)
                self.transports.append(transport)
                server = _KeyServer(self, self.directory, self._most_sessions, self.sizes)
                transport.start_server(event=threading.Event(), server=server)

    def is_over(self, seconds: float) -> bool:
        """Wait for its end; return whether that has come."""
        return self._over.wait(seconds)

    def wait_while_silent(self) -> None:
        while self.silent.is_set() and not self.is_over(0.01):
            pass


class _KeyServer(_Server):
    def __init__(
        self, owner: ListeningServer, directory: Path, most: int, sizes: list[tuple[int, int]]
    ) -> None:
        super().__init__(directory, most, sizes)
        self._owner = owner

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        self._owner.on_login()
        return AUTH_SUCCESSFUL

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        while not (self._owner.answers_requests or self._owner.is_over(0.01)):
            pass
        return super().check_channel_exec_request(
            channel, os.fsencode(self._owner.prelude) + command
        )

    def _finish(self, channel: paramiko.Channel, status: int) -> None:
        self._owner.ended.append(status)
        super()._finish(channel, status)

    def check_channel_request(self, kind: str, chanid: int) -> int:
        # In the thread of the connection, on which nothing is answered meanwhile.
        self._owner.wait_while_silent()
        return super().check_channel_request(kind, chanid)


class LocalPort:
    """A port whose other end is a process of this host.

    Args:
        directory: Where it runs.
        is_ready: Whether SSH is not needed for it.
        prefix: What comes on the port first.

    Attributes:
        copies: The arguments of those that were begun.
    """

    def __init__(self, directory: Path, *, is_ready: bool = False, prefix: bytes = b"") -> None:
        self.directory = directory
        self.is_ready = is_ready
        self.prefix = prefix
        self.copies: list[tuple[str, str]] = []

    def is_better(self, size: int) -> bool:
        return True

    @contextlib.contextmanager
    def copying(
        self, role: str, path: str, name: str = "", *, size: int = 0
    ) -> Iterator[PortStream | None]:
        ours, theirs = socket.socketpair()
        with ours, theirs:

            def check() -> None:
                if process.poll() is not None:
                    raise PortError("it has ended")

            stream = PortStream(ours, check)
            argv = [role, path, name, stream.token, str(theirs.fileno())]
            theirs.sendall(self.prefix)
            process = subprocess.Popen(
                [sys.executable, "-IS", "-c", program(), *map(os.fsencode, argv)],
                cwd=self.directory,
                pass_fds=[theirs.fileno()],
            )
            try:
                theirs.close()
                stream.begin()
                self.copies.append((role, path))
                yield stream
                stream.end()
                assert process.wait(30) == 0
            finally:
                ours.close()
                process.wait(30)


class LocalInstance(BaseInstance):
    """A machine that is this host: commands run below a directory.

    Args:
        directory: The directory.
        most_sessions: How many sessions a connection may have.
        port: What files go by.

    Attributes:
        transports: The server's side of all connections.
        clients: The other side of them.
        sizes: The sizes that terminals were given.
        fixed_up: What was open when it was fixed up, each time.
    """

    def __init__(
        self, directory: Path, most_sessions: int = 10, port: FilePort | None = None
    ) -> None:
        super().__init__(KeyPair(None), "me")
        self.port_of_files = port
        self.directory = directory
        self.sizes: list[tuple[int, int]] = []
        self.transports: list[paramiko.Transport] = []
        self.clients: list[paramiko.SSHClient] = []
        self.fixed_up: list[int] = []
        self._most_sessions = most_sessions

    @property
    def id(self) -> str:
        return "local"

    @property
    def name(self) -> str:
        return "web"

    @property
    def ip(self) -> str:
        return "127.0.0.1"

    def _ssh_connect(self) -> paramiko.SSHClient:
        ours, theirs = socket.socketpair()
        transport = paramiko.Transport(theirs)
        transport.add_server_key(_HOST_KEY)
        transport.set_subsystem_handler("sftp", FileServer, ServedFiles, self.directory)
        server = _Server(self.directory, self._most_sessions, self.sizes)
        transport.start_server(event=threading.Event(), server=server)
        self.transports.append(transport)
        client = paramiko.SSHClient()
        client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
        client.connect(
            "web", username="me", password="x", sock=ours, look_for_keys=False, allow_agent=False
        )
        self.clients.append(client)
        return client

    def _file_port(self) -> FilePort | None:
        return self.port_of_files

    def fix_up_before_use(self) -> None:
        """Note that it was asked for."""
        self.fixed_up.append(len(self.transports))

    def check_answers(self) -> None:
        """Raise when nobody will answer any more; a test says when."""

    def close(self) -> None:
        self._forget_client()
        for transport in self.transports:
            transport.close()

    @contextlib.contextmanager
    def explaining(self, waiting_for: str, limit: str = "", *, ask: bool = False) -> Iterator[None]:
        yield

    def delete(self, wait: bool = True) -> list[Exception]:
        return []

    def _do_restart(self, **kwargs: Any) -> None: ...

    def shutdown(self, wait: bool = True, **kwargs: Any) -> None: ...

    def start(self, wait: bool = True) -> None: ...

    def wait_for_delete(self, **kwargs: Any) -> None: ...

    def wait_for_stop(self, **kwargs: Any) -> None: ...

    def _wait_for_instance_start(self, **kwargs: Any) -> None: ...
