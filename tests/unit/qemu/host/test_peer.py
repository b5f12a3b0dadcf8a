"""Whether the kernel tells in which process a connection ends: with real processes."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

from pycloudlib.qemu.host.processes import ProcessIdentity, ends_in

OURSELVES = ProcessIdentity.find(os.getpid())
# Accepts one connection, says so on it, and holds it until its input ends.
SERVER = """
import socket, sys
listener = socket.socket(fileno=int(sys.argv[1]))
connection, _ = listener.accept()
connection.sendall(b"hello")
sys.stdin.read()
"""


@contextlib.contextmanager
def serving() -> Iterator[tuple[socket.socket, ProcessIdentity]]:
    """Give a connection to a process, and that process."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        subprocess.Popen(
            [sys.executable, "-IS", "-c", SERVER, str(listener.fileno())],
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,
        ) as server,
    ):
        with socket.create_connection(listener.getsockname()) as connection:
            assert connection.recv(5) == b"hello"
            identity = ProcessIdentity.find(server.pid)
            assert identity is not None
            yield connection, identity
        server.communicate()


def test_connection_ends_in_the_process_that_accepted_it() -> None:
    with serving() as (connection, server):
        assert ends_in(connection, server)


def test_connection_does_not_end_in_another_process() -> None:
    with serving() as (connection, _), serving() as (_, other):
        assert not ends_in(connection, other)
        assert OURSELVES is not None
        assert not ends_in(connection, OURSELVES)


def test_process_that_began_at_another_time_is_another() -> None:
    with serving() as (connection, server):
        assert not ends_in(connection, ProcessIdentity(server.pid, server.start_time + 1))


def test_process_that_has_ended_has_no_connection() -> None:
    with serving() as (connection, server):
        pass
    assert not ends_in(connection, server)


def test_connection_that_nobody_has_accepted_is_not_proven() -> None:
    """Not even of the process that listens: another could accept it."""
    assert OURSELVES is not None
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as connection,
    ):
        assert not ends_in(connection, OURSELVES)
        accepted, _ = listener.accept()
        with accepted:
            assert ends_in(connection, OURSELVES)


def test_socket_that_is_not_connected_is_not_proven() -> None:
    assert OURSELVES is not None
    with socket.socket() as unconnected:
        assert not ends_in(unconnected, OURSELVES)
