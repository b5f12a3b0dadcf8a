"""A machine like one that runs: it never runs itself, but is asked, or takes a state, and ends."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator
from pathlib import Path

from pycloudlib.errors import CloudError
from pycloudlib.qemu import disk
from pycloudlib.qemu.command import Origin
from pycloudlib.qemu.devicestate import list_blocks, write_state
from pycloudlib.qemu.machine import Machine
from pycloudlib.qemu.memory import SHARED
from pycloudlib.qemu.ownership import Orphans, create_owned_directory
from pycloudlib.qemu.rundir import RunDirectory
from pycloudlib.qemu.running import RunningQemu

_ANY_PORT = 0


@contextlib.contextmanager
def running(machine: Machine, state: int | None = None) -> Iterator[RunningQemu]:
    """Start the twin of a machine for the block, with shared memory and an empty disk.

    Args:
        machine: The machine.
        state: Descriptor that it is to take a state from, if any.

    Raises:
        CloudError: It could not be started.
    """
    name = f"{machine.spec.name}-twin-{secrets.token_hex(4)}"
    rundir = RunDirectory(machine.rundir.path.with_name(name))
    with contextlib.ExitStack() as stack:
        # No other program takes it for a machine, and `prune` removes it if this one is killed.
        create_owned_directory(rundir.path, Orphans.REAP)
        stack.callback(rundir.remove)
        disk.create_empty(rundir.disk)
        spec = dataclasses.replace(machine.spec, disk=rundir.disk, telnet_port=_ANY_PORT)
        origin = Origin(SHARED, state=state, is_twin=True)
        twin = RunningQemu.start(machine.binary, spec, rundir, origin)
        stack.callback(twin.kill)
        yield twin


def write_base_state(machine: Machine, file: Path) -> None:
    """Write a whole state of a machine like another that has booted, as it is when it is off.

    Raises:
        CloudError: It could not be had, or is not that of such a machine.
    """
    with running(machine) as twin:
        with machine.session() as session, twin.session() as other:
            version, today = (one.execute("query-version")["qemu"] for one in (session, other))
            ours, theirs = list_blocks(session), list_blocks(other)
        if [version["major"], version["minor"]] != [today["major"], today["minor"]]:
            raise CloudError(
                f"{machine.spec.name} runs in QEMU {_say(version)}, which is {_say(today)} here by "
                "now, and would not take its state: power it off and on first"
            )
        if ours != theirs:
            raise CloudError(f"{machine.spec.name} has other memory than a machine like it")
        write_state(twin, file)


def _say(version: dict[str, int]) -> str:
    return ".".join(str(version[part]) for part in ("major", "minor", "micro"))
