"""Where a boot goes no further by itself, as the serial console tells it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pycloudlib.diagnosis import Cause
from pycloudlib.guest.bootphases import begins_boot


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
