"""The steps of starting a copy of a saved machine; each owns what it makes, as in a launch."""

from __future__ import annotations

import dataclasses
import secrets
import uuid
from dataclasses import dataclass

from pycloudlib._base.files import copy_private, write_private
from pycloudlib.guest.access import hostkeys
from pycloudlib.guest.data import seed as nocloud
from pycloudlib.guest.helper import FixUp, Identity, NewKey
from pycloudlib.qemu.disk import diskimage
from pycloudlib.qemu.host.resources import PortLease
from pycloudlib.qemu.launching.request import Host
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.state.spec import MachineSpec


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
    diskimage.create_overlay(diskimage.read_layer(saved.image), rundir.disk, unopened=True)
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
