"""The ways in which a machine can begin, and the steps that they share."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import secrets
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pycloudlib._base.files import copy_private, write_private
from pycloudlib._base.tools import uninterrupted
from pycloudlib.errors import InstanceExistsError
from pycloudlib.guest.access import hostkeys
from pycloudlib.guest.access.hostkeys import HostKeyPool
from pycloudlib.guest.data import seed as nocloud
from pycloudlib.guest.helper import FixUp, Identity
from pycloudlib.images import store, uses
from pycloudlib.qemu.disk import diskimage
from pycloudlib.qemu.host.accelerator import Accelerator
from pycloudlib.qemu.host.ownership import Orphans, create_owned_directory
from pycloudlib.qemu.host.resources import PortLease, PortRegistry
from pycloudlib.qemu.launching.login import Keys, Login
from pycloudlib.qemu.launching.request import LaunchRequest, make_seed
from pycloudlib.qemu.saved import restoring
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.state.spec import (
    MachineSpec,
    make_mac,
)
from pycloudlib.qemu.vm.machine import Machine
from pycloudlib.qemu.vm.process import PortTakenError

# Programs that know nothing of leases can take a port between our look and QEMU's start.
_PORT_TRIES = 5


@dataclass(frozen=True, slots=True)
class Host:
    """What machines run on.

    Attributes:
        binary: The QEMU binary.
        accelerator: How guest instructions are executed.
        ports: The ports that are leased to machines.
        host_keys: SSH host keys for machines, made ahead.
    """

    binary: Path
    accelerator: Accelerator
    ports: PortRegistry
    host_keys: HostKeyPool


class Launched(Protocol):
    """What a launcher asks of an instance that was registered."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def ip(self) -> str:
        """The address of its ports."""

    @property
    def telnet_port(self) -> str:
        """The port of its serial console."""

    def login_command(self) -> str:
        """Return the command line by which people log in."""

    def delete(self) -> list[Exception]:
        """Delete it; return the errors met on the way."""


class Beginning(Protocol):
    """The steps of launching a machine that differ by how it begins."""

    @property
    def name(self) -> str:
        """The machine's name."""

    @property
    def origin(self) -> str:
        """What it is launched from, as the log says it."""

    def holding(self, image_dir: Path) -> contextlib.AbstractContextManager[object]:
        """Keep what it begins from until the block ends.

        Raises:
            ImageNotFoundError: It is deleted.
        """

    def choose_login(self, keys: Keys, username: str | None, rundir: RunDirectory) -> Login:
        """Choose how to log in.

        Raises:
            InvalidKeyError: A file of the key is missing, or is no key.
        """

    def write_files(self, host: Host, rundir: RunDirectory, login: Login) -> None:
        """Make its disk and its seed."""

    def describe(self, host: Host, rundir: RunDirectory, lease: PortLease) -> MachineSpec:
        """Return what machine it is."""

    def switch_on(self, machine: Machine) -> None:
        """Start it."""


@dataclass(frozen=True, slots=True)
class PowerOn:
    """The steps of launching a machine that boots.

    Attributes:
        request: The machine.
    """

    request: LaunchRequest

    @property
    def name(self) -> str:
        """The machine's name."""
        return self.request.name

    @property
    def origin(self) -> str:
        """What it is launched from, as the log says it."""
        return f"from {self.request.image.path}"

    def holding(self, image_dir: Path) -> contextlib.AbstractContextManager[object]:
        """Keep the files that its parts need until the block ends; the caller keeps the image."""
        store.record_use(self.request.image.path)
        return uses.holding(*self.request.needs)

    def choose_login(self, keys: Keys, username: str | None, rundir: RunDirectory) -> Login:
        """Choose how to log in: by the cloud's key, as the image's own user by default."""
        record = store.find_record(self.request.image.path)
        default = record.default_user if record else store.DEFAULT_USER
        return Login(username or default, keys.for_machine(rundir))

    def write_files(self, host: Host, rundir: RunDirectory, login: Login) -> None:
        """Make its disks and its seed."""
        create_disks(rundir, self.request)
        if self.request.seed is not None:
            supply_seed(host, rundir, self.request)

    def describe(self, host: Host, rundir: RunDirectory, lease: PortLease) -> MachineSpec:
        """Return what machine it is."""
        return describe_machine(host, rundir, self.request, lease)

    def switch_on(self, machine: Machine) -> None:
        """Start it."""
        machine.power_on()


def create_disks(rundir: RunDirectory, request: LaunchRequest) -> None:
    """Make the disks of a machine that boots."""
    diskimage.create_overlay(request.image, rundir.disk, size=request.disk_size)
    for part in request.parts:
        for own in part.disks:
            diskimage.create_own(own, own.beside(rundir.disk))


