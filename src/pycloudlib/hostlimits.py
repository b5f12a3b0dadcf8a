"""What this program may use of its host: not all of it, in a container, a service or a session.

The kernel tells of a program's control groups in /proc/self/cgroup, and of where they are seen in
/proc/self/mountinfo. A limit of a group holds for all that is below it, so of each group and all
above it the narrowest counts. There are two kinds, of which a host may have both at once:
version 2 (Documentation/admin-guide/cgroup-v2.rst) and version 1 (cgroup-v1/memory.rst). In a
container only the groups from its own on may be visible; what cannot be read limits nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pycloudlib.rawtext import read_kernel_file

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
