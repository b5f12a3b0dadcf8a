"""Lines of the console that begin a boot or one of its phases, and lines that end a boot."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pycloudlib.diagnosis import Cause

# Colours and cursor movements, which systemd and firmware print, and commands to the terminal
# (ECMA-48, 5.6; systemd from 256 on begins the output of a service with some).
_CONTROL = re.compile(
    rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|[PX\]^_][^\x07\x1b]*(?:\x07|\x1b\\)|[()][0-9AB]|c)"
    rb"|[\x00-\x08\x0b-\x1f\x7f]"
)

# The firmware's first line, or that of a kernel started by another one (kexec); not a quotation in
# a service's output: cloud-init[700]: [    0.000000] Linux version
_KERNEL_STARTS = rb"\[ {1,8}0\.0{6}\] Linux version "
BOOT_STARTS = re.compile(
    rb"(?<!\]: )(?:SeaBIOS \(version |BdsDxe: loading |" + _KERNEL_STARTS + rb")"
)
"""Begins a boot: what was before belongs to another boot."""
_BOOT_STARTS_IN_TEXT = re.compile(BOOT_STARTS.pattern.decode())

# Limited, since long output may begin like this many times.
_CLOUD_INIT = rb"Cloud-init v\. .{1,100} "


@enum.unique
class Phase(enum.Enum):
    """What a machine does between power-on and ready, in order."""

    FIRMWARE = "firmware"
    BOOT_LOADER = "boot loader"
    KERNEL = "kernel"
    INITRD = "initrd"
    SYSTEMD = "systemd"
    CLOUD_INIT_LOCAL = "cloud-init local"
    CLOUD_INIT_NETWORK = "cloud-init network"
    CLOUD_INIT_CONFIG = "cloud-init config"
    CLOUD_INIT_FINAL = "cloud-init final"
    CLOUD_INIT_DONE = "cloud-init done"


ORDER = {phase: number for number, phase in enumerate(Phase)}
"""Which phase comes after which."""

_SIGNS: tuple[tuple[Phase, re.Pattern[bytes]], ...] = (
    (Phase.FIRMWARE, re.compile(rb"SeaBIOS|BdsDxe|UEFI")),
    (Phase.BOOT_LOADER, re.compile(rb"GRUB|Welcome to GRUB|Booting `")),
    (Phase.KERNEL, re.compile(rb"Linux version |Run /init as init")),
    (Phase.INITRD, re.compile(rb"Begin: Loading essential drivers|Loading, please wait")),
    # To its end: a line is matched before it is complete, and GRUB welcomes, too.
    (Phase.SYSTEMD, re.compile(rb"systemd\[1\]: |Welcome to .{1,200}!")),
    (Phase.CLOUD_INIT_LOCAL, re.compile(_CLOUD_INIT + rb"running 'init-local'")),
    (Phase.CLOUD_INIT_NETWORK, re.compile(_CLOUD_INIT + rb"running 'init'")),
    (Phase.CLOUD_INIT_CONFIG, re.compile(_CLOUD_INIT + rb"running 'modules:config'")),
    (Phase.CLOUD_INIT_FINAL, re.compile(_CLOUD_INIT + rb"running 'modules:final'")),
    (Phase.CLOUD_INIT_DONE, re.compile(_CLOUD_INIT + rb"finished at")),
)


def find_phase(line: bytes) -> Phase | None:
    """Return the phase that a line of the console begins; None for most lines."""
    return next((phase for phase, sign in _SIGNS if sign.search(line)), None)


def clean_line(line: bytes) -> str:
    """Return a line of the console as text, without control sequences."""
    return _CONTROL.sub(b"", line).decode(errors="replace").strip()


def is_kernels_start(marker: bytes) -> bool:
    """Whether what `BOOT_STARTS` has found is a kernel's first line, and not the firmware's."""
    return marker.startswith(b"[")


def begins_boot(text: str) -> bool:
    """Whether a boot begins in a line, given without control sequences."""
    return _BOOT_STARTS_IN_TEXT.search(text) is not None


@dataclass(frozen=True, slots=True)
class PhaseStart:
    """When a phase was first seen.

    Attributes:
        phase: Which.
        seconds: Seconds after the power was switched on.
    """

    phase: Phase
    seconds: float


@dataclass(frozen=True, slots=True)
class Sign:
    """A line of the console that shows a cause.

    Attributes:
        cause: The cause.
        pattern: The line.
        final: Whether the boot ends with it, so that waiting is useless.
        prompt: Whether it is a prompt, which counts only as the last line, except for lines of the
            kernel.
    """

    cause: Cause
    pattern: re.Pattern[str]
    final: bool = True
    prompt: bool = False

    @property
    def kernels(self) -> bool:
        """Whether the kernel prints it, which may happen at any time."""
        return self.pattern.pattern.startswith(_KERNEL)


def _sign(cause: Cause, pattern: str, *, final: bool = True, prompt: bool = False) -> Sign:
    return Sign(cause, re.compile(pattern), final, prompt)


# With a time stamp, as the kernel prints it, and not a quotation by user-data.
_KERNEL = r"^\[ *\d+\.\d+\] "
# kernel/panic.c: printed if the kernel does not reboot by itself (panic=).
_PANIC = _KERNEL + r"---\[ end Kernel panic"
SIGNS = (
    # SeaBIOS (src/boot.c).
    _sign(Cause.NO_BOOTABLE_DISK, r"^No bootable device\."),
    _sign(Cause.BOOT_LOADER_PROMPT, r"^grub( rescue)?> *$", prompt=True),
    _sign(Cause.GUEST_MEMORY, _PANIC + r" .*(?i:out of memory|deadlocked on)"),
    _sign(Cause.KERNEL_PANIC, _PANIC),
    # kernel/reboot.c: it is not powered off, and does nothing more.
    _sign(Cause.HALTED, _KERNEL + r"reboot: System halted"),
    # initramfs-tools (scripts/functions, panic()).
    _sign(Cause.EMERGENCY_SHELL, r"^\(initramfs\) *(?:\[ *\d+\.\d+\] .*)?$", prompt=True),
    # systemd (units/emergency.service.in, rescue.service.in), and util-linux's sulogin.
    _sign(Cause.EMERGENCY_SHELL, r"^You are in (emergency|rescue) mode\."),
    _sign(Cause.EMERGENCY_SHELL, r"Cannot open access to console, the root account is locked"),
    _sign(
        Cause.EMERGENCY_SHELL, r"^(Give root password for maintenance|Press Enter for maintenance)"
    ),
    # mm/oom_kill.c
    _sign(Cause.GUEST_MEMORY, _KERNEL + r"Out of memory: Killed process", final=False),
    _sign(Cause.GUEST_DISK, r"No space left on device", final=False),
)
_BY_KERNEL = re.compile(_KERNEL)
# The first line of a failing kernel (BUG, Oops, an exception; kernel/panic.c, and of x86
# arch/x86/kernel/dumpstack.c and traps.c). Screens of registers and addresses follow.
_FAILURE = re.compile(
    _KERNEL + r"(?:BUG: |Oops: |[Uu]nable to handle |general protection fault|double fault|"
    r"stack segment|invalid opcode|int3|traps: |kernel BUG at |Kernel panic - not syncing)"
)


def find_sign(
    lines: Sequence[str], *, final: bool = False, kernels: bool = False
) -> tuple[Sign, str] | None:
    """Find the sign and its line in the latest boot on a console; those that end it come first.

    Args:
        lines: The console's lines, without control sequences; the last one may be incomplete.
        final: Whether to look only for signs that end the boot.
        kernels: Whether to look only for lines of the kernel.
    """
    boot = list(_latest_boot(lines))
    waiting = [line for line in boot if not is_by_kernel(line)][-1:]
    for sign in SIGNS:
        if (final and not sign.final) or (kernels and not sign.kernels):
            continue
        for line in waiting if sign.prompt else boot:
            if sign.pattern.search(line):
                return sign, line
    return None


def find_kernel_failure(lines: Sequence[str]) -> int | None:
    """Return the number of the line in which the latest boot's kernel fails; None if it did not."""
    failed = None
    for number, line in enumerate(lines):
        if begins_boot(line):
            failed = None
        elif failed is None and begins_failure(line):
            failed = number
    return failed


def begins_failure(line: str) -> bool:
    """Whether a line is the first one of a failing kernel."""
    return _FAILURE.search(line) is not None


def is_by_kernel(line: str) -> bool:
    """Whether a line is the kernel's, which may print while a prompt waits for input."""
    return _BY_KERNEL.match(line) is not None


def _latest_boot(lines: Sequence[str]) -> Iterator[str]:
    begins = [number for number, line in enumerate(lines) if begins_boot(line)]
    return (line for line in lines[begins[-1] if begins else 0 :] if line)
