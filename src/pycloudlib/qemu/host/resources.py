"""What machines use of this host: ports, leased for their whole life; processors and memory."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pycloudlib._base.documents import read_kernel_file
from pycloudlib._base.files import (
    create_private_directory,
    is_not_found,
    make_socket,
    replace_atomically,
    write_private,
)
from pycloudlib._base.locks import exclusive_lock
from pycloudlib.errors import CloudError

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
            return not is_not_found(error)


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


_ROOT = Path("/")
_MEMORY, _CPU = "memory", "cpu"
_ALL_CONTROLLERS = ""
# Version 1 says by a number near the largest that there is no limit.
_NO_LIMIT = 1 << 60
_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class HostLimits:
    """What this program may use.

    Attributes:
        processors: How many it may keep busy, at least 1.
        memory: Bytes of memory in all.
        available: Bytes of memory that are not in use, or can be had at once; 0 if nothing tells.
    """

    processors: int
    memory: int
    available: int

    @classmethod
    def read(cls, root: Path | None = None) -> HostLimits:
        """Read them from the kernel's files.

        Args:
            root: Where /proc and /sys are; by default where they always are.
        """
        root = root or _ROOT
        meminfo = _read(root / "proc/meminfo")
        processors = [len(os.sched_getaffinity(0))]
        memory = [_find_kib(meminfo, "MemTotal") or _physical_memory()]
        available = [_find_kib(meminfo, "MemAvailable") or 0]
        groups = _Groups.read(root)
        for group in groups.of(_CPU):
            quota = _quota(group)
            if quota is not None:
                processors.append(int(quota))
        for group in groups.of(_MEMORY):
            limit = min(_memory_limits(group), default=None)
            if limit is not None:
                memory.append(limit)
                available.append(max(0, limit - _memory_in_use(group)))
        return cls(max(1, min(processors)), min(memory), min(available))


@dataclass(frozen=True, slots=True)
class _Mount:
    """Where control groups are seen.

    Attributes:
        controllers: Those of version 1 that it shows; of version 2, the empty name for all.
        top: The group that is seen there.
        place: The directory.
    """

    controllers: Sequence[str]
    top: str
    place: str


@dataclass(frozen=True, slots=True)
class _Groups:
    """The control groups of this program."""

    root: Path
    mounts: Sequence[_Mount]
    paths: dict[str, str]

    @classmethod
    def read(cls, root: Path) -> _Groups:
        mounts = filter(None, map(_parse_mount, _read(root / "proc/self/mountinfo").splitlines()))
        paths = {}
        for line in _read(root / "proc/self/cgroup").splitlines():
            _number, colon, rest = line.partition(":")
            controllers, second, path = rest.partition(":")
            if colon and second:
                paths.update(dict.fromkeys(controllers.split(","), path))
        return cls(root, tuple(mounts), paths)

    def of(self, controller: str) -> Iterator[Path]:
        """List the directories of the groups that limit this program, from its own upwards."""
        for name in (controller, _ALL_CONTROLLERS):
            if name in self.paths:
                path = PurePosixPath(self.paths[name])
                mounts = [mount for mount in self.mounts if name in mount.controllers]
                # Others may show groups of others: of a container, on its host.
                own = [mount for mount in mounts if path.is_relative_to(mount.top)]
                for mount in own or mounts:
                    yield from self._upwards(mount, path)

    def _upwards(self, mount: _Mount, path: PurePosixPath) -> Iterator[Path]:
        top = self.root / mount.place.lstrip("/")
        # Named as another control group namespace has it, its own top is what is seen.
        below = PurePosixPath()
        if path.is_relative_to(mount.top) and ".." not in path.parts:
            below = path.relative_to(mount.top)
        for group in (below, *below.parents):
            yield top / group


def _parse_mount(line: str) -> _Mount | None:
    """Read a line of /proc/self/mountinfo (proc(5)); None for what shows no control groups."""
    before, _dash, after = line.partition(" - ")
    fields, kind = before.split(" "), after.split(" ")
    if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
        return None
    controllers = (_ALL_CONTROLLERS,) if kind[0] == "cgroup2" else tuple(kind[2].split(","))
    return _Mount(controllers, _unescape(fields[3]), _unescape(fields[4]))


def _unescape(path: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), path)


def _memory_limits(group: Path) -> list[int]:
    limits = [
        _read_number(group / name)
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes")
    ]
    # Of version 1: with that of groups above, which may be invisible.
    limits.append(_find_in_stat(group, "hierarchical_memory_limit"))
    return [limit for limit in limits if limit is not None and limit < _NO_LIMIT]


def _memory_in_use(group: Path) -> int:
    """Tell how much memory a group uses, without files' content that the kernel drops first."""
    for used, dropped in (
        ("memory.current", "inactive_file"),
        ("memory.usage_in_bytes", "total_inactive_file"),
    ):
        in_use = _read_number(group / used)
        if in_use is not None:
            return max(0, in_use - (_find_in_stat(group, dropped) or 0))
    return 0


def _quota(group: Path) -> float | None:
    """Tell how many processors' time a group may have; None for as much as there is."""
    both = _read(group / "cpu.max").split()
    if len(both) != 2:
        both = [_read(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    try:
        quota, period = map(int, both)
    except ValueError:  # "max", or nothing
        return None
    return quota / period if quota > 0 and period > 0 else None


def _find_in_stat(group: Path, key: str) -> int | None:
    match = re.search(rf"^{key} ([0-9]+)$", _read(group / "memory.stat"), re.MULTILINE)
    return int(match[1]) if match else None


def _read_number(file: Path) -> int | None:
    """Read a file that holds a number; None where it holds `max`, or cannot be read."""
    text = _read(file).strip()
    return int(text) if re.fullmatch("[0-9]+", text) else None


def _find_kib(meminfo: str, key: str) -> int | None:
    match = re.search(rf"^{key}:\s+([0-9]+) kB", meminfo, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _physical_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _read(file: Path) -> str:
    try:
        return read_kernel_file(file)
    except OSError:
        return ""
