"""Saved machines restored: in a new machine, or in the one that was saved (a rollback)."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.files import copy_private, make_socket_pair, opened, write_private
from pycloudlib._base.tools import uninterrupted
from pycloudlib.errors import CloudError
from pycloudlib.guest.helper import FixUp
from pycloudlib.images import uses
from pycloudlib.qemu.disk import diskimage, layers
from pycloudlib.qemu.host.accelerator import Accelerator
from pycloudlib.qemu.parts.part import Memory, Origin, OwnDisk
from pycloudlib.qemu.saved.devicestate import accept_state, send_saved_state, wait_for_state
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.state.spec import PLUGGED, MachineSpec
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


def create_overlays(saved: SavedMachine, rundir: RunDirectory) -> None:
    """Make the disks of a machine that begins where another was saved, on the disks of that."""
    for own in saved.spec.own_disks:
        diskimage.create_on_layer(own.kept_beside(saved.image), own.beside(rundir.disk))


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
    rundir, spec = machine.rundir, machine.spec
    # A disk that was added since goes, and one that was removed is there again.
    ours, theirs = ({disk.suffix: disk for disk in one.own_disks} for one in (spec, saved.spec))
    exchanges = [_DiskExchange.of(rundir, disk) for disk in (ours | theirs).values()]

    def exchange() -> None:
        for each in exchanges:
            each.exchange()
        machine.change_spec(saved.spec.at_place_of(spec))

    with contextlib.ExitStack() as undo, prepared_restore(saved, rundir) as (origin, load_state):
        for each in exchanges:
            undo.callback(each.undo)
            if each.own.suffix in theirs:
                diskimage.create_on_layer(each.own.kept_beside(saved.image), each.fresh)
        undo.callback(machine.change_spec, spec)
        machine.restart_with(exchange, origin, load_state)
        undo.pop_all()
    for each in exchanges:
        each.before.unlink(missing_ok=True)
    _expect_fix_up(rundir, saved)


@dataclass(frozen=True, slots=True)
class _DiskExchange:
    """A disk of a machine that is exchanged for that of a saved one.

    Attributes:
        own: Which disk it is.
        disk: Its file.
        fresh: What takes its place; not there for a disk that the saved machine does not have.
        before: The name that it keeps meanwhile.
    """

    own: OwnDisk
    disk: Path
    fresh: Path
    before: Path

    @classmethod
    def of(cls, rundir: RunDirectory, own: OwnDisk) -> _DiskExchange:
        """Choose names for the exchange of a machine's disk."""
        fresh, before = (rundir.path / f".{secrets.token_hex(8)}.qcow2" for _ in range(2))
        return cls(own, own.beside(rundir.disk), fresh, before)

    def exchange(self) -> None:
        """Give the fresh disk the name of the machine's."""
        with contextlib.suppress(FileNotFoundError):  # it was removed since
            os.link(self.disk, self.before)
        if self.fresh.exists():
            # One rename: at any moment there is a whole disk under that name.
            self.fresh.replace(self.disk)
        else:
            self.disk.unlink()

    def undo(self) -> None:
        """Give the machine back the disk that it had."""
        self.fresh.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):  # it was not exchanged
            self.before.replace(self.disk)


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
    there = saved.spec.at_place_of(spec)
    for field in dataclasses.fields(MachineSpec):
        ours, theirs = getattr(spec, field.name), getattr(there, field.name)
        if field.name not in PLUGGED and ours != theirs:
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
    with (
        savedmachine.new_directory(savedmachine.directory_of(image)) as directory,
        contextlib.ExitStack() as undo,
    ):
        for own in saved.spec.own_disks:
            if own.suffix:
                source, target = own.kept_beside(saved.image), own.kept_beside(image)
                undo.callback(target.unlink, missing_ok=True)
                _copy_disk(source, target, linked=linked_for is not None)
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
        undo.pop_all()


def _copy_disk(source: Path, target: Path, *, linked: bool) -> None:
    if linked:
        os.link(source, target)
    else:
        # As one file that needs no other, as the image of the root disk is.
        diskimage.export(source, target, compress=False, on_progress=lambda _progress: None)


def _copy_memory(source: Path, target: Path) -> None:
    from pycloudlib.qemu.saved.memoryfile import MemoryFile  # noqa: PLC0415 - for saves alone

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
