"""The sessions on the SSH connections to one machine: as many connections as the sessions need.

An SSH server limits the sessions of a connection (sshd's `MaxSessions`, 10 by default), and keeps
the place of a closed one until its command has ended. So each connection gets a share of the
sessions, less where the server refuses one, and no further one once a place on it is lost.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pycloudlib._base.deadline import Deadline, capped
from pycloudlib._base.later import ImportedLater
from pycloudlib.errors import PycloudlibException, PycloudlibTimeoutError
from pycloudlib.guest.access.ssh import ANSWER_LIMIT, not_ssh

if TYPE_CHECKING:
    import paramiko

    from pycloudlib.guest.access.commands import LeftShell
else:
    paramiko = ImportedLater("paramiko")

# Sessions on one connection: below sshd's default, as some may not have ended yet.
_SHARE = 8
# Seconds between tries to open the only session on a connection: a new one takes longer.
_PAUSES = (0.01, 0.04, 0.1, 0.2)
# Seconds that a server may take to end a session whose input has ended.
_END_LIMIT = 3.0
SHELL_LIMIT = 1.5
"""Seconds for which a shell that was left is used: it waits a little longer."""
# Seconds that it may take for each answer about a file.
_FILE_ANSWER_LIMIT = 60.0
# RFC 4254, 5.1: what sshd answers when a connection has all the sessions that it may have.
_CONNECT_FAILED = 2


def open_session(client: paramiko.SSHClient, deadline: Deadline | None = None) -> paramiko.Channel:
    """Open a channel for a command or a shell.

    Raises:
        paramiko.ChannelException: The server takes no further one on this connection.
        paramiko.SSHException: The connection is gone.
        PycloudlibTimeoutError: It was not open in time.
    """
    transport = client.get_transport()
    if transport is None:
        raise paramiko.SSHException("the connection is closed")
    with ssh_errors(deadline):
        try:
            return transport.open_session(timeout=max(capped(ANSWER_LIMIT, deadline), 0.1))
        except paramiko.ChannelException:
            raise
        except paramiko.SSHException as error:
            # Where several are refused at once, paramiko has the reason for one of them.
            if not transport.is_active() or "Unable to open" not in str(error):
                raise
            raise paramiko.ChannelException(_CONNECT_FAILED, str(error)) from error


@contextlib.contextmanager
def ssh_errors(deadline: Deadline | None) -> Iterator[None]:
    """Turn failures before a command has begun into errors of SSH, or into time-outs."""
    try:
        yield
    except PycloudlibException:
        raise  # of another connection that had to be made: it says what is wrong with the machine
    except paramiko.ChannelException:
        raise  # the server's own answer
    except Exception as error:
        if deadline is not None and deadline.expired:
            raise PycloudlibTimeoutError(
                f"The command did not begin within {deadline.limit:g} s"
            ) from error
        if isinstance(error, paramiko.SSHException):
            raise
        # The transport's thread reads what comes, and raises what parsing that does.
        why = error if isinstance(error, (OSError, EOFError)) else not_ssh(error)
        raise paramiko.SSHException(f"the connection is gone: {why}") from error


@contextlib.contextmanager
def close_if_unanswered(channel: paramiko.Channel, deadline: Deadline | None) -> Iterator[None]:
    """Close a channel whose requests are not answered in time: they have no limit themselves."""

    def hang_up() -> None:
        with contextlib.suppress(OSError, EOFError):  # the connection is lost already
            channel.close()

    watchdog = threading.Timer(capped(ANSWER_LIMIT, deadline), hang_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()


@dataclass
class Session:
    """A session on a connection.

    Attributes:
        channel: Its channel.
        ended: Whether the server has ended it, so that its place is free; None if the channel
            tells.
    """

    channel: paramiko.Channel
    ended: bool | None = None

    def wait_for_end(self, seconds: float) -> None:
        """Wait until the server has ended it, and note whether it did."""
        self.ended = self.channel.status_event.wait(seconds)


@dataclass(eq=False)
class _Connection:
    """A connection and the use that is made of it."""

    client: paramiko.SSHClient
    in_use: int = 1
    retired: bool = False
    proven: bool = False

    @property
    def alive(self) -> bool:
        transport = self.client.get_transport()
        return transport is not None and transport.is_active()


class Connections:
    """The connections to one machine. Safe to use from several threads, and after a fork.

    Args:
        connect: Opens a new connection, by the deadline if there is one.
    """

    def __init__(self, connect: Callable[[Deadline | None], paramiko.SSHClient]) -> None:
        self._connect = connect
        self._share = _SHARE
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._connections: list[_Connection] = []
        self._connecting = False
        self._shell: tuple[float, LeftShell] | None = None

    @property
    def any_open(self) -> bool:
        """Whether there is a connection, which may be lost."""
        return bool(self._connections)

    def close(self) -> None:
        """Close all of them; the next use makes a new one."""
        with self._changed:
            connections, self._connections = self._connections, []
            self._shell = None
            for connection in connections:
                connection.retired = True
            self._changed.notify_all()
        for connection in connections:
            connection.client.close()

    @contextlib.contextmanager
    def session(self, deadline: Deadline | None = None) -> Iterator[Session]:
        """Open a session for the block, on a connection with a free place or on a new one.

        Args:
            deadline: Until when it has to be open; no limit when None.

        Raises:
            paramiko.SSHException: The machine cannot be reached, or lets no session in.
            PycloudlibTimeoutError: No session could be opened in time.
        """
        connection, session = self._open(deadline)
        ended = False
        try:
            yield session
            ended = session.channel.status_event.is_set()
        finally:
            session.channel.close()
            self._give_back(connection, ended if session.ended is None else session.ended)

    @contextlib.contextmanager
    def files(self) -> Iterator[paramiko.SFTPClient]:
        """Open a session for the block in which files are read and written (SFTP).

        Raises:
            paramiko.SSHException: The machine cannot be reached, or offers no SFTP.
        """
        with self.session() as session:
            channel = session.channel
            channel.settimeout(_FILE_ANSWER_LIMIT)
            try:
                with close_if_unanswered(channel, None):
                    channel.invoke_subsystem("sftp")
                client = paramiko.SFTPClient(channel)
            except (paramiko.SSHException, OSError, EOFError) as error:
                raise paramiko.SSHException(
                    f"the SSH server offers no SFTP: {error or 'it hung up'}"
                ) from error
            try:
                yield client
            finally:
                # The next session may come before its place is free otherwise.
                with contextlib.suppress(OSError, EOFError):
                    channel.shutdown_write()
                session.wait_for_end(_END_LIMIT)

    def leave_shell(self, shell: LeftShell) -> None:
        """Keep a shell that waits for the next command."""
        with self._changed:
            self._shell, before = (time.monotonic(), shell), self._shell
        if before is not None:
            before[1].end()

    def take_shell(self) -> LeftShell | None:
        """Return the shell that was left, whose session the caller closes; None without one."""
        with self._changed:
            left, self._shell = self._shell, None
        if left is None:
            return None
        since, shell = left
        if time.monotonic() - since < SHELL_LIMIT and not shell.session.channel.closed:
            return shell
        shell.end()
        return None

    def _open(self, deadline: Deadline | None) -> tuple[_Connection, Session]:
        while True:
            connection = self._take(deadline)
            try:
                channel = self._open_on(connection, deadline)
            except paramiko.ChannelException as error:
                if self._refused(connection):
                    continue
                raise paramiko.SSHException(
                    f"the SSH server opens no session: {error.text}"
                ) from error
            except paramiko.SSHException as error:
                lost = not connection.alive or isinstance(error.__cause__, (OSError, EOFError))
                self._give_back(connection, ended=False)
                if lost and connection.proven:
                    continue  # nothing has begun on it, and another one may be opened
                raise
            except BaseException:
                self._give_back(connection, ended=False)
                raise
            connection.proven = True
            return connection, Session(channel)

    def _open_on(self, connection: _Connection, deadline: Deadline | None) -> paramiko.Channel:
        for pause in _PAUSES:
            try:
                return open_session(connection.client, deadline)
            except paramiko.ChannelException:
                # The place of the session before is free a moment after that has ended.
                if connection.in_use > 1 or not connection.proven:
                    raise
            time.sleep(capped(pause, deadline))
        return open_session(connection.client, deadline)

    def _take(self, deadline: Deadline | None) -> _Connection:
        """Take a place on a connection; one thread at a time opens a new one."""
        with self._changed:
            while (connection := self._find_free()) is None and self._connecting:
                if deadline is not None and deadline.expired:
                    raise PycloudlibTimeoutError(
                        f"No SSH session could be opened within {deadline.limit:g} s: the "
                        "connections are in use, and another one is being opened"
                    )
                self._changed.wait(None if deadline is None else deadline.remaining)
            if connection is not None:
                connection.in_use += 1
                return connection
            self._connecting = True
        opened = None
        try:
            opened = _Connection(self._connect(deadline))
        except paramiko.SSHException as error:
            if deadline is None or not deadline.expired or not _is_late(error):
                raise
            raise PycloudlibTimeoutError(
                f"No SSH connection could be opened within {deadline.limit:g} s: {error}"
            ) from error
        finally:
            with self._changed:
                self._connecting = False
                if opened is not None:
                    self._connections.append(opened)
                self._changed.notify_all()
        return opened

    def _find_free(self) -> _Connection | None:
        for connection in [known for known in self._connections if not known.alive]:
            self._connections.remove(connection)
            connection.client.close()
        for connection in self._connections:
            if not connection.retired and connection.in_use < self._share:
                return connection
        return None

    def _refused(self, connection: _Connection) -> bool:
        """Note that a connection takes no further session; return whether another one may."""
        with self._changed:
            others = connection.in_use - 1
            if others:
                self._share = min(self._share, others)
        # With nothing else on it, its places are lost.
        self._give_back(connection, ended=bool(others))
        return connection.proven or bool(others)

    def _give_back(self, connection: _Connection, ended: bool) -> None:
        with self._changed:
            connection.in_use -= 1
            connection.retired = connection.retired or not ended
            over = connection.retired and not connection.in_use
            if over and connection in self._connections:
                self._connections.remove(connection)
            self._changed.notify_all()
        if over:
            connection.client.close()


def _is_late(error: Exception) -> bool:
    """Whether a connection failed because its time was over, not by an answer."""
    return isinstance(error.__cause__, TimeoutError)


_all: weakref.WeakSet[Connections] = weakref.WeakSet()


def _forget_parents_connections() -> None:
    # A forked child must not use its parent's connections, nor its locks.
    for connections in list(_all):
        connections._begin()


os.register_at_fork(after_in_child=_forget_parents_connections)
