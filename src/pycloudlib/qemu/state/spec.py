"""Frozen values that describe a machine, parsed once at the edge."""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from pycloudlib._base.documents import decode, parse_json
from pycloudlib.qemu.host.accelerator import Accelerator
from pycloudlib.qemu.parts.furtherdisk import FurtherDisk
from pycloudlib.qemu.parts.part import OwnDisk, Part
from pycloudlib.qemu.parts.standard import (
    Board,
    Card,
    Console,
    HelperPort,
    InstanceType,
    KernelBoot,
    Processor,
    RandomNumbers,
    RootDisk,
    Seed,
)

DEFAULT_INSTANCE_TYPE = "c1m1500"
_HOSTNAME_LIMIT = 63  # RFC 1035: octets of a label
# The directories beside those of instances; see layers.py.
LAYERS = "layers"
SNAPSHOTS = "snapshots"
_RESERVED = (LAYERS, SNAPSHOTS)
# The fields of a description that tell apart machines which are alike otherwise.
_PLACES = ("name", "disk", "seed", "ssh_port", "telnet_port")
PLUGGED = ("disks",)
"""The fields of a description that change while the machine runs."""
# Only an initrd finds a file system by its label; without one the kernel wants a device.
_ROOT_BY_LABEL = "root=LABEL=cloudimg-rootfs ro"
_ROOT_BY_DEVICE = "root=/dev/sda1 ro"
_CONSOLE_DEFAULT = "console=tty1 console=ttyS0"


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """Everything that decides what machine QEMU makes, over all its power cycles.

    Attributes:
        name: The instance's name, and the guest's host name.
        instance_type: Processors and memory.
        accelerator: How guest instructions are executed.
        disk: The overlay that is the root disk.
        seed: The NoCloud volume; None without one.
        ssh_port: The host's port that is forwarded to the guest's port 22.
        telnet_port: The host's port of the serial console.
        mac: The network card's address.
        kernel_boot: The kernel to load directly; None to boot from the disk.
        launch_args: Further arguments for QEMU, from the caller.
        disks: Its disks beside the root disk.
        without: The CPU features that its processors do not have though they could; none of a
            machine that an older version described. A saved state needs the same ones again.
    """

    name: str
    instance_type: InstanceType
    accelerator: Accelerator
    disk: Path
    seed: Path | None
    ssh_port: int
    telnet_port: int
    mac: str
    kernel_boot: KernelBoot | None = None
    launch_args: tuple[str, ...] = ()
    disks: tuple[FurtherDisk, ...] = ()
    without: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """What the machine is made of, in the order of QEMU's command line.

        That order decides which machines saved before can be restored: new parts are added where
        they change nothing for a machine that has none.
        """
        return (
            self.processor,
            Board(),
            Console(self.telnet_port),
            RandomNumbers(),
            RootDisk(),
            *self.disks,
            *(() if self.seed is None else (Seed(self.seed),)),
            Card(self.mac, self.ssh_port),
            HelperPort(),
            *(() if self.kernel_boot is None else (self.kernel_boot,)),
        )

    def at_place_of(self, other: MachineSpec) -> MachineSpec:
        """Return this machine with the name, the ports, the disk and the seed of another."""
        return dataclasses.replace(self, **{name: getattr(other, name) for name in _PLACES})

    @property
    def own_disks(self) -> tuple[OwnDisk, ...]:
        """The disks of its parts, the root disk first."""
        return tuple(disk for part in self.parts for disk in part.disks)

    @property
    def kept_files(self) -> tuple[str, ...]:
        """The names of its parts' files that are kept with a saved machine."""
        return tuple(name for part in self.parts for name in part.kept_files)

    @property
    def processor(self) -> Processor:
        """Its processors and memory."""
        return Processor(self.instance_type, self.accelerator, self.without)

    @property
    def memory_kib(self) -> int:
        """KiB of memory; see `Processor`."""
        return self.processor.memory_kib

    def to_json(self) -> str:
        """Return it as text, for the run directory."""
        return json.dumps(dataclasses.asdict(self), default=_plain, indent=1)

    @classmethod
    def from_json(cls, text: str) -> MachineSpec:
        """Parse what `to_json` returned; raise ValueError, which says what is wrong, for others."""
        return decode(cls, parse_json(text))


def _plain(value: object) -> str:
    return str(value.value) if isinstance(value, Accelerator) else str(value)


def make_name(tag: str) -> str:
    """Make an instance's name from its cloud's tag: short enough for a host name, and unique."""
    suffix = secrets.token_hex(4)
    return f"{tag[: _HOSTNAME_LIMIT - len(suffix) - 1].rstrip('-')}-{suffix}"


def check_name(name: str) -> str:
    """Return a name that was chosen for an instance, which has to be a host name, too.

    Raises:
        TypeError: It is no text.
        ValueError: It cannot be an instance's name; says what can.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a text, not {name!r}")
    if not re.fullmatch(r"(?!-)[a-z0-9-]{1,63}(?<!-)", name):
        raise ValueError(
            f"name is {name!r}, expected a host name: 1 to 63 characters of a-z, 0-9 and '-', "
            "none of these last at either end"
        )
    if not may_be_machine(name):
        raise ValueError(f"name is {name!r}, which clouds call a directory of theirs; take another")
    return name


def may_be_machine(directory: str) -> bool:
    """Whether a directory of this name, in a cloud's, is a machine's and not the cloud's own.

    Hidden files are the cloud's, too: its keys, and what is not finished.
    """
    return directory not in _RESERVED and not directory.startswith(".")


def make_mac() -> str:
    """Make a network card's address in QEMU's own range."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))


def complete_cmdline(cmdline: str, *, has_initrd: bool = True) -> str:
    """Add a root file system and a serial console to a kernel command line that lacks them."""
    words = cmdline.split()
    parts = [cmdline.strip()]
    if not any(word.startswith("root=") for word in words):
        parts.append(_ROOT_BY_LABEL if has_initrd else _ROOT_BY_DEVICE)
    if not any(word.startswith("console=") for word in words):
        parts.append(_CONSOLE_DEFAULT)
    return " ".join(filter(None, parts))
