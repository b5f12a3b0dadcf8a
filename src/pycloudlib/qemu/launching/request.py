"""The steps of a launch: a request checked whole, then resources that own what they make."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pycloudlib._base.files import expand_user, is_file
from pycloudlib.errors import InstanceExistsError, MissingKernelError
from pycloudlib.guest.access import hostkeys
from pycloudlib.guest.access.hostkeys import HostKeyPool
from pycloudlib.guest.data import seed as nocloud
from pycloudlib.images import store
from pycloudlib.qemu.disk import diskimage
from pycloudlib.qemu.host.accelerator import Accelerator
from pycloudlib.qemu.host.ownership import Orphans, create_owned_directory
from pycloudlib.qemu.host.resources import PortLease, PortRegistry
from pycloudlib.qemu.parts.part import Part
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.state.spec import (
    DEFAULT_INSTANCE_TYPE,
    InstanceType,
    KernelBoot,
    MachineSpec,
    complete_cmdline,
    make_mac,
    make_name,
)
from pycloudlib.qemu.vm.machine import Machine, uninterrupted
from pycloudlib.qemu.vm.process import PortTakenError

# Programs that know nothing of leases can take a port between our look and QEMU's start.
_PORT_TRIES = 5


@dataclass(frozen=True, slots=True)
class SeedRequest:
    """What the caller wants cloud-init to be given; see `guest.seed.build_seed`."""

    public_key: str
    user_data: str | bytes | None = None
    meta_data: nocloud.Document = None
    vendor_data: nocloud.Document = None
    network_config: nocloud.Document = None

    @property
    def decides_host_keys(self) -> bool:
        """Whether the caller's data says anything of SSH host keys, or may."""
        documents = {"user_data": self.user_data, "vendor_data": self.vendor_data}
        return any(
            hostkeys.are_decided_by(nocloud.encode_document(name, document) or b"", name)
            for name, document in documents.items()
        )


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """What the caller of a launch asks for, as it was given; see `Qemu.launch`."""

    instance_type: str | None = DEFAULT_INSTANCE_TYPE
    user_data: str | bytes | None = None
    meta_data: nocloud.Document = None
    vendor_data: nocloud.Document = None
    network_config: nocloud.Document = None
    kernel_cmdline: str = ""
    kernel_path: str | Path | None = None
    no_seed_iso: bool = False
    username: str | None = None
    launch_args: Sequence[str] | None = None
    name: str | None = None
    disk_size_gib: int | None = None

    def to_plain(self) -> dict[str, str]:
        """Give each option that decides what the machine is like, as a text."""
        decisive = (name for name in LaunchOptions.__slots__ if name != "name")
        return {name: repr(getattr(self, name)) for name in decisive}

    def name_with(self, tag: str) -> str:
        """Give the machine's name: the one that was chosen, or one made from its cloud's tag."""
        return make_name(tag) if self.name is None else self.name

    def changes_to(self, spec: MachineSpec) -> list[str]:
        """Name the options that ask for another machine than one that exists already."""
        changes = [name for name in _MACHINE_OPTIONS if getattr(self, name)]
        if self.instance_type not in (None, DEFAULT_INSTANCE_TYPE, str(spec.instance_type)):
            changes.insert(0, "instance_type")
        return changes


