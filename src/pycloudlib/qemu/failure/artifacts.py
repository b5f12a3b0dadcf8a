"""The files saved when a machine fails: logs, the diagnosis, a picture of its screen."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from pycloudlib._base.documents import escape_bytes, to_bytes
from pycloudlib._base.files import copy_private, create_directories, moved, write_private
from pycloudlib.qemu.state.rundir import short_path
from pycloudlib.qemu.vm.machine import Machine
from pycloudlib.qemu.vm.qmp import QmpError
from pycloudlib.qemu.vm.running import MachineEndedError, State

_SCREEN_LIMIT = 10.0


def keep_artifacts(
    directory: Path,
    machine: Machine,
    error: BaseException,
    more: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write the facts about a failure into a new directory, without secrets.

    `error.txt` has the error with its diagnosis, `machine.json` the machine, `events.json` the QMP
    events, `console.log` and `qemu.log` the output of guest and QEMU, and `screen.png` the screen
    of a machine that has one (`launch_args=["-vga", "std"]`).

    Args:
        directory: The parent of the new directory; made if it is missing. Others may write there.
        machine: The machine.
        error: The error.
        more: Further texts, by the names of their files.

    Returns:
        The new directory, which only its owner can enter.

    Raises:
        OSError: It could not be written.
    """
    target = _make_directory(directory, f"{machine.spec.name}-{time.strftime('%Y%m%dT%H%M%S')}")
    with _holding(target) as place:
        events = [
            {"event": event.name, "data": dict(event.data), "timestamp": event.timestamp}
            for event in machine.events
        ]
        texts = {
            "error.txt": _writable(f"{type(error).__name__}: {error}\n"),
            "machine.json": machine.spec.to_json() + "\n",
            "events.json": json.dumps(events, indent=1, default=str) + "\n",
            **more,
        }
        for name, text in texts.items():
            write_private(place / name, text)
        for log in (machine.rundir.console_log, machine.rundir.qemu_log):
            with contextlib.suppress(FileNotFoundError):
                copy_private(log, place / log.name)
        _take_picture(machine, place / "screen.png")
    return target


def _writable(text: str) -> str:
    """Return a text that can be encoded: escapes of raw bytes stay, others are written out."""
    try:
        to_bytes(text)
    except UnicodeEncodeError:
        return escape_bytes(text)
    return text


def _make_directory(directory: Path, stem: str) -> Path:
    create_directories(directory)
    for number in itertools.count(1):
        target = directory / (stem if number == 1 else f"{stem}-{number}")
        with contextlib.suppress(FileExistsError):
            target.mkdir(mode=0o700)
            return target
    raise AssertionError("unreachable: a name is free")


@contextlib.contextmanager
def _holding(directory: Path) -> Iterator[Path]:
    """Yield another path of a new directory, which leads to it even if others replace its own.

    Raises:
        PermissionError: Another user has replaced it already.
    """
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = moved(os.open(directory, flags))
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise PermissionError(errno.EPERM, "another user has replaced it", directory)
        yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _take_picture(machine: Machine, target: Path) -> None:
    """Save a picture of the machine's screen; most machines have none."""
    if machine.state is State.OFF:
        return
    target.touch(mode=0o600)
    try:
        with short_path(target) as name:
            # QEMU 7.1 and later write PNG.
            arguments = {"filename": name, "format": "png"}
            machine.execute("screendump", arguments, timeout=_SCREEN_LIMIT)
    except (QmpError, MachineEndedError):
        target.unlink()
