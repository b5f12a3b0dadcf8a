"""Lines of the serial console: which of them begin a boot, and which a phase of one."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

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
    """Say which phase a line of the console begins; None for most lines."""
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
