"""The host's resources for machines: ports, leased as long as a machine exists; memory, CPUs."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
PORTS = range(18000, 18101)
"""The ports of machines."""

ROOT = Path("/")
_MEMORY, _CPU = "memory", "cpu"
_ALL_CONTROLLERS = ""
# In version 1 a number near the largest means that there is no limit.
_NO_LIMIT = 1 << 60
_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class PortLease:
    """Two ports of one instance.

    Attributes:
        ssh: The port of the guest's SSH server.
        telnet: The port of the serial console.
    """

    ssh: int
    telnet: int


@dataclass(frozen=True, slots=True)
class PortRegistry:
    """The leases of one user of this host.

    Attributes:
        directory: The directory of the lease files.
        ports: The ports that are leased.
    """

    directory: Path
    ports: range = field(default_factory=lambda: PORTS)

    def acquire(self, owner: Path) -> PortLease:
        """Lease two ports to an instance.

        Args:
            owner: The instance's directory; the lease holds as long as it exists.

        Raises:
            CloudError: No two ports of the range are free.
        """
        with self._lock():
            free: list[int] = []
            for port in self.ports:
                if not self.leased(port) and can_listen(port):
                    free.append(port)
                    if len(free) == 2:
                        break
            else:
                leased = sum(map(self.leased, self.ports))
                raise CloudError(
                    f"No two free ports in {self.ports[0]}-{self.ports[-1]} on {LOOPBACK}: "
                    f"{leased} belong to other instances, the rest to other programs. Delete "
                    "instances that are not needed any more"
                )
            for port in free:
                with replace_atomically(self._file(port)) as temporary:
                    write_private(temporary, f"{owner}\n")
            return PortLease(*free)

    def release(self, lease: PortLease, owner: Path) -> None:
        """Release the ports of an instance, except those that another instance leases by now."""
        with self._lock():
            for port in (lease.ssh, lease.telnet):
                if self._owner(port) == owner:
                    self._file(port).unlink(missing_ok=True)

    def forget_ended(self) -> None:
        """Remove the files of leases that have ended."""
        with self._lock():
            for port in self.ports:
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
        """Read the owner of a port; None if it has none, or the lease is damaged."""
        try:
            owner = self._file(port).read_bytes().removesuffix(b"\n")
        except (FileNotFoundError, IsADirectoryError):
            return None
        return Path(os.fsdecode(owner)) if owner and b"\0" not in owner else None

    def leased(self, port: int) -> bool:
        """Whether an instance leases a port."""
        if self._file(port).is_dir():
            return True  # not a lease, so not replaced
        owner = self._owner(port)
        if owner is None or not owner.is_absolute():
            return False
        try:
            return owner.is_dir()
        except OSError as error:
            # Another user's directory may be hidden: rather use another port.
            return not is_not_found(error)


def can_listen(port: int) -> bool:
    """Whether no program listens on a local port."""
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
        port: The port; 0 for any free one.

    Raises:
        OSError: Another program listens on it.
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

    That alone shows whether another program listens there, and does not disturb one that is about
    to listen: with SO_REUSEADDR on both sides, only a listening socket conflicts with others.
    """
    bound = make_socket(socket.AF_INET)
    try:
        # As QEMU does: lingering connections of an earlier machine do not conflict.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((LOOPBACK, port))
    except BaseException:
        bound.close()
        raise
    return bound


@dataclass(frozen=True, slots=True)
class HostLimits:
    """The processors and memory that this program may use.

    Attributes:
        processors: How many it may keep busy, at least 1.
        memory: Bytes of memory in all.
        available: Bytes of memory that are free, or can be freed at once; 0 if unknown.
    """

    processors: int
    memory: int
    available: int

    @classmethod
    def read(cls, root: Path = ROOT) -> HostLimits:
        """Read them from the kernel's files.

        Args:
            root: The directory that has /proc and /sys.
        """
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
    """A mount of control groups.

    Attributes:
        controllers: The controllers that it shows, in version 1; the empty name for all, in
            version 2.
        top: The group at its top.
        directory: Where it is mounted.
    """

    controllers: Sequence[str]
    top: str
    directory: str


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
                # Others may show other groups, such as a container's on its host.
                own = [mount for mount in mounts if path.is_relative_to(mount.top)]
                for mount in own or mounts:
                    yield from self._upwards(mount, path)

    def _upwards(self, mount: _Mount, path: PurePosixPath) -> Iterator[Path]:
        top = self.root / mount.directory.lstrip("/")
        # A path of another control group namespace: its own top is mounted here.
        below = PurePosixPath()
        if path.is_relative_to(mount.top) and ".." not in path.parts:
            below = path.relative_to(mount.top)
        for group in (below, *below.parents):
            yield top / group


def _parse_mount(line: str) -> _Mount | None:
    """Parse a line of /proc/self/mountinfo (proc(5)); None for one without control groups."""
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
    # In version 1: includes the limits of groups above, which may be invisible.
    limits.append(_find_in_stat(group, "hierarchical_memory_limit"))
    return [limit for limit in limits if limit is not None and limit < _NO_LIMIT]


def _memory_in_use(group: Path) -> int:
    """Return the memory that a group uses, without the file cache that the kernel drops first."""
    for used, dropped in (
        ("memory.current", "inactive_file"),
        ("memory.usage_in_bytes", "total_inactive_file"),
    ):
        in_use = _read_number(group / used)
        if in_use is not None:
            return max(0, in_use - (_find_in_stat(group, dropped) or 0))
    return 0


def _quota(group: Path) -> float | None:
    """Return how many processors' time a group may use; None if it has no limit."""
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
    """Read a file with a number; None if it contains `max`, or cannot be read."""
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
