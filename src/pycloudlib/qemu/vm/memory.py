"""The kinds of guest memory, and which one a machine gets.

A machine that boots has memory of its own, shared or anonymous. Machines that are restored map the
saved memory privately, so that all of them share what none has changed. Each kind can be saved
while the machine runs; `guestmemory.py` reads it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pycloudlib._base.documents import read_kernel_file
from pycloudlib._base.files import moved
from pycloudlib.errors import CloudError
from pycloudlib.qemu.host.accelerator import Accelerator
from pycloudlib.qemu.parts.part import ANONYMOUS, SHARED, Memory
from pycloudlib.qemu.parts.standard import BACKEND

HUGE_SHARED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_NAME = "pycloudlib-guest-memory"


def choose_memory(accelerator: Accelerator, huge_shared: Path = HUGE_SHARED) -> Memory:
    """Choose the memory of a machine that boots.

    Any of our programs can read shared memory, and compare it in place. Under KVM, however, guests
    are faster with huge pages, which most hosts have for anonymous memory only.

    Args:
        accelerator: What executes the guest.
        huge_shared: The kernel's setting of huge pages for shared memory.
    """
    if accelerator is Accelerator.KVM and not _shared_memory_has_huge_pages(huge_shared):
        return ANONYMOUS
    return SHARED


def _shared_memory_has_huge_pages(setting: Path) -> bool:
    """Whether the chosen word allows it: "always within_size advise [never] deny force"."""
    with contextlib.suppress(OSError):
        chosen = read_kernel_file(setting).partition("[")[2].partition("]")[0]
        return chosen in ("always", "within_size", "advise", "force")
    return False


def create_shared_memory(size: int) -> int:
    """Create shared memory, a file without a name, and return its descriptor.

    QEMU gets it as a file (`memory-backend-file`), and does not create it itself
    (`memory-backend-memfd`): from 8.1 on it leaves only files out of a state.
    """
    descriptor = moved(os.memfd_create(_NAME, os.MFD_CLOEXEC))
    os.ftruncate(descriptor, size)
    return descriptor


_DEVICES = re.compile(r"balloon|virtio-mem|vhost-user|vfio-user|x-pci-proxy|ivshmem")
_NETDEVS = re.compile(r"type=vhost-user")
# The commands that add such a device to a machine that runs, or use it.
_COMMANDS = ("balloon", "device_add", "netdev_add", "human-monitor-command")
_CONTAINERS = ("/machine/peripheral", "/machine/peripheral-anon")


class KeptMemoryError(CloudError):
    """A machine has a device that would change saved memory, which other machines share."""


class Executor(Protocol):
    """What executes QMP commands."""

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Execute a QMP command and return what it returns."""


def check_machine(name: str, qemu: Executor) -> None:
    """Make sure that a machine cannot change saved memory, which other machines share.

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
            f"{name} has {found}. It can neither be saved with its memory nor run on memory that "
            "was saved: leave it out (launch_args), or let the machine boot"
        )


def check_command(
    name: str, qemu: Executor, command: str, arguments: Mapping[str, Any] | None
) -> None:
    """Raise KeptMemoryError if a QMP command adds such a device to a machine on saved memory."""
    words = json.dumps([command, dict(arguments or {})], default=str)
    if command in _COMMANDS and _DEVICES.search(words) and _is_on_kept_memory(qemu):
        raise KeptMemoryError(
            f"{name} runs on saved memory, which other machines share, and {command} would let it "
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
            return f"shared memory beside its own ({memory.get('id')}), which is not saved"
    return None


def _is_on_kept_memory(qemu: Executor) -> bool:
    def ask(name: str) -> Any:
        return qemu.execute("qom-get", {"path": f"/objects/{BACKEND}", "property": name})

    # Its own memory has no file, or is a shared mapping of one.
    return ask("type") == "memory-backend-file" and not ask("share")
