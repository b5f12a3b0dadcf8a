"""What is kept of a machine when something fails: logs, the diagnosis, a picture of its screen."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from pathlib import Path

from pycloudlib.files import create_private_directory, write_private
from pycloudlib.qemu.machine import Machine, State
from pycloudlib.qemu.qmp import QmpError
from pycloudlib.qemu.rundir import short_path
from pycloudlib.qemu.running import MachineEndedError

_SCREEN_LIMIT = 10.0


def keep_artifacts(directory: Path, machine: Machine, error: BaseException) -> Path:
    """Write what is known of a failure into a new directory; nothing in it is secret.

    `error.txt` has the error with its diagnosis, `machine.json` the machine, `events.json` the QMP
    events, `console.log` and `qemu.log` what guest and QEMU said, and `screen.png` what was on the
    screen of a machine that has one (`launch_args=["-vga", "std"]`).

    Args:
        directory: Where the new directory goes; made if it is missing.
        machine: The machine.
        error: What failed.

    Returns:
        The new directory.

    Raises:
        OSError: It could not be written.
    """
    create_private_directory(directory)
    stem = f"{machine.spec.name}-{time.strftime('%Y%m%dT%H%M%S')}"
    number = 1
    while True:
        target = directory / (stem if number == 1 else f"{stem}-{number}")
        try:
            target.mkdir(mode=0o700)
            break
        except FileExistsError:
            number += 1
    write_private(target / "error.txt", f"{type(error).__name__}: {error}\n")
    write_private(target / "machine.json", machine.spec.to_json() + "\n")
    events = [
        {"event": event.name, "data": dict(event.data), "timestamp": event.timestamp}
        for event in machine.events
    ]
    write_private(target / "events.json", json.dumps(events, indent=1, default=str) + "\n")
    for log in (machine.rundir.console_log, machine.rundir.qemu_log):
        with contextlib.suppress(FileNotFoundError):
            shutil.copy2(log, target)
    _take_picture(machine, target / "screen.png")
    return target


def _take_picture(machine: Machine, target: Path) -> None:
    """Keep what is on the machine's screen; most have none."""
    if machine.state is State.OFF:
        return
    target.touch(mode=0o600)
    try:
        with short_path(target) as name:
            # PNG is known from QEMU 7.1 on.
            arguments = {"filename": name, "format": "png"}
            machine.execute("screendump", arguments, timeout=_SCREEN_LIMIT)
    except (QmpError, MachineEndedError):
        target.unlink()
