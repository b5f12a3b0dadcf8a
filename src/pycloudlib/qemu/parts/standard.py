"""The parts that every machine has, and those that most have: seed, and kernel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycloudlib.qemu.host.accelerator import SANDBOX, Accelerator
from pycloudlib.qemu.host.resources import LOOPBACK
from pycloudlib.qemu.parts.part import OwnDisk, Part, Start, TcpListener, UnixListener, escape

BACKEND = "ram0"
"""QEMU's name of a machine's memory, of one name for all kinds: by it a state is fitted to it."""

HELPER_PORT = "org.pycloudlib.helper.0"
"""The name of the helper's port, by which the guest finds it in /dev/virtio-ports."""

SEED_NODE = "seed"
"""QEMU's name of the seed where a machine stops before it reads it."""

DISK_BUS = "scsi0.0"
"""QEMU's name of the bus that the disks are on."""

# Bounds the memory of emulation's cache of translated code; the default is a quarter of the host's.
_TCG_CACHE_MIB = 256
# QEMU rounds a memory's length up to this.
_ODD_KIB = 8
# File names in the machine's directory.
CONSOLE_LOG = "console.log"
ATTACH_SOCKET = "attach-socket"
QMP_SOCKET = "qmp-socket"
HELPER_SOCKET = "helper-socket"
SEED_FILE = "seed.iso"


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
class Processor(Part):
    """Processors and memory.

    Attributes:
        size: How many, and how much.
        accelerator: How guest instructions are executed.
        without: The CPU features of the accelerator's model that it does not have, by QEMU's names.
    """

    size: InstanceType
    accelerator: Accelerator
    without: tuple[str, ...] = ()

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
        return self.size.memory_mib * 1024 + odd

    def arguments(self, start: Start) -> list[str]:
        # fmt: off
        return [
            "-machine", f"pc,graphics=off,memory-backend={BACKEND}",
            "-accel", accel_option(self.accelerator),
            "-cpu", self._model(start),
            "-smp", str(self.size.cpus),
            "-m", f"{self.memory_kib}K",
            "-object", self._memory(start),
        ]
        # fmt: on

    def _model(self, start: Start) -> str:
        """Return the CPU model. QEMU refuses to leave out a feature that it does not know."""
        left_out = [name for name in self.without if name in start.features.slow_features]
        return "".join((self.accelerator.cpu_model, *(f",-{name}" for name in left_out)))

    def _memory(self, start: Start) -> str:
        """Return the backend of the memory."""
        common = f"id={BACKEND},size={self.memory_kib}K"
        kept, shared = start.origin.memory.file, start.channels.memory
        if kept is not None:
            # Opened for reading, and mapped so that the guest can write to its own copy.
            how = ",readonly=on,rom=off" if start.features.read_only_memory else ""
            return f"memory-backend-file,{common},share=off{how},mem-path={escape(kept)}"
        if shared is not None:
            # QEMU maps a file wherever a small page can begin; KVM needs more for huge ones.
            where = ",align=2M" if self.accelerator is Accelerator.KVM else ""
            return f"memory-backend-file,{common},share=on{where},mem-path=/proc/self/fd/{shared}"
        return f"memory-backend-ram,{common}"

    def tell(self, disk: Path) -> Mapping[str, Any]:
        return {
            "cpus": self.size.cpus,
            "memory_mib": self.size.memory_mib,
            "accelerator": self.accelerator.value,
        }


def accel_option(accelerator: Accelerator) -> str:
    """Return the value of `-accel`."""
    if accelerator is Accelerator.KVM:
        return "kvm"
    return f"tcg,thread=multi,tb-size={_TCG_CACHE_MIB}"


@dataclass(frozen=True, slots=True)
class Board(Part):
    """What QEMU is controlled by, and confined to: three QMP monitors, no display, a sandbox."""

    def arguments(self, start: Start) -> list[str]:
        channels = start.channels
        # fmt: off
        return [
            "-display", "none",
            *(("-sandbox", SANDBOX) if start.features.sandbox else ()),
            "-chardev", f"socket,id=control,fd={channels.control}",
            "-mon", "chardev=control,mode=control",
            "-chardev", f"socket,id=attach,fd={channels.listeners['attach']},server=on,wait=off",
            "-mon", "chardev=attach,mode=control",
            "-chardev", f"socket,id=qmp,fd={channels.listeners['qmp']},server=on,wait=off",
            "-mon", "chardev=qmp,mode=control",
        ]
        # fmt: on

    @property
    def listeners(self) -> tuple[UnixListener | TcpListener, ...]:
        return UnixListener("attach", ATTACH_SOCKET), UnixListener("qmp", QMP_SOCKET)


