"""Lines of the console that begin a boot or a phase of one, and those at which a boot ends."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pycloudlib.diagnosis import Cause

# Colours and cursor movements, which systemd and firmware print, and what is for the terminal alone
# (ECMA-48, 5.6; systemd from 256 on begins the output of a service so: its palette, who speaks).
_CONTROL = re.compile(
    rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|[PX\]^_][^\x07\x1b]*(?:\x07|\x1b\\)|[()][0-9AB]|c)"
    rb"|[\x00-\x08\x0b-\x1f\x7f]"
)

# The firmware's first line, or that of a kernel that another one started (kexec); not what a
# service prints of one, as systemd forwards it: cloud-init[700]: [    0.000000] Linux version
_KERNEL_STARTS = rb"\[ {1,8}0\.0{6}\] Linux version "
BOOT_STARTS = re.compile(
    rb"(?<!\]: )(?:SeaBIOS \(version |BdsDxe: loading |" + _KERNEL_STARTS + rb")"
)
"""With one of these a boot begins: what was before is another boot's."""
_BOOT_STARTS_IN_TEXT = re.compile(BOOT_STARTS.pattern.decode())


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


# Its version is short: what is printed may be long, and begin in this manner many times.
_CLOUD_INIT = rb"Cloud-init v\. .{1,100} "

ORDER = {phase: number for number, phase in enumerate(Phase)}
"""Which phase comes after which."""

_SIGNS: tuple[tuple[Phase, re.Pattern[bytes]], ...] = (
    (Phase.FIRMWARE, re.compile(rb"SeaBIOS|BdsDxe|UEFI")),
    (Phase.BOOT_LOADER, re.compile(rb"GRUB|Welcome to GRUB|Booting `")),
    (Phase.KERNEL, re.compile(rb"Linux version |Run /init as init")),
    (Phase.INITRD, re.compile(rb"Begin: Loading essential drivers|Loading, please wait")),
    # To its end: a line is looked at before it is whole, and GRUB welcomes too.
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
    """A line of the console, and what it tells.

    Attributes:
        cause: What.
        pattern: The line.
        final: Whether nothing more comes after it: who waits for the machine need not any more.
        prompt: Whether it is one that is waited at: only the last line of all can be that, but for
            what the kernel says of itself meanwhile.
    """

    cause: Cause
    pattern: re.Pattern[str]
    final: bool = True
    prompt: bool = False

    @property
    def kernels(self) -> bool:
        """Whether it is the kernel's own word, which may come at any time."""
        return self.pattern.pattern.startswith(_KERNEL)


def _sign(cause: Cause, pattern: str, *, final: bool = True, prompt: bool = False) -> Sign:
    return Sign(cause, re.compile(pattern), final, prompt)


# With a time stamp, what the kernel prints, and not what user-data prints that tells of it.
_KERNEL = r"^\[ *\d+\.\d+\] "
# kernel/panic.c: printed when it does not boot again by itself (panic=).
_PANIC = _KERNEL + r"---\[ end Kernel panic"
SIGNS = (
    # SeaBIOS (src/boot.c).
    _sign(Cause.NO_BOOTABLE_DISK, r"^No bootable device\."),
    _sign(Cause.BOOT_LOADER_PROMPT, r"^grub( rescue)?> *$", prompt=True),
    _sign(Cause.GUEST_MEMORY, _PANIC + r" .*(?i:out of memory|deadlocked on)"),
    _sign(Cause.KERNEL_PANIC, _PANIC),
    # kernel/reboot.c: it is not switched off, and does nothing more.
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
# What a kernel says first of all when it fails (BUG, Oops, an exception; kernel/panic.c, and of x86
# arch/x86/kernel/dumpstack.c and traps.c). Registers and addresses follow, screens of them.
_FAILURE = re.compile(
    _KERNEL + r"(?:BUG: |Oops: |[Uu]nable to handle |general protection fault|double fault|"
    r"stack segment|invalid opcode|int3|traps: |kernel BUG at |Kernel panic - not syncing)"
)


def find_sign(
    lines: Sequence[str], *, final: bool = False, kernels: bool = False
) -> tuple[Sign, str] | None:
    """Find what the latest boot on a console tells; what ends the boot before all else.

    Args:
        lines: The console's lines, without control sequences; the last one may be unfinished.
        final: Whether to look only for what ends it.
        kernels: Whether to look only for what the kernel itself says.
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
    """Return the number of the line in which the latest boot's kernel begins to say why it failed.

    None where it did not fail.
    """
    failed = None
    for number, line in enumerate(lines):
        if begins_boot(line):
            failed = None
        elif failed is None and begins_failure(line):
            failed = number
    return failed


def begins_failure(line: str) -> bool:
    """Whether a kernel begins to say in a line why it fails."""
    return _FAILURE.search(line) is not None


def is_by_kernel(line: str) -> bool:
    """Whether a line is the kernel's, which may speak while others wait for input."""
    return _BY_KERNEL.match(line) is not None


def _latest_boot(lines: Sequence[str]) -> Iterator[str]:
    begins = [number for number, line in enumerate(lines) if begins_boot(line)]
    return (line for line in lines[begins[-1] if begins else 0 :] if line)
