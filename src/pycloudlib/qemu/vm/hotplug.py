"""Network interfaces and disks that are plugged into a running machine, and unplugged again."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.tools import uninterrupted
from pycloudlib.errors import CloudError, PycloudlibTimeoutError
from pycloudlib.guest.data import runconfig
from pycloudlib.images import uses
from pycloudlib.qemu.disk import diskimage, layers
from pycloudlib.qemu.parts.furtherdisk import FurtherDisk
from pycloudlib.qemu.state.spec import make_mac
from pycloudlib.qemu.vm import livedisk
from pycloudlib.qemu.vm.machine import Machine
from pycloudlib.qemu.vm.qmp import QmpError
from pycloudlib.result import Result

# A guest releases a device when its kernel gets to it.
_UNPLUG_LIMIT = 60.0
_UNPLUG_INTERVAL = 0.2
_CONTAINERS = ("/machine/peripheral", "/machine/peripheral-anon")
_NAME = re.compile(r"hotnet(?P<number>[0-9]+)")
# Networks 10.0.3.0/24 and up; QEMU's own for the first interface is 10.0.2.0/24.
_FIRST_NETWORK = 3
_LAST_NETWORK = 250


@dataclass(frozen=True, slots=True)
class PluggedInterface:
    """An interface that was plugged in.

    Attributes:
        name: QEMU's id for both its device and its back end.
        mac: Its address.
    """

    name: str
    mac: str


def plug_interface(machine: Machine) -> PluggedInterface:
    """Plug a network card into a running machine, in a user-mode network of its own.

    Raises:
        MachineEndedError: The machine is off.
        CloudError: QEMU refused, or there are too many.
    """
    with machine.changing():
        return _plug_interface(machine)


def _plug_interface(machine: Machine) -> PluggedInterface:
    number = find_free_number(machine)
    interface = PluggedInterface(f"hotnet{number}", make_mac())
    machine.execute(
        "netdev_add",
        {"type": "user", "id": interface.name, "net": f"10.0.{number}.0/24"},
    )
    try:
        machine.execute(
            "device_add",
            {
                "driver": "virtio-net-pci",
                "id": interface.name,
                "netdev": interface.name,
                "mac": interface.mac,
                "romfile": "",
            },
        )
    except QmpError:
        machine.execute("netdev_del", {"id": interface.name})
        raise
    return interface


def add_interface(machine: Machine, execute: Callable[..., Result]) -> str:
    """Plug an interface into a running machine and have the guest configure it.

    Args:
        machine: The machine.
        execute: Runs a command in the guest, as `BaseInstance.execute` does.

    Returns:
        The address it got in the guest.

    Raises:
        MachineEndedError: The machine is off.
        CloudError: QEMU refused, or the interface got no address; it is unplugged again.
    """
    interface = plug_interface(machine)
    try:
        result = execute(
            runconfig.configure_script(interface.mac),
            use_sudo=True,
            description="configuring a new network interface",
        )
        return runconfig.parse_address(result)
    except BaseException as error:
        unplug_interface(machine, interface)
        if isinstance(error, ValueError):
            raise CloudError(
                f"{machine.spec.name}: a new interface did not come up: {error}"
            ) from error
        raise


def remove_interface(machine: Machine, ip_address: str, execute: Callable[..., Result]) -> None:
    """Unplug the interface that `add_interface` has plugged in.

    Args:
        machine: The machine.
        ip_address: The address that it returned.
        execute: Runs a command in the guest, as `BaseInstance.execute` does.

    Raises:
        CloudError: No plugged-in interface has that address.
    """
    mac = execute(runconfig.find_mac_script(ip_address)).stdout
    if not mac:
        raise CloudError(f"No interface of {machine.spec.name} has the address {ip_address!r}")
    unplug_interface(machine, find_plugged(machine, mac))
    execute(runconfig.forget_script(mac), use_sudo=True)


def find_plugged(machine: Machine, mac: str) -> PluggedInterface:
    """Find a plugged-in interface by its address.

    Raises:
        CloudError: There is none; the machine's first interface was not plugged in.
    """
    for name in list_plugged(machine):
        found = machine.execute(
            "qom-get", {"path": f"/machine/peripheral/{name}", "property": "mac"}
        )
        if str(found).lower() == mac.lower():
            return PluggedInterface(name, mac)
    raise CloudError(f"No interface with address {mac} was plugged into {machine.spec.name}")


def unplug_interface(machine: Machine, interface: PluggedInterface) -> None:
    """Unplug an interface, and wait until the guest has released it.

    Raises:
        PycloudlibTimeoutError: The guest did not release it in time.
    """
    with machine.changing():
        _unplug_interface(machine, interface)


def _unplug_interface(machine: Machine, interface: PluggedInterface) -> None:
    _pull_out(machine, interface.name)
    machine.execute("netdev_del", {"id": interface.name})


def _pull_out(machine: Machine, device: str) -> None:
    """Pull a device out, and wait until it and what it had open are gone."""
    machine.execute("device_del", {"id": device})
    deadline = Deadline.after(_UNPLUG_LIMIT)
    # Polled, since only the program that started the QEMU would receive an event.
    while device in _list_devices(machine) or _has_disk(machine, device):
        if deadline.expired:
            raise PycloudlibTimeoutError(
                f"{machine.spec.name} did not release {device} within {deadline.limit:.0f} s"
            )
        time.sleep(_UNPLUG_INTERVAL)


def list_plugged(machine: Machine) -> list[str]:
    """List the names of the interfaces that are plugged in."""
    return [name for name in _list_devices(machine) if _NAME.fullmatch(name)]


def _list_devices(machine: Machine) -> list[str]:
    """List the names of the devices that have one."""
    children = machine.execute("qom-list", {"path": "/machine/peripheral"})
    return [child["name"] for child in children]


def _has_disk(machine: Machine, device: str) -> bool:
    """Whether a device has a disk, which it lets go of a moment after it is gone itself."""
    blocks = machine.execute("query-block")
    return any(block.get("qdev") == device for block in blocks)


def list_added(machine: Machine) -> list[str]:
    """List the names of the devices that any program added while the machine ran (`device_add`)."""
    with machine.session() as session:
        places = [
            (f"{container}/{child['name']}", child["name"])
            for container in _CONTAINERS
            for child in session.execute("qom-list", {"path": container})
            if child["type"].startswith("child<")
        ]
        return [
            name
            for path, name in places
            if session.execute("qom-get", {"path": path, "property": "hotplugged"})
        ]


def find_free_number(machine: Machine) -> int:
    """Find a number for one more network of a machine."""
    taken = set(list_plugged(machine))
    for number in range(_FIRST_NETWORK, _LAST_NETWORK + 1):
        if f"hotnet{number}" not in taken:
            return number
    raise CloudError(f"{machine.spec.name} has the largest number of network interfaces already")


def plug_disk(
    machine: Machine, choose: Callable[[Sequence[FurtherDisk]], FurtherDisk]
) -> FurtherDisk:
    """Plug a disk into a running machine; it is one of the machine's from then on.

    Args:
        machine: The machine.
        choose: Says which disk, by those that the machine has; errors are its own.

    Raises:
        MachineEndedError: The machine is off.
        CloudError: QEMU refused, or a save that was cut off is not settled.
    """
    with machine.changing(), contextlib.ExitStack() as undo:
        machine.check_on()
        rundir, spec = machine.rundir, machine.spec
        if rundir.is_being_saved:
            raise CloudError(
                f"{spec.name} cannot get a disk before a save that was cut off is settled, for "
                "which its QEMU did not answer"
            )
        disk = choose(spec.disks)
        with uses.holding(*disk.needs):
            undo.callback(layers.record_uses, rundir.disk)
            uninterrupted(lambda: _plug_disk(machine, disk, undo))
            machine.change_spec(dataclasses.replace(spec, disks=(*spec.disks, disk)))
            undo.pop_all()
            layers.record_uses(rundir.disk)
    return disk


def _plug_disk(machine: Machine, disk: FurtherDisk, undo: contextlib.ExitStack) -> None:
    # As a fresh overlay, which it is: it gets its name when it is the machine's.
    fresh = machine.rundir.path / f".{secrets.token_hex(8)}.qcow2"
    undo.callback(fresh.unlink, missing_ok=True)
    for own in disk.disks:
        diskimage.create_own(own, fresh)
    opened = disk.image if disk.write and disk.image is not None else fresh
    how = {"driver": disk.image_format} if disk.write else {}
    with machine.session() as session:
        try:
            with livedisk.opened_node(
                session, opened, how, node=livedisk.name_node(fresh), flushed=disk.write
            ) as node:
                session.execute("device_add", {**disk.plug, "drive": node})
        except BaseException:
            livedisk.close_unused(session)
            raise
    undo.callback(_unplug_disk, machine, disk)
    for own in disk.disks:
        file = own.beside(machine.rundir.disk)
        undo.callback(file.unlink, missing_ok=True)
        fresh.replace(file)


def unplug_disk(machine: Machine, serial: str) -> None:
    """Pull a disk out of a running machine, and remove it unless it is an image itself.

    Raises:
        MachineEndedError: The machine is off.
        CloudError: It has no such disk.
        PycloudlibTimeoutError: It did not let go of it.
    """
    with machine.changing():
        machine.check_on()
        rundir, spec = machine.rundir, machine.spec
        disk = next((disk for disk in spec.disks if disk.serial == serial), None)
        if disk is None:
            there = ", ".join(disk.serial for disk in spec.disks) or "none"
            raise CloudError(
                f"{spec.name} has no further disk with the serial {serial!r} (it has: {there})"
            )
        _unplug_disk(machine, disk)
        left = tuple(other for other in spec.disks if other != disk)
        machine.change_spec(dataclasses.replace(spec, disks=left))
        for own in disk.disks:
            own.beside(rundir.disk).unlink(missing_ok=True)
        layers.record_uses(rundir.disk)


def _unplug_disk(machine: Machine, disk: FurtherDisk) -> None:
    # It may be out already: by device_del, or when this was cut off before.
    if disk.device in _list_devices(machine):
        _pull_out(machine, disk.device)
    with machine.session() as session:
        livedisk.close_unused(session)
