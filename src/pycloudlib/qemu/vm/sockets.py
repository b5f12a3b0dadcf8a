"""A machine's sockets: QEMU serves one client of each at a time; others queue."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.documents import escape_line, read_kernel_file
from pycloudlib._base.files import make_socket
from pycloudlib.qemu.host.processes import find_inode, inode_of
from pycloudlib.qemu.state.rundir import short_path

# The queue is full: the kernel keeps no more connections than QEMU's listen(2) says.
_FULL = (errno.EAGAIN, errno.EINTR, errno.ENOTCONN)
_SHORTEST_WAIT = 0.001

# linux/sock_diag.h, linux/unix_diag.h and netlink(7).
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_DUMP = 0x301
_ALL_STATES = 0xFFFFFFFF
_SHOW_FILE_AND_PEER = 0x2 | 0x4
_FILE, _PEER = 1, 2

# As in QEMU's "telnet:127.0.0.1:18001,server=on <-> 127.0.0.1:40000".
_TCP_CLIENT = re.compile(r"<-> ([0-9.]+):([0-9]+)$")


def connect(path: Path, deadline: Deadline) -> socket.socket:
    """Connect, in turn with other clients; the server may serve others first, and answer late.

    Raises:
        TimeoutError: Others were still waiting at the deadline; names them, if known.
        OSError: Nobody listens there.
    """
    while True:
        sock = make_socket(socket.AF_UNIX)
        try:
            # A blocking connect(2) waits this long for a place in the queue. Without blocking it
            # fails with EAGAIN at once, which asyncio takes for a connection under way.
            _set_limit(sock, max(deadline.remaining, _SHORTEST_WAIT))
            with short_path(path) as address:
                sock.connect(address)
            sock.getpeername()
            _set_limit(sock, 0)
        except OSError as error:
            sock.close()
            if error.errno not in _FULL:
                raise
            if deadline.expired:
                raise TimeoutError(
                    f"no connection to {path.name} within {deadline.limit:g} s"
                    f"{describe_clients(path)}"
                ) from None
        except BaseException:
            sock.close()
            raise
        else:
            return sock


def is_free(chardev: Mapping[str, Any]) -> bool:
    """Whether no client is connected to a socket, by what `query-chardev` returns for it."""
    return str(chardev["filename"]).startswith("disconnected:")


def describe_clients(path: Path) -> str:
    """Describe, as the end of a sentence, which processes are connected to a unix socket.

    This includes those that wait for it. Empty when the kernel does not say.
    """
    try:
        return _describe_users(set(_peers(path.stat().st_ino)))
    except OSError:  # not every kernel can say
        return ""


def describe_tcp_client(chardev: Mapping[str, Any], server: tuple[str, int]) -> str:
    """Describe the client of a TCP socket likewise.

    Args:
        chardev: What `query-chardev` returns for it.
        server: Its address and port.
    """
    address = _TCP_CLIENT.search(str(chardev["filename"]))
    if address is None:
        return ""
    try:
        inode = find_inode((address[1], int(address[2])), server)
        return _describe_users(set() if inode is None else {inode})
    except OSError:
        return ""


def _set_limit(sock: socket.socket, seconds: float) -> None:
    whole = int(seconds)
    limit = struct.pack("@ll", whole, int((seconds - whole) * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _describe_users(inodes: set[int]) -> str:
    users = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(inode_of(file) in inodes for file in (process / "fd").iterdir()):
                name = escape_line(read_kernel_file(process / "comm").rstrip("\n"))
                ours = " (this program)" if process.name == str(os.getpid()) else ""
                users.append(f"process {process.name} {name}{ours}")
    return f"; in use by {', '.join(users)}" if users else ""


def _peers(file: int) -> Iterator[int]:
    """Find the sockets that are connected to a server whose socket is a file with this inode."""
    body = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, _ALL_STATES, 0, _SHOW_FILE_AND_PEER, 0, 0)
    header = struct.pack("=IHHII", 16 + len(body), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(1)
        netlink.send(header + body)
        while True:
            answer = netlink.recv(1 << 16)
            while answer:
                length, kind = struct.unpack_from("=IH", answer)
                if kind != _SOCK_DIAG_BY_FAMILY:
                    return  # the end, or an error
                facts = _attributes(answer[32:length])
                if facts.get(_FILE, b"")[:4] == struct.pack("=I", file) and _PEER in facts:
                    yield struct.unpack("=I", facts[_PEER])[0]
                answer = answer[length + 3 & ~3 :]


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        found[kind] = data[4:length]
        data = data[max(length, 4) + 3 & ~3 :]
    return found
