"""What a machine must not have whose memory is kept in a file that others map, too.

QEMU's private mapping of that file keeps a guest's writes to itself, but not all that QEMU does:
pages that a guest gives back (a balloon, free page reporting, virtio-mem) are punched out of the
file, whatever the mapping is, and another process that is handed the file (vhost-user) writes into
it. Every machine that goes on from there reads zeros then, or another guest's data.

From QEMU 8.2 on the file is opened for reading alone, so that nothing can change it. Before, all
depends on what is in the machine, so QEMU itself is asked, before it is given any state: there are
many ways to say it (`-device`, JSON, `-readconfig`), and one list in the end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

from pycloudlib.errors import CloudError
from pycloudlib.qemu.memory import BACKEND

_DEVICES = re.compile(r"balloon|virtio-mem|vhost-user|vfio-user|x-pci-proxy|ivshmem")
_NETDEVS = re.compile(r"type=vhost-user")
# By which one of them comes into a machine that runs, or is put to use.
_COMMANDS = ("balloon", "device_add", "netdev_add", "human-monitor-command")
_CONTAINERS = ("/machine/peripheral", "/machine/peripheral-anon")


class KeptMemoryError(CloudError):
    """A machine has a device that would change the memory of others: it cannot have kept memory."""


class Executor(Protocol):
    """What executes QMP commands."""

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Execute a QMP command and return what it returns."""


def check_machine(name: str, qemu: Executor) -> None:
    """Make sure that a machine leaves memory alone that is kept for others.

    Args:
        name: The machine's name.
        qemu: Its QEMU; it need not run yet.

    Raises:
        KeptMemoryError: It would change that memory; names the device.
        QmpError: QEMU could not be asked.
    """
    found = _find_device(qemu) or _find_memory(qemu)
    if found is not None:
        raise KeptMemoryError(
            f"{name} has {found}. It can neither be saved with its memory nor go on from memory "
            "that is kept: leave it out (launch_args), or let the machine boot"
        )


def check_command(
    name: str, qemu: Executor, command: str, arguments: Mapping[str, Any] | None
) -> None:
    """Make sure that a QMP command adds no such device to a machine on kept memory.

    Args:
        name: The machine's name.
        qemu: Its QEMU.
        command: The command.
        arguments: Its arguments.

    Raises:
        KeptMemoryError: It would.
    """
    words = json.dumps([command, dict(arguments or {})], default=str)
    if command in _COMMANDS and _DEVICES.search(words) and _is_on_kept_memory(qemu):
        raise KeptMemoryError(
            f"{name} goes on from memory that is kept for others, too, and {command} would let it "
            "change that: do it in a machine that has booted"
        )


def _find_device(qemu: Executor) -> str | None:
    for container in _CONTAINERS:
        for child in qemu.execute("qom-list", {"path": container}):
            if _DEVICES.search(child["type"]):
                kind = child["type"].removeprefix("child<").rstrip(">")
                return f"a device {kind}, which changes the memory of all that use the same"
    networks = qemu.execute("human-monitor-command", {"command-line": "info network"})
    if _NETDEVS.search(networks):
        return "a network of type vhost-user, which changes the memory of all that use the same"
    return None


def _find_memory(qemu: Executor) -> str | None:
    for memory in qemu.execute("query-memdev"):
        if memory.get("share") and memory.get("id") != BACKEND:
            return f"shared memory beside its own ({memory.get('id')}), which is not kept"
    return None


def _is_on_kept_memory(qemu: Executor) -> bool:
    def ask(name: str) -> Any:
        return qemu.execute("qom-get", {"path": f"/objects/{BACKEND}", "property": name})

    # Its own memory has no file, or is a shared mapping of one.
    return ask("type") == "memory-backend-file" and not ask("share")