def create_run_directory(path: Path, stack: contextlib.ExitStack, orphans: Orphans) -> RunDirectory:
    """Make an instance's directory; `stack` removes it, and its parent if that is empty then.

    Args:
        path: The directory.
        stack: Takes over what is made.
        orphans: What becomes of the instance when this program ends.

    Raises:
        InstanceExistsError: There is an instance of that name.
    """
    rundir = RunDirectory(path)

    def create() -> None:
        create_owned_directory(path, orphans)
        stack.callback(rundir.remove)

    stack.callback(_remove_if_empty, path.parent)
    try:
        # At no moment is it made and removed by nothing.
        uninterrupted(create)
    except OSError as error:
        # One of that name was not there when it was looked for.
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise InstanceExistsError(path.name, path) from error
        raise
    return rundir


def supply_seed(
    host: Host,
    rundir: RunDirectory,
    request: LaunchRequest,
    *,
    boothook: bytes | None = None,
    length: int = 0,
) -> None:
    """Make the machine's seed, with pinned host keys, unless the user-data decides them.

    Args:
        host: What the machine runs on.
        rundir: The machine's directory.
        request: The machine.
        boothook: What cloud-init is to run first; see `guest.seed.build_seed`.
        length: Bytes that the volume is to have; see `guest.seed.write_iso`.
    """
    assert request.seed is not None
    keys = () if request.seed.decides_host_keys else host.host_keys.take(f"root@{request.name}")
    nocloud.write_iso(make_seed(request, keys, boothook), rundir.seed, length)
    if keys:
        hostkeys.pin(rundir.known_hosts, keys)


def start_machine(
    host: Host,
    rundir: RunDirectory,
    describe: Callable[[PortLease], MachineSpec],
    stack: contextlib.ExitStack,
    switch_on: Callable[[Machine], None] = Machine.power_on,
) -> Machine:
    """Lease ports and start the machine; `stack` ends it and gives the ports back.

    Args:
        host: What it runs on.
        rundir: Its directory.
        describe: Returns the machine that has these ports.
        stack: Takes over what is made.
        switch_on: Starts the machine.

    Raises:
        LaunchError: QEMU ended at once.
        CloudError: No free ports.
    """
    for tries_left in reversed(range(_PORT_TRIES)):
        # Within the caller's from the beginning: there is no moment at which it is in neither.
        attempt = stack.enter_context(contextlib.ExitStack())
        lease = host.ports.acquire(rundir.path)
        attempt.callback(host.ports.release, lease, rundir.path)
        spec = describe(lease)
        rundir.write_spec(spec)
        machine = Machine(rundir, spec, host.binary)
        attempt.callback(machine.kill)
        try:
            switch_on(machine)
        except PortTakenError:
            if not tries_left:
                raise
            attempt.close()
        else:
            return machine
    raise AssertionError("unreachable: the last try returns or raises")


def _remove_if_empty(directory: Path) -> None:
    # The next launch, or another process of the same tag, may have put something there.
    with contextlib.suppress(OSError):
        directory.rmdir()


def describe_machine(
    host: Host, rundir: RunDirectory, request: LaunchRequest, lease: PortLease
) -> MachineSpec:
    """Return what machine was asked for."""
    return MachineSpec(
        name=request.name,
        instance_type=request.instance_type,
        accelerator=host.accelerator,
        disk=rundir.disk,
        seed=rundir.seed if request.seed else None,
        ssh_port=lease.ssh,
        telnet_port=lease.telnet,
        mac=make_mac(),
        kernel_boot=request.kernel_boot,
        launch_args=request.launch_args,
        disks=request.disks,
        without=host.accelerator.slow_features,
    )


@dataclass(frozen=True, slots=True)
class Copy:
    """The steps of starting a copy of a saved machine.

    Attributes:
        name: The copy's name; that of its directory.
        saved: The saved machine.
        fresh_identity: Whether it gets a new hostname, machine-id and host key.
        user_data: What cloud-init is to find on the seed in later boots, if something else than
            what the saved machine was given.
        first_run: A script that does now what a first boot would do with that; may be empty.
        boots: Whether it boots from the saved disk, as the saved machine cannot be restored here.
        stands_in: Whether it has the saved machine's name, as its guest has, in a directory of
            another name.
    """

    name: str
    saved: SavedMachine
    fresh_identity: bool = False
    user_data: bytes | None = None
    first_run: str = ""
    boots: bool = False
    stands_in: bool = False

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
            # A state needs the one that it was saved with; a boot is as quick as this host can be.
            accelerator=host.accelerator if self.boots else saved.accelerator,
            without=host.accelerator.slow_features if self.boots else saved.without,
            name=saved.name if self.stands_in else self.name,
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
