"""From a machine's description to QEMU's command line: a pure function."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pycloudlib.qemu.host.accelerator import SANDBOX, Accelerator, Features
from pycloudlib.qemu.host.resources import LOOPBACK
from pycloudlib.qemu.state.spec import MachineSpec
from pycloudlib.qemu.vm.memory import BACKEND, SHARED, Memory

# Bounds the memory of emulation's cache of translated code; the default is a quarter of the host's.
_TCG_CACHE_MIB = 256

HELPER_PORT = "org.pycloudlib.helper.0"
"""The name of the helper's port, by which the guest finds it in /dev/virtio-ports."""

SEED_NODE = "seed"
"""QEMU's name of the seed where a machine stops before it reads it."""


@dataclass(frozen=True, slots=True)
class Channels:
    """What connects us to QEMU: file descriptors it inherits, and the file of the console log.

    Attributes:
        control: A connected stream socket for our own QMP session.
        attach: A listening unix socket for the short sessions of other processes of ours.
        qmp: A listening unix socket for anybody's QMP session.
        console: A listening TCP socket for telnet to the serial console.
        helper: A listening unix socket that leads to the helper's port in the guest.
        memory: The file of memory to be shared; None for memory of another kind.
        console_log: The file that keeps the serial output.
    """

    control: int
    attach: int
    qmp: int
    console: int
    helper: int
    console_log: Path
    memory: int | None = None

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What QEMU inherits."""
        all_of_them = (self.control, self.attach, self.qmp, self.console, self.helper, self.memory)
        return tuple(number for number in all_of_them if number is not None)


@dataclass(frozen=True, slots=True)
class Origin:
    """What a QEMU begins with.

    Attributes:
        memory: The guest's memory.
        state: Descriptor of a stream, which QEMU inherits, that the machine's state comes from;
            None when the power is switched on.
        is_twin: Whether another QEMU runs this machine, and this one never does: it has no port.
        stops_at: The sector of the seed, of 512 bytes, before whose first read the machine stops;
            None for a machine that reads its seed.
    """

    memory: Memory = SHARED
    state: int | None = None
    is_twin: bool = False
    stops_at: int | None = None

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What QEMU inherits."""
        return () if self.state is None else (self.state,)


POWER_ON = Origin()


def build_command(
    binary: str,
    spec: MachineSpec,
    channels: Channels,
    features: Features,
    origin: Origin = POWER_ON,
) -> list[str]:
    """Build the command line.

    Args:
        binary: The QEMU binary.
        spec: The machine.
        channels: How we talk to it.
        features: What the binary can do.
        origin: What it begins with.
    """
    # fmt: off
    return [
        binary,
        "-name", f"guest={spec.name}",
        "-no-user-config", "-nodefaults",
        "-machine", f"pc,graphics=off,memory-backend={BACKEND}",
        "-accel", accel_option(spec.accelerator),
        "-cpu", spec.accelerator.cpu_model,
        "-smp", str(spec.instance_type.cpus),
        "-m", f"{spec.memory_kib}K",
        "-object", _memory(origin.memory, channels.memory, spec.memory_kib, features),
        "-display", "none",
        *(("-sandbox", SANDBOX) if features.sandbox else ()),
        "-chardev", f"socket,id=control,fd={channels.control}",
        "-mon", "chardev=control,mode=control",
        "-chardev", f"socket,id=attach,fd={channels.attach},server=on,wait=off",
        "-mon", "chardev=attach,mode=control",
        "-chardev", f"socket,id=qmp,fd={channels.qmp},server=on,wait=off",
        "-mon", "chardev=qmp,mode=control",
        "-chardev", (f"socket,id=console,fd={channels.console},telnet=on,server=on,wait=off,"
                     f"logfile={escape(channels.console_log)},logappend=on"),
        "-serial", "chardev:console",
        "-device", "virtio-rng-pci",
        # Tells a kernel (from 5.18 on) that goes on from a saved state to draw new random numbers.
        "-device", "vmgenid,guid=auto",
        "-device", "virtio-scsi-pci,id=scsi0",
        "-drive", (f"if=none,id=root,format=qcow2,cache=unsafe,discard=unmap,"
                   f"file={escape(spec.disk)}"),
        "-device", "scsi-hd,drive=root,bus=scsi0.0,bootindex=1",
        *_seed(spec.seed, origin.stops_at),
        "-netdev", "user,id=net0" + ("" if origin.is_twin else f",hostfwd={ssh_rule(spec)}"),
        # An empty romfile leaves out the network boot ROM, and the time it would take.
        "-device", f"virtio-net-pci,netdev=net0,mac={spec.mac},romfile=",
        # A port for the helper in the guest, which is there only when the machine is to be saved.
        "-device", "virtio-serial-pci",
        "-chardev", f"socket,id=helper,fd={channels.helper},server=on,wait=off",
        "-device", f"virtserialport,chardev=helper,name={HELPER_PORT}",
        *_kernel(spec),
        *(spec.launch_args if origin.state is None else _incoming(spec.launch_args)),
        *(["-S"] if origin.is_twin else []),
    ]
    # fmt: on


