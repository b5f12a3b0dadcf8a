"""A kernel's last words on the console."""

from __future__ import annotations

from pathlib import Path

import pytest

from pycloudlib.diagnosis import Cause
from pycloudlib.guest.panics import PanicWatch

BOOT = b"SeaBIOS (version 1.16)\r\n[    0.000000] Linux version 6.1.0\r\nvm login: "
OOPS = (
    b"\r\n[   44.1] Kernel panic - not syncing: sysrq triggered crash\r\n[   44.2] Call Trace:\r\n"
)
LAST = b"[   44.3] ---[ end Kernel panic - not syncing: sysrq triggered crash ]---\r\n"
LAST_TEXT = "[   44.3] ---[ end Kernel panic - not syncing: sysrq triggered crash ]---"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "console.log"


def test_console_that_is_not_there_tells_nothing(log: Path) -> None:
    assert PanicWatch(log).look(0) is None


def test_last_words_are_seen_when_they_come(log: Path) -> None:
    watch = PanicWatch(log)
    log.write_bytes(BOOT)
    assert watch.look(0) is None
    log.write_bytes(BOOT + OOPS)
    assert watch.look(0) is None, "it may boot again by itself still"
    log.write_bytes(BOOT + OOPS + LAST)
    assert watch.look(0) == (Cause.KERNEL_PANIC, LAST_TEXT)
    assert watch.look(0) == (Cause.KERNEL_PANIC, LAST_TEXT)


def test_want_of_memory_is_told_apart(log: Path) -> None:
    log.write_bytes(BOOT + b"\n[ 1.0] ---[ end Kernel panic - not syncing: Out of memory ]---\n")

    found = PanicWatch(log).look(0)

    assert found is not None
    assert found[0] is Cause.GUEST_MEMORY


def test_boot_that_followed_makes_it_forgotten(log: Path) -> None:
    log.write_bytes(BOOT + OOPS + LAST + BOOT)

    assert PanicWatch(log).look(0) is None


def test_run_that_followed_makes_it_forgotten(log: Path) -> None:
    before = BOOT + OOPS + LAST
    log.write_bytes(before)
    watch = PanicWatch(log)
    assert watch.look(0) is not None

    assert watch.look(len(before)) is None
    log.write_bytes(before + b"a line of a machine that was taken back\r\n")
    assert watch.look(len(before)) is None


def test_words_of_programs_are_none_of_a_kernel(log: Path) -> None:
    log.write_bytes(BOOT + b"\r\nwhat ---[ end Kernel panic means\r\n")

    assert PanicWatch(log).look(0) is None


def test_much_that_was_printed_before_is_not_read(log: Path) -> None:
    log.write_bytes(BOOT + b"x" * 200_000 + OOPS + LAST)

    assert PanicWatch(log).look(0) == (Cause.KERNEL_PANIC, LAST_TEXT)
