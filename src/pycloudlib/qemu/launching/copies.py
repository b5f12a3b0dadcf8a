"""A copy of a saved machine: a third way to begin, beside power on and a first boot."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import uuid
from dataclasses import dataclass
from pathlib import Path

from pycloudlib._base.files import copy_private, write_private
from pycloudlib.guest.access import hostkeys
from pycloudlib.guest.data import seed as nocloud
from pycloudlib.guest.helper import FixUp, Identity
from pycloudlib.images import uses
from pycloudlib.qemu.host.resources import PortLease
from pycloudlib.qemu.launching.beginning import Host
from pycloudlib.qemu.launching.login import Keys, Login
from pycloudlib.qemu.saved import restoring
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.state.spec import MachineSpec
from pycloudlib.qemu.vm.machine import Machine


@dataclass(frozen=True, slots=True)
class Copy:
    """The steps of starting a copy of a saved machine.

    Attributes:
        name: The copy's name.
        saved: The saved machine.
        fresh_identity: Whether it gets a new hostname, machine-id and host key.
        user_data: What cloud-init is to find on the seed in later boots, if something else than
            what the saved machine was given.
        first_run: A script that does now what a first boot would do with that; may be empty.
        boots: Whether it boots from the saved disk, as the saved machine cannot be restored here.
    """

    name: str
    saved: SavedMachine
    fresh_identity: bool = False
    user_data: bytes | None = None
    first_run: str = ""
    boots: bool = False

    @property
    def origin(self) -> str:
        """What it is launched from, as the log says it."""
        return f"as a copy of {self.saved.image}"

    def holding(self, image_dir: Path) -> contextlib.AbstractContextManager[object]:
        """Keep the saved machine until the block ends.

        Raises:
            ImageNotFoundError: It is deleted.
        """
        return uses.holding_image(str(self.saved.image), image_dir)

    def choose_login(self, keys: Keys, username: str | None, rundir: RunDirectory) -> Login:
        """Choose how to log in: by the cloud's key where the helper can add it to the guest.

        Raises:
            InvalidKeyError: A file of the cloud's key is missing, or is no key.
        """
        can_add = self.saved.helper and not self.boots
        return keys.for_copy(self.saved, username, rundir, can_add=can_add)

    def write_files(self, host: Host, rundir: RunDirectory, login: Login) -> None:
        """Make the copy's disk and seed, and note what is to be fixed up in it."""
        saved = self.saved
        restoring.create_overlays(saved, rundir)
        for name in saved.spec.kept_files:
            if (saved.directory / name).exists():
                copy_private(saved.directory / name, rundir.path / name)
        identity = _make_identity(host, self.name) if self.fresh_identity else None
        # Another instance-id on the seed makes a boot a first one, which does by itself what is to
        # be done with user-data; otherwise that is done after the boot, and not in it, too.
        booted = self.boots and identity is not None
        user_data = self.user_data if booted or not self.boots else None
        if identity is not None or user_data is not None:
            _rewrite_seed(rundir, identity, user_data)
        if identity is not None:
            hostkeys.pin(rundir.known_hosts, identity.host_keys)
        elif saved.known_hosts.exists():
            copy_private(saved.known_hosts, rundir.known_hosts)
        if identity is not None or not self.boots:
            write_private(rundir.fix_up, FixUp(identity, login.new_key).to_json())
        if saved.helper and not self.boots:
            write_private(rundir.helper_mark, saved.login.username)
        if self.first_run and not booted:
            write_private(rundir.first_run, self.first_run)

    def describe(self, host: Host, rundir: RunDirectory, lease: PortLease) -> MachineSpec:
        """Return what machine the copy is: the saved one at another place."""
        saved = self.saved.spec
        return dataclasses.replace(
            saved,
            name=self.name,
            disk=rundir.disk,
            seed=rundir.seed if saved.seed else None,
            ssh_port=lease.ssh,
            telnet_port=lease.telnet,
        )

    def switch_on(self, machine: Machine) -> None:
        """Restore it, or boot it where it cannot be restored.

        Raises:
            CloudError: It did not come to run.
        """
        if self.boots:
            machine.power_on()
        else:
            restoring.restore(machine, self.saved)


def _make_identity(host: Host, name: str) -> Identity:
    host_keys = host.host_keys.take(f"root@{name}")
    return Identity(name, secrets.token_hex(16), f"iid-{uuid.uuid4()}", host_keys)


def _rewrite_seed(rundir: RunDirectory, identity: Identity | None, user_data: bytes | None) -> None:
    """Write the seed that later boots read: with the new identity, and with its own user-data."""
    if not rundir.seed.exists():
        return
    seed = nocloud.read_iso(rundir.seed)
    if identity is not None:
        seed = nocloud.rename(
            seed,
            instance_id=identity.instance_id,
            hostname=identity.hostname,
            host_keys=identity.host_keys,
        )
    if user_data is not None:
        seed = dataclasses.replace(seed, user_data=user_data)
    length = rundir.seed.stat().st_size
    rundir.seed.unlink()
    nocloud.write_iso(seed, rundir.seed, length)
