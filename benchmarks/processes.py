"""Processes of this host, found by what is on their command lines; read from /proc."""

from __future__ import annotations

import os
from pathlib import Path


def find_qemu(text: str) -> list[int]:
    """Find the QEMU processes that have a text (a path) on their command line."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            argv = (directory / "cmdline").read_bytes()
        except OSError:
            continue  # it ended meanwhile, or is somebody else's
        # In QEMU's options a comma is written twice.
        command = argv.decode(errors="replace").replace(",,", ",")
        if text in command and "qemu-system" in command.partition("\0")[0]:
            found.append(int(directory.name))
    return sorted(found)


def resident_mib(pid: int) -> float:
    """Give what a process has in memory (Rss), in MiB."""
    return _memory_mib(pid, "Rss")


def proportional_mib(pid: int) -> float:
    """Give the same with what is shared divided among those who share it (Pss), in MiB."""
    return _memory_mib(pid, "Pss")


def _memory_mib(pid: int, kind: str) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == kind:
            return int(value.split()[0]) / 1024
    raise ValueError(f"no {kind} in /proc/{pid}/smaps_rollup")


def own_resident_mib() -> float:
    """Give what this process has in memory, in MiB."""
    return resident_mib(os.getpid())
