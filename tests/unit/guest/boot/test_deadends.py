"""Where a boot goes no further, told by the console."""

from __future__ import annotations

from pathlib import Path

import pytest

from pycloudlib.diagnosis import Cause
from pycloudlib.guest.boot.bootlines import find_sign
from pycloudlib.guest.boot.console import Console
from pycloudlib.guest.boot.readiness import BootWatch

FIRMWARE = "SeaBIOS (version 1.16.2-debian-1.16.2-1)"
KERNEL = "[    0.000000] Linux version 6.1.0-30-cloud-amd64 (debian-kernel@lists.debian.org)"
PANIC = (
    "[    7.104213] ---[ end Kernel panic - not syncing: VFS: Unable to mount root fs on "
    "unknown-block(0,0) ]---"
)


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("No bootable device.", Cause.NO_BOOTABLE_DISK),
        ("grub> ", Cause.BOOT_LOADER_PROMPT),
        ("grub rescue> ", Cause.BOOT_LOADER_PROMPT),
        (PANIC, Cause.KERNEL_PANIC),
        (
            "[    3.2] ---[ end Kernel panic - not syncing: System is deadlocked on memory ]---",
            Cause.GUEST_MEMORY,
        ),
        ("[  130.2] reboot: System halted", Cause.HALTED),
        ("(initramfs) ", Cause.EMERGENCY_SHELL),
        ("(initramfs) [   62.113] random: crng init done", Cause.EMERGENCY_SHELL),
        (
            'You are in emergency mode. After logging in, type "journalctl -xb"',
            Cause.EMERGENCY_SHELL,
        ),
        ("You are in rescue mode. After logging in", Cause.EMERGENCY_SHELL),
        ("Cannot open access to console, the root account is locked.", Cause.EMERGENCY_SHELL),
        ("Give root password for maintenance", Cause.EMERGENCY_SHELL),
    ],
)
def test_end_of_a_boot_is_told(line: str, cause: Cause) -> None:
    found = find_sign([FIRMWARE, "Booting from Hard Disk...", line], final=True)
    assert found is not None
    assert found[0].cause is cause
    assert found[1] == line


@pytest.mark.parametrize(
    "line",
    [
        "",
        "grub> is what its prompt looks like",
        "[    7.1] Kernel panic - not syncing: VFS: Unable to mount root fs",  # it boots again
        "user-data says: ---[ end Kernel panic - not syncing",
        "the (initramfs) prompt",
        "vm-1 login: ",
        "[   61.5] Out of memory: Killed process 812 (python3)",
        "cp: error writing '/x': No space left on device",
    ],
)
def test_other_lines_end_nothing(line: str) -> None:
    assert find_sign([FIRMWARE, KERNEL, line], final=True) is None


@pytest.mark.parametrize("begins", [FIRMWARE, KERNEL])
def test_earlier_boot_does_not_count(begins: str) -> None:
    assert find_sign([KERNEL, PANIC, begins, "Welcome to Debian"]) is None


def test_prompt_counts_only_as_the_last_line() -> None:
    assert find_sign([FIRMWARE, "grub> ", KERNEL], final=True) is None
    assert find_sign([FIRMWARE, "grub> ", "grub> "], final=True) is not None
    assert find_sign([KERNEL, "(initramfs) ", "[   62.1] usb 1-1: new"], final=True) is not None


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("[   61.5] Out of memory: Killed process 812 (python3)", Cause.GUEST_MEMORY),
        ("cp: error writing '/x': No space left on device", Cause.GUEST_DISK),
    ],
)
def test_what_does_not_end_a_boot_is_told_when_asked(line: str, cause: Cause) -> None:
    found = find_sign([KERNEL, line, "vm-1 login: "])
    assert found is not None
    assert found[0].cause is cause
    ending = find_sign([KERNEL, line, PANIC])
    assert ending is not None
    assert ending[0].cause is Cause.KERNEL_PANIC, "what ends it comes first"


def watch(log: Path) -> BootWatch:
    """Follow a log up to where it is now."""
    with BootWatch(Console(log), 0, 0.0) as followed:
        pass
    return followed


def told(watch: BootWatch) -> tuple[Cause, str] | None:
    """What ends a boot, and the line that tells."""
    found = watch.dead_end
    return None if found is None else (found.cause, found.line)


def test_watch_tells_of_it(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_text(f"{FIRMWARE}\n\x1b[2J{KERNEL}\n")
    assert watch(log).dead_end is None
    with log.open("a") as file:
        file.write(f"{PANIC}\r\n")
    assert told(watch(log)) == (Cause.KERNEL_PANIC, PANIC)


def test_watch_sees_a_prompt_whose_line_is_open(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_text(f"{KERNEL}\n\n(initramfs) ")
    assert told(watch(log)) == (Cause.EMERGENCY_SHELL, "(initramfs)")


def test_after_cloud_inits_end_nothing_ends_a_boot(tmp_path: Path) -> None:
    """What is on the console then is of programs that run."""
    log = tmp_path / "console.log"
    log.write_text(f"{KERNEL}\nCloud-init v. 22.4.2 finished at Mon\n(initramfs) ")
    assert watch(log).dead_end is None
