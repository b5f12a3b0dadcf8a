"""In which process a TCP connection of this host ends, by the kernel's own word."""

from __future__ import annotations

import logging
import re
import socket
import sys
from pathlib import Path

from pycloudlib.qemu.identity import ProcessIdentity, find_proc_directory
from pycloudlib.rawtext import read_kernel_file

_log = logging.getLogger(__name__)

# proc_net_tcp(5): the thread's own network namespace is the one its sockets are in.
_CONNECTIONS = "/proc/thread-self/net/tcp"
_SOCKET = re.compile(r"socket:\[([0-9]+)\]")


def ends_in(connection: socket.socket, process: ProcessIdentity) -> bool:
    """Whether the other end of a connection over loopback is a socket of a process.

    Nobody but that process, who runs it, and root can answer there, whatever listens on the port
    later or elsewhere.

    Args:
        connection: A connected TCP socket (IPv4).
        process: The process; it has to run as this user, or be root's to look at.
    """
    try:
        inode = find_inode(connection.getpeername(), connection.getsockname())
        pid = process.find_pid()
        if inode is None or pid is None:
            return False
        open_files = find_proc_directory(pid) / "fd"
        found = any(inode_of(file) == inode for file in open_files.iterdir())
    except OSError as error:
        _log.debug("Process %d cannot be asked for its connections: %s", process.pid, error)
        return False
    # A pid may be used again, so that what was read is another's unless it is there still.
    return found and process.find_pid() == pid


def find_inode(local: tuple[str, int], remote: tuple[str, int]) -> int | None:
    """Find the socket that has these addresses in the kernel's table of connections."""
    wanted = f"{_hex(local)} {_hex(remote)}".split()
    for line in read_kernel_file(_CONNECTIONS).splitlines()[1:]:
        fields = line.split()
        if fields[1:3] == wanted:
            return int(fields[9]) or None  # 0: nobody has accepted it yet
    return None


def _hex(address: tuple[str, int]) -> str:
    """Write an address as the table does: the four bytes as one number of this machine's order."""
    number = int.from_bytes(socket.inet_aton(address[0]), sys.byteorder)
    return f"{number:08X}:{address[1]:04X}"


def inode_of(file: Path) -> int | None:
    """Read which socket an open file of a process (`/proc/PID/fd/N`) is; None if it is none."""
    try:
        match = _SOCKET.fullmatch(str(file.readlink()))
    except FileNotFoundError:  # closed meanwhile
        return None
    return int(match[1]) if match else None
