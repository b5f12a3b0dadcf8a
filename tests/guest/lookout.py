"""Looks at everything of ours while tests run: who listens where, and who may read what."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import threading
from pathlib import Path

_LISTENING = "0A"  # include/net/tcp_states.h
_LOOK = 15.0


class Lookout:
    """Collects what should not be, every few seconds; a context manager.

    Args:
        working_dir: Where the directories of clouds are.
    """

    def __init__(self, working_dir: Path) -> None:
        self.found: set[str] = set()
        self.listeners = 0
        self.files = 0
        self._working_dir = working_dir
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="lookout", daemon=True)

    def __enter__(self) -> Lookout:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look_on(self) -> None:
        while not self._stop.wait(_LOOK):
            self.look()

    def look(self) -> None:
        """Look once."""
        sockets = _sockets_of(self._working_dir)
        for address, port, inode in _listeners():
            if inode in sockets:
                self.listeners += 1
                if not address.startswith("127."):
                    self.found.add(f"{sockets[inode]} listens on {address}:{port}")
        # Unlike Path.rglob, this goes on when a directory is gone.
        for directory, directories, files in os.walk(self._working_dir):
            for path in (Path(directory, name) for name in (*directories, *files)):
                with contextlib.suppress(OSError):  # it is gone
                    self._look_at(path)

    def _look_at(self, path: Path) -> None:
        facts = path.lstat()
        if stat.S_ISLNK(facts.st_mode) or facts.st_uid != os.geteuid():
            return
        self.files += 1
        if facts.st_mode & 0o077:
            self.found.add(f"{path} can be read by others: {stat.filemode(facts.st_mode)}")


def _sockets_of(directory: Path) -> dict[str, str]:
    """Map the sockets of processes that have a directory on their command line to those."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes()
            if f"{directory}/".encode() not in command:
                continue
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    target = str(descriptor.readlink())
                    if target.startswith("socket:["):
                        found[target[8:-1]] = command.replace(b"\0", b" ")[:80].decode()
    return found


def _listeners() -> list[tuple[str, int, str]]:
    """List all sockets that listen: address, port, inode (proc_net_tcp(5))."""
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENING:
                host, port = fields[1].split(":")
                words = bytes.fromhex(host)
                # Each word of four bytes is written in the host's order.
                packed = b"".join(
                    struct.pack("!I", *struct.unpack("=I", words[at : at + 4]))
                    for at in range(0, len(words), 4)
                )
                found.append((socket.inet_ntop(family, packed), int(port, 16), fields[9]))
    return found
