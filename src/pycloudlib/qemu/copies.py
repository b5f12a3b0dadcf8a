"""The steps of starting a copy of a saved machine; each owns what it makes, as in a launch."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pycloudlib.deadline import Deadline
from pycloudlib.descriptors import make_socket_pair
from pycloudlib.errors import CloudError
from pycloudlib.files import copy_private, write_private
from pycloudlib.guest import hostkeys
from pycloudlib.guest import seed as nocloud
from pycloudlib.guest.helper import FixUp, Identity, NewKey
from pycloudlib.images import uses
from pycloudlib.qemu import disk, layers
from pycloudlib.qemu.command import Origin
from pycloudlib.qemu.devicestate import feed, receive, wait_for_state
from pycloudlib.qemu.launch import Host
from pycloudlib.qemu.machine import Machine, uninterrupted
from pycloudlib.qemu.memory import Memory
from pycloudlib.qemu.ports import PortLease
from pycloudlib.qemu.rundir import RunDirectory
from pycloudlib.qemu.running import RunningQemu
from pycloudlib.qemu.savedmachine import SavedMachine
from pycloudlib.qemu.spec import MachineSpec

_WAKE_LIMIT = 60.0


@dataclass(frozen=True, slots=True)
class CopyRequest:
    """A copy as it is asked for.

    Attributes:
        name: The instance's name.
        saved: The machine to go on from.
        fresh_identity: Whether it is to be somebody of its own.
        new_key: The SSH key to let in, if another one than the saved machine's.
        user_data: What cloud-init is to find on the seed in later boots, if something else than
            what the saved machine was given.
        first_run: A script that does now what a first boot would do with that; may be empty.
        boots: Whether it boots from the saved disk, as the saved machine cannot go on here.
    """

    name: str
    saved: SavedMachine
    fresh_identity: bool = False
    new_key: NewKey | None = None
    user_data: bytes | None = None
    first_run: str = ""
    boots: bool = False


def write_files(host: Host, rundir: RunDirectory, request: CopyRequest) -> None:
    """Make the copy's disk and seed, and note what is to be put right in it."""
    saved = request.saved
    disk.create_overlay(disk.read_layer(saved.image), rundir.disk, unopened=True)
    identity = _make_identity(host, request.name) if request.fresh_identity else None
    # Another instance-id on the seed makes a boot a first one, which does by itself what is to be
    # done with user-data; otherwise that is done after the boot, and not in it, too.
    booted = request.boots and identity is not None
    user_data = request.user_data if booted or not request.boots else None
    _write_seed(rundir, saved, identity, user_data)
    if identity is not None:
        hostkeys.pin(rundir.known_hosts, identity.host_keys)
    elif saved.known_hosts.exists():
        copy_private(saved.known_hosts, rundir.known_hosts)
    if identity is not None or not request.boots:
        write_private(rundir.fix_up, FixUp(identity, request.new_key).to_json())
    if saved.helper and not request.boots:
        write_private(rundir.helper_mark, saved.login.username)
    if request.first_run and not booted:
        write_private(rundir.first_run, request.first_run)


def describe_copy(rundir: RunDirectory, request: CopyRequest, lease: PortLease) -> MachineSpec:
    """Say what machine the copy is: the saved one at another place."""
    saved = request.saved.spec
    return dataclasses.replace(
        saved,
        name=request.name,
        disk=rundir.disk,
        seed=rundir.seed if saved.seed else None,
        ssh_port=lease.ssh,
        telnet_port=lease.telnet,
    )


def wake(machine: Machine, saved: SavedMachine) -> None:
    """Let a machine that is off go on from where another was saved.

    Raises:
        MachineEndedError: QEMU did not take the state.
        CloudError: It did not come to run.
    """
    with waking(saved, machine.rundir) as (origin, settle):
        machine.power_on(origin, settle)