@dataclass(frozen=True, slots=True)
class Console(Part):
    """The serial console: a telnet server, and a log.

    Attributes:
        port: The host's port of the telnet server.
    """

    port: int

    def arguments(self, start: Start) -> list[str]:
        socket = f"socket,id=console,fd={start.channels.listeners['console']}"
        log = escape(start.directory / CONSOLE_LOG)
        # fmt: off
        return [
            "-chardev", f"{socket},telnet=on,server=on,wait=off,logfile={log},logappend=on",
            "-serial", "chardev:console",
        ]
        # fmt: on

    @property
    def listeners(self) -> tuple[UnixListener | TcpListener, ...]:
        return (TcpListener("console", self.port),)

    def tell(self, disk: Path) -> Mapping[str, Any]:
        return {"telnet_port": self.port}


@dataclass(frozen=True, slots=True)
class RandomNumbers(Part):
    """Random numbers for the guest."""

    def arguments(self, start: Start) -> list[str]:
        # fmt: off
        return [
            "-device", "virtio-rng-pci",
            # Lets a kernel (from 5.18 on) that goes on from a saved state draw new numbers.
            "-device", "vmgenid,guid=auto",
        ]
        # fmt: on


@dataclass(frozen=True, slots=True)
class RootDisk(Part):
    """The disk that the machine boots from, and the bus that all its disks are on."""

    def arguments(self, start: Start) -> list[str]:
        file = escape(start.disk)
        # fmt: off
        return [
            "-device", "virtio-scsi-pci,id=scsi0",
            "-drive", f"if=none,id=root,format=qcow2,cache=unsafe,discard=unmap,file={file}",
            "-device", f"scsi-hd,drive=root,bus={DISK_BUS},bootindex=1",
        ]
        # fmt: on

    @property
    def disks(self) -> tuple[OwnDisk, ...]:
        return (ROOT,)


ROOT = OwnDisk("root")


@dataclass(frozen=True, slots=True)
class Seed(Part):
    """The volume by which cloud-init learns what the machine is to be.

    Attributes:
        file: The volume.
    """

    file: Path

    def arguments(self, start: Start) -> list[str]:
        if start.origin.stops_at is None:
            # fmt: off
            return [
                "-drive", f"if=none,id=seed,format=raw,readonly=on,file={escape(self.file)}",
                "-device", "virtio-blk-pci,drive=seed",
            ]
            # fmt: on
        # The read fails and is kept (`rerror=stop`), to be done again when the machine goes on:
        # then it is read of whatever volume is there.
        # Not as JSON, which has no words for a path that is no text.
        failing = (
            f"driver=blkdebug,node-name={SEED_NODE},read-only=on,"
            f"image.driver=file,image.read-only=on,image.filename={escape(self.file)},"
            "inject-error.0.event=none,inject-error.0.iotype=read,"
            f"inject-error.0.sector={start.origin.stops_at},"
            "inject-error.0.once=on,inject-error.0.errno=5"
        )
        return ["-blockdev", failing, "-device", f"virtio-blk-pci,drive={SEED_NODE},rerror=stop"]

    @property
    def kept_files(self) -> tuple[str, ...]:
        return (SEED_FILE,)


@dataclass(frozen=True, slots=True)
class Card(Part):
    """The network card, in a user-mode network from which the SSH port is forwarded.

    Attributes:
        mac: Its address.
        ssh_port: The host's port that leads to the guest's port 22.
    """

    mac: str
    ssh_port: int

    def arguments(self, start: Start) -> list[str]:
        rules = () if start.origin.is_twin else self.forwards
        # fmt: off
        return [
            "-netdev", "".join(("user,id=net0", *(f",hostfwd={rule}" for rule in rules))),
            # An empty romfile leaves out the network boot ROM, and the time it would take.
            "-device", f"virtio-net-pci,netdev=net0,mac={self.mac},romfile=",
        ]
        # fmt: on

    @property
    def forwards(self) -> tuple[str, ...]:
        return (f"tcp:{LOOPBACK}:{self.ssh_port}-:22",)

    def tell(self, disk: Path) -> Mapping[str, Any]:
        return {"ssh_port": self.ssh_port}


@dataclass(frozen=True, slots=True)
class HelperPort(Part):
    """A port for the helper in the guest, which is there only when the machine is to be saved."""

    def arguments(self, start: Start) -> list[str]:
        number = start.channels.listeners["helper"]
        # fmt: off
        return [
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=helper,fd={number},server=on,wait=off",
            "-device", f"virtserialport,chardev=helper,name={HELPER_PORT}",
        ]
        # fmt: on

    @property
    def listeners(self) -> tuple[UnixListener | TcpListener, ...]:
        return (UnixListener("helper", HELPER_SOCKET),)


@dataclass(frozen=True, slots=True)
class KernelBoot(Part):
    """A kernel that QEMU loads directly, past firmware and boot loader."""

    kernel: Path
    initrd: Path | None
    cmdline: str

    def arguments(self, start: Start) -> list[str]:
        initrd = ["-initrd", str(self.initrd)] if self.initrd else []
        return ["-kernel", str(self.kernel), *initrd, "-append", self.cmdline]

    @property
    def needs(self) -> tuple[Path, ...]:
        """The kernel, and the initrd if there is one."""
        return (self.kernel,) if self.initrd is None else (self.kernel, self.initrd)

    @property
    def start_obstacle(self) -> str | None:
        return "its kernel is booted directly, with a command line of its own"
