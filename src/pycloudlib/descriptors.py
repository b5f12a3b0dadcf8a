"""Descriptors of our own: never 0, 1 or 2, also in a program that has closed those.

A program may run with its standard input and outputs closed, as daemons do. The kernel gives the
lowest free number to what is opened next: a socket of ours would be 1, and take what is printed;
handed to a child, it would be replaced by the child's own output. A library cannot open these for
its program, who may be about to; so what is opened here is moved out of the way.

A child that another thread forks has a copy of each socket: a port would stay taken, and a stream
without an end, for as long as the child lives. So forked children close those that are made here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import weakref
from collections.abc import Iterator

_FIRST = 3

# Of this process, not of the children that it forks. No WeakSet: a Ctrl-C that comes when one drops
# a socket would be lost.
_sockets: set[weakref.ref[socket.socket]] = set()


def moved(descriptor: int) -> int:
    """Move a new descriptor out of the way of standard input and outputs, if it is there."""
    if descriptor >= _FIRST:
        return descriptor
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FIRST)
    finally:
        os.close(descriptor)


def opener(path: str, flags: int) -> int:
    """Let `open()` open a file out of the way of standard input and outputs."""
    return moved(os.open(path, flags | os.O_CLOEXEC, 0o666))


def moved_socket(new: socket.socket) -> socket.socket:
    """Move a new socket out of the way of standard input and outputs, if it is there."""
    if new.fileno() >= _FIRST:
        return new
    timeout = new.gettimeout()
    sock = socket.socket(fileno=moved(new.detach()))
    sock.settimeout(timeout)
    return sock


def make_socket(family: socket.AddressFamily) -> socket.socket:
    """Make a stream socket, which forked children have no part in."""
    return _not_for_children(moved_socket(socket.socket(family, socket.SOCK_STREAM)))


def make_socket_pair() -> tuple[socket.socket, socket.socket]:
    """Make two sockets that are connected to each other; forked children have no part in them."""
    ours, theirs = (_not_for_children(moved_socket(end)) for end in socket.socketpair())
    return ours, theirs


def _not_for_children(sock: socket.socket) -> socket.socket:
    for gone in [known for known in list(_sockets) if known() is None]:
        _sockets.discard(gone)
    _sockets.add(weakref.ref(sock))
    return sock


def _close_parents_sockets() -> None:
    for known in list(_sockets):
        sock = known()
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.close()


os.register_at_fork(after_in_child=_close_parents_sockets)


def make_pipe() -> tuple[int, int]:
    """Make a pipe; give the end to read from and the end to write to."""
    reader, writer = os.pipe()
    return moved(reader), moved(writer)


@contextlib.contextmanager
def keeping_standard_free() -> Iterator[None]:
    """Keep what a library opens in the block out of the way of standard input and outputs."""
    with contextlib.ExitStack() as placeholders:
        while (descriptor := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) < _FIRST:
            placeholders.callback(os.close, descriptor)
        os.close(descriptor)
        yield