def _incoming(launch_args: tuple[str, ...]) -> list[str]:
    """Let QEMU wait for a state, which says whether the machine runs: `-S` would overrule it."""
    return [*(argument for argument in launch_args if argument != "-S"), "-incoming", "defer"]


def ssh_rule(spec: MachineSpec) -> str:
    """Give the rule by which user-mode networking forwards the SSH port to the guest."""
    return f"tcp:{LOOPBACK}:{spec.ssh_port}-:22"


def escape(path: Path) -> str:
    """Write a path as the value of an option: QEMU takes a doubled comma for one comma."""
    return str(path).replace(",", ",,")


def _memory(memory: Memory, shared: int | None, kibibytes: int, features: Features) -> str:
    """Return the backend of the memory."""
    common = f"id={BACKEND},size={kibibytes}K"
    if memory.file is not None:
        # Opened for reading, and mapped so that the guest can write to its own copy.
        kept = ",readonly=on,rom=off" if features.read_only_memory else ""
        return f"memory-backend-file,{common},share=off{kept},mem-path={escape(memory.file)}"
    if shared is not None:
        return f"memory-backend-file,{common},share=on,mem-path=/proc/self/fd/{shared}"
    return f"memory-backend-ram,{common}"


def accel_option(accelerator: Accelerator) -> str:
    """Give the value of `-accel`."""
    if accelerator is Accelerator.KVM:
        return "kvm"
    return f"tcg,thread=multi,tb-size={_TCG_CACHE_MIB}"


def _seed(seed: Path | None, stops_at: int | None) -> list[str]:
    if seed is None:
        return []
    if stops_at is None:
        # fmt: off
        return [
            "-drive", f"if=none,id=seed,format=raw,readonly=on,file={escape(seed)}",
            "-device", "virtio-blk-pci,drive=seed",
        ]
        # fmt: on
    # The read fails and is kept (`rerror=stop`), to be done again when the machine goes on: then
    # it is read of whatever volume is there.
    # Not as JSON, which has no words for a path that is no text.
    failing = (
        f"driver=blkdebug,node-name={SEED_NODE},read-only=on,"
        f"image.driver=file,image.read-only=on,image.filename={escape(seed)},"
        f"inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.sector={stops_at},"
        "inject-error.0.once=on,inject-error.0.errno=5"
    )
    return ["-blockdev", failing, "-device", f"virtio-blk-pci,drive={SEED_NODE},rerror=stop"]


def _kernel(spec: MachineSpec) -> list[str]:
    boot = spec.kernel_boot
    if boot is None:
        return []
    initrd = ["-initrd", str(boot.initrd)] if boot.initrd else []
    return ["-kernel", str(boot.kernel), *initrd, "-append", boot.cmdline]