@contextlib.contextmanager
def waking(
    saved: SavedMachine, rundir: RunDirectory, *, held: bool = False
) -> Iterator[tuple[Origin, Callable[[RunningQemu], None]]]:
    """Give what a QEMU begins with that goes on from a saved machine, and how it comes to that.

    Args:
        saved: The saved machine.
        rundir: The directory of the one that goes on.
        held: Whether it is left as its state says, which may be that it stands still.
    """
    ours, theirs = make_socket_pair()
    with ours, theirs:
        memory = Memory(file=saved.memory)
        number = theirs.fileno()

        def settle(qemu: RunningQemu) -> None:
            receive(qemu, memory, number)
            feed(ours, saved.state)
            wait_for_state(qemu, Deadline.after(_WAKE_LIMIT))
            _keep_base_state(saved, rundir)
            if not held:
                # By the state it may stand still, as the saved one did when it was written.
                qemu.execute("cont")

        yield Origin(memory, state=number), settle


def _keep_base_state(saved: SavedMachine, rundir: RunDirectory) -> None:
    """Keep the state that a machine was started from, for when it is saved itself."""
    try:
        os.link(saved.state, rundir.base_state)
    except OSError:  # it is another user's, or on another file system
        copy_private(saved.state, rundir.base_state)


def roll_back(machine: Machine, saved: SavedMachine) -> None:
    """Let a machine go on from where it was saved; what happened since is forgotten.

    Raises:
        CloudError: It did not work; the machine is off, and its disk is as it was.
    """
    store = layers.LayerStore(machine.rundir.path.parent)
    # What the disk of before is built on is needed until the machine runs.
    with machine.changing(), uses.holding(saved.image), store.keeping_all():
        uninterrupted(lambda: _roll_back(machine, saved))
        layers.record_uses(machine.rundir.disk)


def _roll_back(machine: Machine, saved: SavedMachine) -> None:
    rundir = machine.rundir
    fresh, before = (rundir.disk.with_name(f".{secrets.token_hex(8)}.qcow2") for _ in range(2))

    def exchange_disk() -> None:
        os.link(rundir.disk, before)
        # One rename: at any moment there is a whole disk under that name.
        fresh.replace(rundir.disk)

    with contextlib.ExitStack() as undo, waking(saved, rundir) as (origin, settle):
        undo.callback(fresh.unlink, missing_ok=True)
        undo.callback(_put_back, before, rundir.disk)
        disk.create_overlay(disk.read_layer(saved.image), fresh, unopened=True)
        machine.begin_anew(exchange_disk, origin, settle)
        undo.pop_all()
    before.unlink()
    _expect_fix_up(rundir, saved)


def _put_back(before: Path, disk_file: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        before.replace(disk_file)


def _expect_fix_up(rundir: RunDirectory, saved: SavedMachine) -> None:
    """Note what is to be put right: who it is goes with it, as it was put right before."""
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
    """Make sure that a machine can be rolled back to a saved one.

    Raises:
        CloudError: It is another machine; says in what.
    """
    places = ("name", "disk", "seed", "ssh_port", "telnet_port")
    for field in dataclasses.fields(MachineSpec):
        ours, theirs = getattr(spec, field.name), getattr(saved.spec, field.name)
        if field.name not in places and ours != theirs:
            raise CloudError(
                f"{spec.name} cannot be rolled back to {saved.image}: that is another machine "
                f"(its {field.name} is {theirs}, not {ours})"
            )


def _make_identity(host: Host, name: str) -> Identity:
    host_keys = host.host_keys.take(f"root@{name}")
    return Identity(name, secrets.token_hex(16), f"iid-{uuid.uuid4()}", host_keys)


def _write_seed(
    rundir: RunDirectory, saved: SavedMachine, identity: Identity | None, user_data: bytes | None
) -> None:
    """Let later boots find on the seed who the machine is by then, and its own user-data."""
    if not saved.seed.exists():
        return
    if identity is None and user_data is None:
        copy_private(saved.seed, rundir.seed)
        return
    seed = nocloud.read_iso(saved.seed)
    if identity is not None:
        seed = nocloud.rename(
            seed,
            instance_id=identity.instance_id,
            hostname=identity.hostname,
            host_keys=identity.host_keys,
        )
    if user_data is not None:
        seed = dataclasses.replace(seed, user_data=user_data)
    nocloud.write_iso(seed, rundir.seed, length=saved.seed.stat().st_size)