_MACHINE_OPTIONS = (
    "meta_data",
    "vendor_data",
    "network_config",
    "kernel_cmdline",
    "kernel_path",
    "no_seed_iso",
    "launch_args",
    "disk_size_gib",
)


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


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """A machine as it is asked for, everything in it checked.

    Attributes:
        name: The instance's name.
        image: The image to start from.
        instance_type: Processors and memory.
        seed: Data for cloud-init; None for a machine without a seed.
        kernel_boot: The kernel to load directly; None to boot from the disk.
        launch_args: Further arguments for QEMU.
        disk_size: Length of its disk in bytes; None for the usual one.
    """

    name: str
    image: diskimage.BaseImage
    instance_type: InstanceType
    seed: SeedRequest | None
    kernel_boot: KernelBoot | None
    launch_args: tuple[str, ...]
    disk_size: int | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that are asked for, beside those that every machine has."""
        return () if self.kernel_boot is None else (self.kernel_boot,)

    @property
    def needs(self) -> tuple[Path, ...]:
        """The files that nobody deletes meanwhile, beside the image."""
        return tuple(file for part in self.parts for file in part.needs)


def parse_launch_args(launch_args: Sequence[str] | None) -> tuple[str, ...]:
    """Check the caller's arguments for QEMU.

    Raises:
        TypeError: They are not a list of texts.
        ValueError: One of them is none that a program can be given.
    """
    if launch_args is None:
        return ()
    if (
        isinstance(launch_args, (str, bytes))
        or not isinstance(launch_args, Iterable)
        or not all(isinstance(argument, str) for argument in launch_args)
    ):
        raise TypeError(
            f"launch_args must be a list of texts such as ['-device', 'pvpanic'], "
            f"not {launch_args!r}"
        )
    for argument in launch_args:
        _check_argument("launch_args", argument)
    return tuple(launch_args)


def find_kernel_boot(
    image: Path, kernel_cmdline: str, kernel_path: str | Path | None
) -> KernelBoot | None:
    """Find the kernel to load directly, when one is asked for.

    Args:
        image: The image; beside it may be its own kernel and initrd.
        kernel_cmdline: The caller's kernel command line.
        kernel_path: The caller's kernel, if any.

    Raises:
        MissingKernelError: A command line without a kernel to give it to.
        ValueError: A command line that no program can be given.
        TypeError: One of them is neither a text nor a path.
        FileNotFoundError: The caller's kernel is not there.
    """
    if not kernel_cmdline and kernel_path is None:
        return None
    _check_kernel_types(kernel_cmdline, kernel_path)
    kernel = store.kernel_path(image) if kernel_path is None else expand_user(kernel_path)
    if not is_file(kernel):
        if kernel_path is not None:
            raise FileNotFoundError(f"kernel_path {str(kernel_path)!r} is not a file")
        raise MissingKernelError(
            f"kernel_cmdline {kernel_cmdline!r} needs a kernel: give kernel_path, or use an image "
            f"that was downloaded or built by this package (there is no {kernel})"
        )
    initrd = _find_initrd(kernel)
    return KernelBoot(
        kernel.absolute(), initrd, complete_cmdline(kernel_cmdline, has_initrd=initrd is not None)
    )


def _check_kernel_types(kernel_cmdline: str, kernel_path: str | Path | None) -> None:
    if not isinstance(kernel_cmdline, str):
        raise TypeError(f"kernel_cmdline must be a text, not {kernel_cmdline!r}")
    _check_argument("kernel_cmdline", kernel_cmdline)
    if kernel_path is not None and not isinstance(kernel_path, (str, os.PathLike)):
        raise TypeError(f"kernel_path must be a path, not {kernel_path!r}")


def _check_argument(name: str, text: str) -> None:
    """Make sure that a text can be handed to a program (execve(2))."""
    try:
        possible = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise ValueError(f"{name} holds {text!r}, which no program can be given")


def _find_initrd(kernel: Path) -> Path | None:
    """Find what stands beside a kernel under the names that distributions give it."""
    for name in ("initrd", "initrd.img"):
        initrd = kernel.with_name(kernel.name.replace("vmlinuz", name))
        if initrd.name != kernel.name and is_file(initrd):
            return initrd.absolute()
    return None


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
        # There is no moment at which it is made and nobody removes it.
        uninterrupted(create)
    except OSError as error:
        # One of that name was not there when it was looked for.
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise InstanceExistsError(path.name, path) from error
        raise
    return rundir


class Beginning(Protocol):
    """The steps of launching a machine that differ by where it begins."""

    @property
    def request(self) -> LaunchRequest:
        """The machine."""

    def write_files(self, host: Host, rundir: RunDirectory) -> None:
        """Make its disk and its seed."""

    def describe(self, host: Host, rundir: RunDirectory, lease: PortLease) -> MachineSpec:
        """Say what machine it is."""

    def switch_on(self, machine: Machine) -> None:
        """Let it begin."""


@dataclass(frozen=True, slots=True)
class PowerOn:
    """The steps of launching a machine that boots.

    Attributes:
        request: The machine.
    """

    request: LaunchRequest

    def write_files(self, host: Host, rundir: RunDirectory) -> None:
        """Make its disk and its seed."""
        diskimage.create_overlay(self.request.image, rundir.disk, size=self.request.disk_size)
        if self.request.seed is not None:
            supply_seed(host, rundir, self.request)

    def describe(self, host: Host, rundir: RunDirectory, lease: PortLease) -> MachineSpec:
        """Say what machine it is."""
        return describe_machine(host, rundir, self.request, lease)

    def switch_on(self, machine: Machine) -> None:
        """Let it begin."""
        machine.power_on()


def supply_seed(
    host: Host,
    rundir: RunDirectory,
    request: LaunchRequest,
    *,
    boothook: bytes | None = None,
    length: int = 0,
) -> None:
    """Make the machine's seed, with host keys that are pinned, unless the caller says of some.

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


def make_seed(
    request: LaunchRequest,
    host_keys: Sequence[hostkeys.HostKey] = (),
    boothook: bytes | None = None,
) -> nocloud.Seed:
    """Put the seed of a machine that has one together; errors are those of `build_seed`."""
    assert request.seed is not None
    return nocloud.build_seed(
        instance_id=f"iid-{uuid.uuid4()}",
        hostname=request.name,
        host_keys=host_keys,
        public_key=request.seed.public_key,
        user_data=request.seed.user_data,
        meta_data=request.seed.meta_data,
        vendor_data=request.seed.vendor_data,
        network_config=request.seed.network_config,
        boothook=boothook,
    )


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
        describe: Gives the machine that has these ports.
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
    """Say what machine was asked for."""
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
    )
