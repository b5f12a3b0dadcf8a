"""Network interfaces that are plugged into a running machine, and unplugged again."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from pycloudlib._base.deadline import Deadline
from pycloudlib.errors import CloudError, PycloudlibTimeoutError
from pycloudlib.guest.data import runconfig
from pycloudlib.qemu.state.spec import make_mac
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
    machine.execute("device_del", {"id": interface.name})
    deadline = Deadline.after(_UNPLUG_LIMIT)
    # Polled, since only the program that started the QEMU would receive an event.
    while interface.name in list_plugged(machine):
        if deadline.expired:
            raise PycloudlibTimeoutError(
                f"{machine.spec.name} did not release {interface.name} within "
                f"{deadline.limit:.0f} s"
            )
        time.sleep(_UNPLUG_INTERVAL)
    machine.execute("netdev_del", {"id": interface.name})


def list_plugged(machine: Machine) -> list[str]:
    """List the names of the interfaces that are plugged in."""
    children = machine.execute("qom-list", {"path": "/machine/peripheral"})
    return [child["name"] for child in children if _NAME.fullmatch(child["name"])]


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
