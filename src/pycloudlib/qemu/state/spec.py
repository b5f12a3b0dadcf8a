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

DEFAULT_INSTANCE_TYPE = "c1m1500"
_HOSTNAME_LIMIT = 63  # RFC 1035: octets of a label
# What stands beside the directories of instances; see layers.py.
LAYERS = "layers"
SNAPSHOTS = "snapshots"
_RESERVED = (LAYERS, SNAPSHOTS)
# Only an initrd finds a file system by its label; without one the kernel wants a device.
_ROOT_BY_LABEL = "root=LABEL=cloudimg-rootfs ro"
_ROOT_BY_DEVICE = "root=/dev/sda1 ro"
# QEMU rounds a memory's length up to this.
_ODD_KIB = 8
_CONSOLE_DEFAULT = "console=tty1 console=ttyS0"


@dataclass(frozen=True, slots=True)
class InstanceType:
    """The size of a machine.

    Attributes:
        cpus: Number of virtual processors.
        memory_mib: Memory in MiB.
    """

    cpus: int
    memory_mib: int

    @classmethod
    def parse(cls, text: str) -> InstanceType:
        """Read `c<cpus>m<MiB>`.

        Raises:
            ValueError: It is something else, or a size that no machine can have.
        """
        match = re.fullmatch(r"c([0-9]{1,3})m([0-9]{1,8})", text) if isinstance(text, str) else None
        if match is None or min(map(int, match.groups())) < 1:
            raise ValueError(
                f"instance_type is {text!r}, expected c<cpus>m<MiB of memory>, such as 'c2m2048'"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"c{self.cpus}m{self.memory_mib}"


@dataclass(frozen=True, slots=True)
class KernelBoot:
    """A kernel that QEMU loads directly, past firmware and boot loader."""

    kernel: Path
    initrd: Path | None
    cmdline: str

    @property
    def files(self) -> tuple[Path, ...]:
        """The kernel, and the initrd if there is one."""
        return (self.kernel,) if self.initrd is None else (self.kernel, self.initrd)


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """Everything that decides what machine QEMU makes, over all its power cycles.

    Attributes:
        name: The instance's name, and the guest's host name.
        instance_type: Processors and memory.
        accelerator: How guest instructions are executed.
        disk: The overlay that is the root disk.
        seed: The NoCloud volume; None without one.
        ssh_port: The host's port that leads to the guest's port 22.
        telnet_port: The host's port of the serial console.
        mac: The network card's address.
        kernel_boot: The kernel to load directly; None to boot from the disk.
        launch_args: Further arguments for QEMU, from the caller.
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

    @property
    def memory_kib(self) -> int:
        """KiB of memory: in emulation a little more than asked for.

        The two pages more stay so that machines that were saved before still fit: a state fits a
        memory of its own length alone. They were for guests whose memory is migrated while they
        run, which none is any more: before version 9.0, QEMU in emulation loses track of pages that
        are written to meanwhile, if the length is a multiple of 64 pages ("physmem: Fix migration
        dirty bitmap coherency with TCG memory access").
        """
        odd = _ODD_KIB if self.accelerator is Accelerator.TCG else 0
        return self.instance_type.memory_mib * 1024 + odd

    def to_json(self) -> str:
        """Write it as text, for the run directory."""
        return json.dumps(dataclasses.asdict(self), default=_plain, indent=1)

    @classmethod
    def from_json(cls, text: str) -> MachineSpec:
        """Read what `to_json` wrote.

        Raises:
            ValueError: It is something else; says in what.
        """
        return decode(cls, parse_json(text))


def _plain(value: object) -> str:
    return str(value.value) if isinstance(value, Accelerator) else str(value)


def make_name(tag: str) -> str:
    """Make an instance's name from its cloud's tag: short enough for a host name, and unique."""
    suffix = secrets.token_hex(4)
    return f"{tag[: _HOSTNAME_LIMIT - len(suffix) - 1].rstrip('-')}-{suffix}"


def check_name(name: str) -> str:
    """Make sure that a name that was chosen for an instance can be one: it is a host name, too.

    Raises:
        TypeError: It is no text.
        ValueError: It cannot be one; says what can.
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
    """Whether a directory of this name, in a cloud's, is a machine's: all but those of the cloud.

    What is hidden is a cloud's, too: its keys, and what is not finished.
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
