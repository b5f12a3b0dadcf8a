"""Saved machines restored: in a new machine, or in the one that was saved (a rollback)."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.files import copy_private, make_socket_pair, opened, write_private
from pycloudlib._base.tools import uninterrupted
from pycloudlib.errors import CloudError
from pycloudlib.guest.helper import FixUp
from pycloudlib.images import uses
from pycloudlib.qemu.disk import diskimage, layers
from pycloudlib.qemu.host.accelerator import Accelerator
from pycloudlib.qemu.parts.part import Memory, Origin
from pycloudlib.qemu.saved.devicestate import accept_state, send_saved_state, wait_for_state
from pycloudlib.qemu.saved.memoryfile import MemoryFile
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.state.spec import MachineSpec
from pycloudlib.qemu.vm.machine import Machine
from pycloudlib.qemu.vm.running import RunningQemu

_RESTORE_LIMIT = 60.0


def restore(machine: Machine, saved: SavedMachine) -> None:
    """Power on a machine with the state of a saved one.

    Raises:
        MachineEndedError: QEMU did not load the state.
        CloudError: The machine did not run.
    """
    with prepared_restore(saved, machine.rundir) as (origin, load_state):
        machine.power_on(origin, load_state)


@contextlib.contextmanager
def prepared_restore(
    saved: SavedMachine, rundir: RunDirectory, *, held: bool = False
) -> Iterator[tuple[Origin, Callable[[RunningQemu], None]]]:
    """Yield what a QEMU that is restored begins with, and a function that loads its state.

    Args:
        saved: The saved machine.
        rundir: The directory of the one that is restored.
        held: Whether it stays as its state says, which may be paused.
    """
    ours, theirs = make_socket_pair()
    with ours, theirs:
        memory = Memory(file=saved.memory)
        number = theirs.fileno()

        def load_state(qemu: RunningQemu) -> None:
            accept_state(qemu, memory, number)
            send_saved_state(ours, saved.state)
            wait_for_state(qemu, Deadline.after(_RESTORE_LIMIT))
            _keep_base_state(saved, rundir)
            if not held:
                # Its state may be paused, as the saved machine was when that was written.
                qemu.execute("cont")

        yield Origin(memory, state=number), load_state


def _keep_base_state(saved: SavedMachine, rundir: RunDirectory) -> None:
    """Keep the state that a machine was started from, for when it is saved itself."""
    try:
        os.link(saved.state, rundir.base_state)
    except OSError:  # it is another user's, or on another file system
        copy_private(saved.state, rundir.base_state)


def check_has_booted(saved: SavedMachine, kind: type[Exception]) -> None:
    """Make sure that a saved machine is no starting point, or raise an error of a kind."""
    if saved.is_starting_point:
        base = layers.chain(saved.image)[-1]
        launchable = base if base != saved.image else "the image that it was made from"
        raise kind(
            f"{saved.image} is where first boots begin, not a machine that has booted: launch "
            f"{launchable} with fast_boot=True"
        )


def check_runs_here(saved: SavedMachine, binary: Path, accelerator: Accelerator) -> None:
    """Make sure that a saved machine can be restored on this host.

    Raises:
        CloudError: It cannot; says why.
    """
    obstacle = saved.find_obstacle(savedmachine.host_fingerprint(binary, accelerator))
    if obstacle is not None:
        raise CloudError(f"{saved.image} cannot be restored here: {obstacle}")


def roll_back(machine: Machine, saved: SavedMachine) -> None:
    """Restore a machine to the moment at which it was saved; later changes are lost.

    Raises:
        CloudError: It failed; the machine is off, and its disk is as it was.
    """
    store = layers.LayerStore(machine.rundir.path.parent)
    # The layers of the old disk are needed until the machine runs.
    with machine.changing(), uses.holding(saved.image), store.keeping_all():
        uninterrupted(lambda: _roll_back(machine, saved))
        layers.record_uses(machine.rundir.disk)


def _roll_back(machine: Machine, saved: SavedMachine) -> None:
    rundir = machine.rundir
    fresh, before = (rundir.disk.with_name(f".{secrets.token_hex(8)}.qcow2") for _ in range(2))

    def exchange_disk() -> None:
        os.link(rundir.disk, before)
        # One rename: at any moment there is a complete disk under that name.
        fresh.replace(rundir.disk)

    with contextlib.ExitStack() as undo, prepared_restore(saved, rundir) as (origin, load_state):
        undo.callback(fresh.unlink, missing_ok=True)
        undo.callback(_put_back, before, rundir.disk)
        diskimage.create_overlay(diskimage.read_layer(saved.image), fresh, unopened=True)
        machine.restart_with(exchange_disk, origin, load_state)
        undo.pop_all()
    before.unlink()
    _expect_fix_up(rundir, saved)


def _put_back(before: Path, disk_file: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        before.replace(disk_file)


def _expect_fix_up(rundir: RunDirectory, saved: SavedMachine) -> None:
    """Write what to fix up: the same as before, with the identity that the machine was given."""
    if rundir.fixed_up.exists():
        rundir.fixed_up.replace(rundir.fix_up)
    elif not rundir.fix_up.exists():
        write_private(rundir.fix_up, FixUp().to_json())
        if saved.known_hosts.exists():
            copy_private(saved.known_hosts, rundir.known_hosts)
    if saved.helper:
        write_private(rundir.helper_mark, saved.login.username)
    else:
        rundir.helper_mark.unlink(missing_ok=True)


def check_is_of(saved: SavedMachine, spec: MachineSpec) -> None:
    """Raise CloudError, which names the difference, unless a saved machine is of this machine."""
    places = ("name", "disk", "seed", "ssh_port", "telnet_port")
    for field in dataclasses.fields(MachineSpec):
        ours, theirs = getattr(spec, field.name), getattr(saved.spec, field.name)
        if field.name not in places and ours != theirs:
            raise CloudError(
                f"{spec.name} cannot be rolled back to {saved.image}: that is another machine "
                f"(its {field.name} is {theirs}, not {ours})"
            )


def copy_beside(saved: SavedMachine, image: Path, linked_for: Path | None = None) -> None:
    """Copy what is kept of a saved machine beside another image of the same disk.

    Args:
        saved: The machine.
        image: The image.
        linked_for: The final name of the image, when the large file is a hard link; None for a
            copy.
    """
    with savedmachine.new_directory(savedmachine.directory_of(image)) as directory:
        for file in sorted(saved.directory.iterdir()):
            if file != saved.memory:
                copy_private(file, directory / file.name)
            elif linked_for is not None:
                os.link(file, directory / file.name)
            else:
                _copy_memory(file, directory / file.name)
        final = savedmachine.directory_of(linked_for or image)
        relocated = dataclasses.replace(saved, image=image)
        savedmachine.write_facts(relocated, savedmachine.relocate(saved, directory, final))


def _copy_memory(source: Path, target: Path) -> None:
    with opened(source, os.O_RDONLY) as descriptor:
        try:
            with MemoryFile(target, os.fstat(descriptor).st_size) as copy:
                copy.begin_with(descriptor)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    # A change is noticed by the time of modification.
    facts = source.stat()
    os.utime(target, ns=(facts.st_atime_ns, facts.st_mtime_ns))
