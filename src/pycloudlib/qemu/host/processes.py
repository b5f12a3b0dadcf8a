"""The identity of processes in any PID namespace, and which process has a connection's end."""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import logging
import os
import re
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pycloudlib._base.documents import escape_line, read_kernel_file, to_bytes
from pycloudlib._base.files import moved

_log = logging.getLogger(__name__)

# The inode of the kernel's first PID namespace (PROC_PID_INIT_INO), which shows all processes.
_FIRST_NAMESPACE = 0xEFFFFFFC
_LAST_PID = 2**31 - 1  # pid_t
_HOST_ID_FILES = ("/etc/machine-id", "/sys/class/dmi/id/product_uuid")
# proc_net_tcp(5): the connections in the network namespace of this thread.
_CONNECTIONS = "/proc/thread-self/net/tcp"
_SOCKET = re.compile(r"socket:\[([0-9]+)\]")


@enum.unique
class Presence(enum.Enum):
    """Whether a process runs, as far as this process can see."""

    HERE = "it runs"
    ENDED = "it has ended"
    ELSEWHERE = "it cannot be seen from here, and may run"


@dataclass(frozen=True, slots=True)
class World:
    """The scope in which a pid and a start time identify a process.

    Attributes:
        boot: The kernel's boot id.
        pids: The inode of the PID namespace.
        clock: The inode of the time namespace, whose clock start times have; 0 if the kernel has
            none.
        host: A digest of the host's machine-id and name, which stays the same in its next boot.
        name: The host's name, for people.
    """

    boot: str
    pids: int
    clock: int
    # A host may get another name while its programs run.
    host: str = field(compare=False)
    name: str = field(compare=False, default="")

    PATTERN = r"[0-9a-f]*-[0-9]+-[0-9]+-[0-9a-f]+"

    @classmethod
    @functools.cache
    def own(cls) -> World:
        """Return the world of this process, which never changes."""
        name = _read("/proc/sys/kernel/hostname")
        host_id = next(filter(None, map(_read, _HOST_ID_FILES)), "")
        return cls(
            boot=_read("/proc/sys/kernel/random/boot_id").replace("-", ""),
            pids=_find_namespace("pid"),
            clock=_find_namespace("time"),
            host=hashlib.sha256(to_bytes(f"{host_id}\0{name}")).hexdigest()[:16],
            name=name,
        )

    def __str__(self) -> str:
        return f"{self.boot}-{self.pids}-{self.clock}-{self.host}"

    @classmethod
    def parse(cls, text: str, name: str = "") -> World:
        """Parse the text of a world.

        Raises:
            ValueError: It is malformed.
        """
        if not re.fullmatch(cls.PATTERN, text):
            raise ValueError(f"{text!r} names no boot, PID namespace, time namespace and host")
        boot, pids, clock, host = text.split("-")
        return cls(boot, int(pids), int(clock), host, name)

    @property
    def shows_all(self) -> bool:
        """Whether this world, which is our own, shows every process of the kernel."""
        # With `hidepid`, the first process is hidden from all users but root, too.
        return self.pids == _FIRST_NAMESPACE and _is_proc_own() and _read("/proc/1/stat") != ""


# A forked child may be in another PID namespace than its parent.
os.register_at_fork(after_in_child=World.own.cache_clear)


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """The identity of a process, different from that of any other process.

    Attributes:
        pid: Its process id in its own world.
        start_time: When it started, in the kernel's clock ticks since boot (proc(5), field 22).
        world: The scope of these two; None, for our own, in a record of an older version.
    """

    pid: int
    start_time: int
    world: World | None = None

    @classmethod
    def find(cls, pid: int) -> ProcessIdentity | None:
        """Identify a process that runs; None if there is none, or a zombie."""
        try:
            start_time = _read_start(find_proc_directory(pid))
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if start_time is None else cls(pid, start_time, World.own())

    @classmethod
    def own(cls) -> ProcessIdentity:
        """Identify this process."""
        found = cls.find(os.getpid())
        assert found is not None
        return found

    @property
    def presence(self) -> Presence:
        """Whether it runs, as far as this process can see."""
        return self._locate()[0]

    @property
    def alive(self) -> bool:
        """Whether it runs or may run: one that cannot be seen from here counts as alive."""
        return self.presence is not Presence.ENDED

    @property
    def is_elsewhere(self) -> bool:
        """Whether it belongs to a world that cannot be seen from here."""
        return self.presence is Presence.ELSEWHERE

    @property
    def place(self) -> str:
        """Where it is, for people."""
        world, own = self.world, World.own()
        if world is None or world == own:
            return f"process {self.pid}"
        name = escape_line(world.name) or "another host"
        if world.boot != own.boot:
            return f"process {self.pid} on {name}"
        return f"process {self.pid} in another PID namespace ({name})"

    def find_pid(self) -> int | None:
        """Return its pid in our own PID namespace; None if it cannot be seen there."""
        return self._locate()[1]

    def to_plain(self) -> dict[str, Any]:
        """Return it as JSON values, for a file."""
        plain: dict[str, Any] = {"pid": self.pid, "start": self.start_time}
        if self.world is not None:
            plain |= {"world": str(self.world), "host": self.world.name}
        return plain

    def _locate(self) -> tuple[Presence, int | None]:
        own = World.own()
        world = self.world or own
        if world.boot != own.boot:
            ended = world.host == own.host  # the host has booted again since
            return (Presence.ENDED if ended else Presence.ELSEWHERE), None
        if world.pids == own.pids:
            presence = self._check(self.pid, same_clock=world.clock == own.clock)
            return presence, (self.pid if presence is Presence.HERE else None)
        inner = self._find_inner(world) if _is_proc_own() else None
        if inner is not None:
            return Presence.HERE, inner
        return (Presence.ENDED if own.shows_all else Presence.ELSEWHERE), None

    def _check(self, pid: int, *, same_clock: bool) -> Presence:
        """Return whether it is the process that has a pid in our own namespace."""
        try:
            start_time = _read_start(find_proc_directory(pid))
        except OSError:
            # It has ended, or it is hidden (the mount option `hidepid` of /proc).
            return Presence.ELSEWHERE if _exists(pid) else Presence.ENDED
        if start_time is None:
            return Presence.ENDED
        if not same_clock:
            return Presence.ELSEWHERE
        return Presence.HERE if start_time == self.start_time else Presence.ENDED

    def _find_inner(self, world: World) -> int | None:
        """Find its pid here, if it is in a namespace inside our own, where it has another pid."""
        for directory in Path("/proc").glob("[0-9]*"):
            # Each may end meanwhile.
            with contextlib.suppress(OSError, ValueError):
                pids = _read_pids(directory)
                if len(pids) < 2 or pids[-1] != self.pid:
                    continue
                if _read_start(directory) == self.start_time and _may_be_in(directory, world):
                    return int(directory.name)
        return None


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """A `ProcessIdentity` as it is stored in a file."""

    pid: int
    start: int
    world: str | None = None
    host: str = ""

    def identity(self) -> ProcessIdentity:
        """Return the identity.

        Raises:
            ValueError: The record is malformed.
        """
        if not 0 < self.pid <= _LAST_PID:
            raise ValueError(f"pid is {self.pid}, expected 1 to {_LAST_PID}")
        world = None if self.world is None else World.parse(self.world, self.host)
        return ProcessIdentity(self.pid, self.start, world)


