"""Where the present boot begins on a console, when the guest has rebooted by itself, too."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pycloudlib.guest.boot.bootlines import Phase
from pycloudlib.guest.boot.console import Console
from pycloudlib.guest.boot.readiness import BootWatch

FIRMWARE = b"\x1bc\x1b[2JSeaBIOS (version 1.16.2-debian-1.16.2-1)\r\n"
KERNEL = b"[    0.000000] Linux version 6.1.0-13-amd64 (debian-kernel@lists.debian.org)\r\n"
BOOT = FIRMWARE + b"GRUB loading.\r\n" + KERNEL + b"Welcome to Debian!\r\n"
# What user-data prints of a boot, as systemd forwards it to the console.
PRINTED = b"".join(
    b"[   65.123456] cloud-init[700]: " + line
    for line in (KERNEL, b"SeaBIOS (version 1.16.2)\r\n", KERNEL)
)
DONE = b"Cloud-init v. 22.4.2 finished at Mon\r\nvm login: "


@pytest.mark.parametrize(
    ("before", "present"),
    [
        (b"", BOOT + DONE),
        (BOOT + DONE, BOOT),
        (BOOT + DONE + BOOT, BOOT + DONE),
        (BOOT + DONE, KERNEL + DONE),
        (BOOT + KERNEL, KERNEL),
        (b"", KERNEL + DONE),
        (KERNEL + DONE, KERNEL),
        (KERNEL + DONE, FIRMWARE),
    ],
    ids=[
        "one", "second", "third", "kexec", "kexec twice", "silent firmware",
        "silent firmware and kexec", "just begun",
    ],
)  # fmt: skip
@pytest.mark.parametrize("run_start", [0, 1000])
@pytest.mark.parametrize("step", [1, 7, 100_000])
def test_present_boot_is_found_however_the_console_grows(
    before: bytes, present: bytes, run_start: int, step: int, tmp_path: Path
) -> None:
    log = tmp_path / "console.log"
    console = Console(log, lambda: run_start)
    assert console.look().boot_start == run_start
    content = b"x" * run_start + before + present
    for end in range(run_start, len(content) + step, step):
        log.write_bytes(content[:end])
        found = console.look().boot_start
    # The escape codes before the firmware's first line belong to nobody.
    first = present.removeprefix(b"\x1bc\x1b[2J")
    expected = len(content) - len(first)
    if not before and present.startswith(KERNEL):
        expected = run_start
    assert found == expected


@pytest.mark.parametrize(
    ("console", "boots"),
    [
        (b"", 1),
        (b"\r\n" * 100, 1),
        (BOOT + DONE, 1),
        (KERNEL + DONE, 1),
        ((BOOT + DONE) * 3, 3),
        (BOOT + KERNEL + FIRMWARE, 3),
        # One that went on from a saved machine.
        (DONE, 1),
        (b"\r\n" * 100 + DONE + (BOOT + DONE) * 2, 3),
        (b"x" * 100 + FIRMWARE, 2),
        (BOOT + PRINTED + DONE, 1),
        (BOOT + PRINTED + FIRMWARE, 2),
    ],
)
@pytest.mark.parametrize("step", [1, 7, 100_000])
def test_boots_are_counted(console: bytes, boots: int, step: int, tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    before = BOOT + DONE
    own, both = Console(log, lambda: len(before)), Console(log)
    assert own.look().boots == 1
    for end in range(0, len(console) + step, step):
        log.write_bytes(before + console[:end])
        count = own.look().boots
    assert count == boots
    if console.startswith(BOOT):
        assert both.look().boots == boots + 1


def test_boots_of_an_earlier_run_do_not_count(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_bytes(BOOT + DONE + BOOT)
    start = len(BOOT + DONE + BOOT)
    console = Console(log, lambda: start)
    assert console.look().boot_start == start
    start = 0
    assert console.look().boot_start == len(BOOT + DONE) + BOOT.index(b"SeaBIOS")


def test_watch_goes_on_where_user_data_prints_of_a_boot(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    final = b"Cloud-init v. 22.4.2 running 'modules:final' at Mon\r\n"
    log.write_bytes(BOOT + final + PRINTED)
    with BootWatch(Console(log), 0, time.monotonic()) as watch:
        pass
    assert watch.phase is Phase.CLOUD_INIT_FINAL
    assert watch.timeline[0].phase is Phase.FIRMWARE
    assert len(watch.timeline) == 5


def test_watch_begins_anew_with_a_boot_of_the_guests_own(tmp_path: Path) -> None:
    """Nothing of the boot before counts: not its end, not what it died of."""
    log = tmp_path / "console.log"
    log.write_bytes(BOOT + DONE)
    with BootWatch(Console(log), 0, time.monotonic()) as watch:
        pass
    assert watch.phase is Phase.CLOUD_INIT_DONE
    panic = (
        b"[    1.0] Kernel panic - not syncing: VFS\r\n---[ end Kernel panic - not syncing ]---\r\n"
    )
    log.write_bytes(BOOT + DONE + BOOT + panic + BOOT)
    with BootWatch(Console(log), 0, time.monotonic()) as watch:
        pass
    assert watch.phase is Phase.SYSTEMD
    assert watch.dead_end is None
    assert [start.phase for start in watch.timeline] == [
        Phase.FIRMWARE, Phase.BOOT_LOADER, Phase.KERNEL, Phase.SYSTEMD,
    ]  # fmt: skip
