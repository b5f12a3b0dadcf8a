"""From a machine's description to QEMU's command line: a pure function."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pycloudlib.qemu.accelerator import Accelerator
from pycloudlib.qemu.spec import MachineSpec

# Bounds the memory of emulation's cache of translated code; the default is a quarter of the host's.
_TCG_CACHE_MIB = 256

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True, slots=True)
class Features:
    """What a QEMU build can do, as it says itself."""

    sandbox: bool = True


@dataclass(frozen=True, slots=True)
class Channels:
    """What connects us to QEMU: file descriptors it inherits, and the file of the console log.

    Attributes:
        control: A connected stream socket for our own QMP session.
        attach: A listening unix socket for the short sessions of other processes of ours.
        qmp: A listening unix socket for anybody's QMP session.
        console: A listening TCP socket for telnet to the serial console.
        console_log: The file that keeps the serial output.
    """

    control: int
    attach: int
    qmp: int
    console: int
    console_log: Path

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What QEMU inherits."""
        return (self.control, self.attach, self.qmp, self.console)


def build_command(
    binary: str, spec: MachineSpec, channels: Channels, features: Features
) -> list[str]:
    """Build the command line.

    Args:
        binary: The QEMU binary.
        spec: The machine.
        channels: How we talk to it.
        features: What the binary can do.
    """
    # fmt: off
    return [
        binary,
        "-name", f"guest={spec.name}",
        "-no-user-config", "-nodefaults",
        "-machine", "pc,graphics=off",
        "-accel", _accel(spec.accelerator),
        "-cpu", spec.accelerator.cpu_model,
        "-smp", str(spec.instance_type.cpus),
        "-m", f"{spec.instance_type.memory_mib}M",
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
        "-device", "virtio-scsi-pci,id=scsi0",
        "-drive", (f"if=none,id=root,format=qcow2,cache=unsafe,discard=unmap,"
                   f"file={escape(spec.disk)}"),
        "-device", "scsi-hd,drive=root,bus=scsi0.0,bootindex=1",
        *_seed(spec.seed),
        "-netdev", f"user,id=net0,hostfwd=tcp:127.0.0.1:{spec.ssh_port}-:22",
        # An empty romfile leaves out the network boot ROM, and the time it would take.
        "-device", f"virtio-net-pci,netdev=net0,mac={spec.mac},romfile=",
        *_kernel(spec),
        *spec.launch_args,
    ]
    # fmt: on


def escape(path: Path) -> str:
    """Write a path as the value of an option: QEMU takes a doubled comma for one comma."""
    return str(path).replace(",", ",,")


def _accel(accelerator: Accelerator) -> str:
    if accelerator is Accelerator.KVM:
        return "kvm"
    return f"tcg,thread=multi,tb-size={_TCG_CACHE_MIB}"


def _seed(seed: Path | None) -> list[str]:
    if seed is None:
        return []
    # fmt: off
    return [
        "-drive", f"if=none,id=seed,format=raw,readonly=on,file={escape(seed)}",
        "-device", "virtio-blk-pci,drive=seed",
    ]
    # fmt: on


def _kernel(spec: MachineSpec) -> list[str]:
    boot = spec.kernel_boot
    if boot is None:
        return []
    initrd = ["-initrd", str(boot.initrd)] if boot.initrd else []
    return ["-kernel", str(boot.kernel), *initrd, "-append", boot.cmdline]