def find_proc_directory(pid: int) -> Path:
    """Return the directory in /proc of a process of our own PID namespace.

    If /proc shows another namespace than our own (`unshare --pid` without `--mount-proc`), the name
    of the directory is another number.

    Raises:
        ProcessLookupError: There is no such process.
    """
    if _is_proc_own():
        return Path(f"/proc/{pid}")
    descriptor = moved(os.pidfd_open(pid))
    try:
        facts = read_kernel_file(f"/proc/self/fdinfo/{descriptor}")
    finally:
        os.close(descriptor)
    found = re.search(r"^Pid:\s+([1-9][0-9]*)$", facts, re.MULTILINE)
    if found is None:
        raise ProcessLookupError(f"/proc does not show process {pid}")
    return Path("/proc") / found[1]


def _is_proc_own() -> bool:
    """Whether /proc shows our own PID namespace."""
    try:
        return Path("/proc/self").readlink().name == str(os.getpid())
    except OSError:
        return False


def _read_start(directory: Path) -> int | None:
    """Read the start time of a process; None if it has ended.

    Raises:
        OSError: It does not exist any more, or is hidden.
    """
    # The second field, the name in parentheses, may contain anything; the rest has no ')'.
    fields = read_kernel_file(directory / "stat").rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _read_pids(directory: Path) -> list[int]:
    """Read the pids of a process: in the namespace that /proc shows, and in those inside it."""
    for line in read_kernel_file(directory / "status").splitlines():
        if line.startswith("NSpid:"):
            return [int(pid) for pid in line.split()[1:]]
    return []


def _may_be_in(directory: Path, world: World) -> bool:
    """Whether a process is in a PID namespace; True if the kernel denies the answer."""
    try:
        return (directory / "ns/pid").stat().st_ino == world.pids
    except PermissionError:
        return True


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        return False
    return True


def _find_namespace(kind: str) -> int:
    try:
        return Path(f"/proc/self/ns/{kind}").stat().st_ino
    except OSError:
        return 0


def _read(path: str) -> str:
    """Read a file of the kernel or the host; empty if there is none."""
    try:
        return read_kernel_file(path).strip()
    except OSError:
        return ""


def ends_in(connection: socket.socket, process: ProcessIdentity) -> bool:
    """Whether the other end of a connection over loopback is a socket of a process.

    Only that process, its user and root can answer there, whatever listens on the port later or
    elsewhere.

    Args:
        connection: A connected TCP socket (IPv4).
        process: The process; it has to run as this user, unless this user is root.
    """
    try:
        inode = find_inode(connection.getpeername(), connection.getsockname())
        pid = process.find_pid()
        if inode is None or pid is None:
            return False
        open_files = find_proc_directory(pid) / "fd"
        found = any(inode_of(file) == inode for file in open_files.iterdir())
    except OSError as error:
        _log.debug("The connections of process %d cannot be read: %s", process.pid, error)
        return False
    # Its pid may have been reused meanwhile.
    return found and process.find_pid() == pid


def find_inode(local: tuple[str, int], remote: tuple[str, int]) -> int | None:
    """Find the inode of the socket with these addresses in the kernel's table of connections."""
    wanted = f"{_hex(local)} {_hex(remote)}".split()
    for line in read_kernel_file(_CONNECTIONS).splitlines()[1:]:
        fields = line.split()
        if fields[1:3] == wanted:
            return int(fields[9]) or None  # 0: not accepted yet
    return None


def _hex(address: tuple[str, int]) -> str:
    """Return an address as the table has it: its four bytes as a number in native byte order."""
    number = int.from_bytes(socket.inet_aton(address[0]), sys.byteorder)
    return f"{number:08X}:{address[1]:04X}"


def inode_of(file: Path) -> int | None:
    """Read the inode of a socket that a process has open (`/proc/PID/fd/N`); None if it is none."""
    try:
        match = _SOCKET.fullmatch(str(file.readlink()))
    except FileNotFoundError:  # closed meanwhile
        return None
    return int(match[1]) if match else None
