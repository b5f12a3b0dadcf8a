"""Local ports of instances: leased for an instance's whole life, never shared by two.

A lease is a file named after the port that holds the instance's directory; it ends when that
directory is gone. So the ports of a powered-off machine stay its own, and a crash leaves nothing
to clean up. Programs that know nothing of leases are told by trying to listen.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pycloudlib.descriptors import make_socket
from pycloudlib.errors import CloudError
from pycloudlib.files import (
    create_private_directory,
    replace_atomically,
    tells_of_no_file,
    write_private,
)
from pycloudlib.locks import exclusive_lock

LOOPBACK = "127.0.0.1"
FIRST_PORT = 18000
LAST_PORT = 18100


@dataclass(frozen=True, slots=True)
class PortLease:
    """Two ports of one instance.

    Attributes:
        ssh: Leads to the guest's SSH server.
        telnet: Leads to the serial console.
    """

    ssh: int
    telnet: int


@dataclass(frozen=True, slots=True)
class PortRegistry:
    """The leases of one user of this host.

    Attributes:
        directory: Where the lease files are.
    """

    directory: Path

    def acquire(self, owner: Path) -> PortLease:
        """Lease two ports to an instance.

        Args:
            owner: The instance's directory; the lease holds as long as it exists.

        Raises:
            CloudError: No two ports of the range are free.
        """
        with self._lock():
            free: list[int] = []
            for port in range(FIRST_PORT, LAST_PORT + 1):
                if not self.leased(port) and can_listen(port):
                    free.append(port)
                    if len(free) == 2:
                        break
            else:
                leased = sum(self.leased(port) for port in range(FIRST_PORT, LAST_PORT + 1))
                raise CloudError(
                    f"No two free ports in {FIRST_PORT}-{LAST_PORT} on {LOOPBACK}: {leased} belong "
                    "to other instances, the rest to other programs. Delete instances that are "
                    "not needed any more"
                )
            for port in free:
                with replace_atomically(self._file(port)) as temporary:
                    write_private(temporary, f"{owner}\n")
            return PortLease(*free)

    def release(self, lease: PortLease, owner: Path) -> None:
        """Give an instance's ports back; what is another's by now stays."""
        with self._lock():
            for port in (lease.ssh, lease.telnet):
                if self._owner(port) == owner:
                    self._file(port).unlink(missing_ok=True)

    def forget_ended(self) -> None:
        """Remove the files of leases that have ended; they are in nobody's way."""
        with self._lock():
            for port in range(FIRST_PORT, LAST_PORT + 1):
                if not self.leased(port):
                    self._file(port).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        create_private_directory(self.directory)
        with exclusive_lock(self.directory / "lock"):
            yield

    def _file(self, port: int) -> Path:
        return self.directory / str(port)

    def _owner(self, port: int) -> Path | None:
        """Read whose a port is; None when it is nobody's, or the lease is damaged."""
        try:
            owner = self._file(port).read_bytes().removesuffix(b"\n")
        except (FileNotFoundError, IsADirectoryError):
            return None
        return Path(os.fsdecode(owner)) if owner and b"\0" not in owner else None

    def leased(self, port: int) -> bool:
        """Say whether a port is some instance's."""
        if self._file(port).is_dir():
            return True  # whatever it is, it is not ours to replace
        owner = self._owner(port)
        if owner is None or not owner.is_absolute():
            return False
        try:
            return owner.is_dir()
        except OSError as error:
            # It may be one that cannot be looked at, as root's: rather another port then.
            return not tells_of_no_file(error)


def can_listen(port: int) -> bool:
    """Whether nobody listens on a local port."""
    try:
        _bind(port).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


def listen(port: int) -> socket.socket:
    """Listen on a local port.

    Args:
        port: The port; 0 for any that is free.

    Raises:
        OSError: Another program has it.
    """
    listener = _bind(port)
    try:
        listener.listen(1)
    except BaseException:
        listener.close()
        raise
    return listener


def _bind(port: int) -> socket.socket:
    """Bind a socket to a local port.

    That alone shows whether another program listens there, and hinders nobody who is about to
    listen: with SO_REUSEADDR on both sides, only a socket that listens is in the way of others.
    """
    bound = make_socket(socket.AF_INET)
    try:
        # As QEMU does: connections of an earlier machine that linger are no obstacle.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((LOOPBACK, port))
    except BaseException:
        bound.close()
        raise
    return bound
