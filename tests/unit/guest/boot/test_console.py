"""The console's log: read bit by bit, in bounded memory, whatever is in it and happens to it."""

from __future__ import annotations

import os
import threading
import time
import tracemalloc
from pathlib import Path

import pytest

from pycloudlib.cli import reports
from pycloudlib.diagnosis import Cause
from pycloudlib.guest.boot.bootlines import Phase
from pycloudlib.guest.boot.console import Console, find_last_lines
from tests.pythonlocks import holding_locks

FIRMWARE = b"\x1bc\x1b[2JSeaBIOS (version 1.16.2-debian-1.16.2-1)\r\n"
KERNEL = b"[    0.000000] Linux version 6.1.0-13-amd64 (debian-kernel@lists.debian.org)\r\n"
BOOT = FIRMWARE + KERNEL + b"Welcome to Debian!\r\n"
FINAL = b"Cloud-init v. 22.4.2 running 'modules:final' at Mon\r\n"
DONE = b"Cloud-init v. 22.4.2 finished at Mon\r\nvm login: "
LAST_WORDS = b"[   44.3] ---[ end Kernel panic - not syncing: sysrq triggered crash ]---\r\n"
PANIC = (
    b"\r\n[   44.1] BUG: kernel NULL pointer dereference\r\n[   44.2] Call Trace:\r\n" + LAST_WORDS
)
EMERGENCY = b"You are in emergency mode.\r\n"
OUT_OF_MEMORY = b"[   61.5] Out of memory: Killed process 812 (python3)\r\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "console.log"


def cause_of(console: Console) -> Cause | None:
    found = console.look().find_dead_end()
    return None if found is None else found.cause


def append(log: Path, content: bytes) -> None:
    with log.open("ab") as file:
        file.write(content)


@pytest.mark.parametrize("size", [1 << 30, (1 << 30) + 7])
def test_console_of_a_gibibyte_takes_neither_memory_nor_time(log: Path, size: int) -> None:
    log.write_bytes(BOOT + OUT_OF_MEMORY)
    os.truncate(log, size)
    append(log, b"\r\n" + PANIC)
    console = Console(log)
    tracemalloc.start()
    used = time.thread_time()
    run = console.look()
    lines = console.lines
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    assert time.thread_time() - used < 5, "some hundredths of a second where nothing else runs"
    assert run.position == log.stat().st_size
    assert run.phase is Phase.SYSTEMD
    assert cause_of(console) is Cause.KERNEL_PANIC
    assert OUT_OF_MEMORY.decode().strip() in lines


def test_looks_at_what_has_not_grown_read_nothing(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.write_bytes(BOOT)
    console = Console(log)
    console.look()
    monkeypatch.setattr(os, "pread", pytest.fail)
    assert console.look().phase is Phase.SYSTEMD


@pytest.mark.parametrize("later", [b"x" * 200_000, b"a line\r\n" * 70_000, b"\0" * (3 << 20)])
def test_what_was_told_is_known_after_much_else(log: Path, later: bytes) -> None:
    log.write_bytes(BOOT + OUT_OF_MEMORY + PANIC + FINAL + later)
    console = Console(log)
    run = console.look()
    assert run.phase is Phase.CLOUD_INIT_FINAL
    told = [line.encode() for line in console.lines]
    assert OUT_OF_MEMORY.strip() in told
    assert b"[   44.1] BUG: kernel NULL pointer dereference" in told
    assert len(told) < 400


def test_kernel_that_ended_before_much_else_has_not_ended(log: Path) -> None:
    """One whose kernel has ended prints nothing more, let alone half a MiB."""
    log.write_bytes(BOOT + PANIC)
    console = Console(log)
    assert cause_of(console) is Cause.KERNEL_PANIC
    append(log, b"a line\r\n" * 70_000)
    assert cause_of(console) is None


SEPARATORS = ["\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\r"]


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("told", [EMERGENCY, LAST_WORDS, b"No bootable device.\r\n"])
def test_only_a_line_feed_ends_a_line(log: Path, separator: str, told: bytes) -> None:
    log.write_bytes(BOOT + b"echo: " + separator.encode() + told)
    assert cause_of(Console(log)) is None
    append(log, told)
    assert cause_of(Console(log)) is not None


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7, 64])
def test_markers_and_characters_may_be_cut_anywhere(log: Path, step: int) -> None:
    content = BOOT + "grüß ☃ 🐧\r\n".encode() + b"broken \xff\xf0\x9f\r\n" + FINAL + PANIC
    log.touch()
    console = Console(log)
    for start in range(0, len(content), step):
        append(log, content[start : start + step])
        console.look()
    log_at_once = log.with_name("whole")
    log_at_once.write_bytes(content)
    whole = Console(log_at_once)
    assert whole.look().phase is console.look().phase is Phase.CLOUD_INIT_FINAL
    assert whole.lines == console.lines
    assert "grüß ☃ 🐧" in console.lines
    assert cause_of(whole) is cause_of(console) is Cause.KERNEL_PANIC


@pytest.mark.parametrize("marker", [FIRMWARE, KERNEL, FINAL])
@pytest.mark.parametrize("before", [4090, 4096, 4000, 3840, 3839, 12_345])
def test_markers_in_lines_beyond_any_bound_are_found(log: Path, marker: bytes, before: int) -> None:
    log.write_bytes(BOOT + FINAL + b"x" * before + marker)
    run = Console(log).look()
    assert run.phase is not None
    if marker == FINAL:
        assert run.phase is Phase.CLOUD_INIT_FINAL
    else:
        assert run.boots == 2


def test_line_without_an_end_is_kept_in_bounded_memory(log: Path) -> None:
    log.write_bytes(BOOT)
    console = Console(log)
    console.look()
    tracemalloc.start()
    for _ in range(8):
        append(log, b"x" * (1 << 20))
        console.look()
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    assert max(map(len, console.lines)) <= 4097


@pytest.mark.parametrize("content", [b"", b"y", BOOT, BOOT + PANIC, BOOT + b"other" * 10_000])
@pytest.mark.parametrize("replaced", [False, True])
def test_log_that_is_truncated_or_replaced_is_read_anew(
    log: Path, content: bytes, replaced: bool
) -> None:
    log.write_bytes(b"z" * 1000 + BOOT + FINAL + OUT_OF_MEMORY)
    console = Console(log, lambda: 1000)
    assert console.look().phase is Phase.CLOUD_INIT_FINAL
    if replaced:
        new = log.with_name("new")
        new.write_bytes(content)
        new.replace(log)
    else:
        log.write_bytes(content)
    run = console.look()
    assert run.position == len(content)
    assert run.phase is (Phase.SYSTEMD if BOOT in content else None)
    assert OUT_OF_MEMORY.decode().strip() not in console.lines
    append(log, b"\r\n" + BOOT + EMERGENCY)
    assert cause_of(console) is Cause.EMERGENCY_SHELL


def test_log_that_goes_away_and_comes_back_is_read(log: Path) -> None:
    console = Console(log)
    assert console.look().phase is None
    log.write_bytes(BOOT)
    assert console.look().phase is Phase.SYSTEMD
    log.unlink()
    assert console.look().phase is Phase.SYSTEMD
    log.write_bytes(FIRMWARE)
    assert console.look().phase is Phase.FIRMWARE


def test_boot_that_followed_makes_a_panic_forgotten(log: Path) -> None:
    log.write_bytes(BOOT + PANIC)
    console = Console(log)
    assert cause_of(console) is Cause.KERNEL_PANIC
    append(log, BOOT)
    assert cause_of(console) is None


def test_run_that_followed_makes_a_panic_forgotten(log: Path) -> None:
    log.write_bytes(BOOT + PANIC)
    start = 0
    console = Console(log, lambda: start)
    assert cause_of(console) is Cause.KERNEL_PANIC
    start = log.stat().st_size
    assert cause_of(console) is None
    append(log, b"a line of a machine that was taken back\r\n")
    assert cause_of(console) is None


def test_boot_that_goes_on_from_an_emergency_shell_has_not_ended(log: Path) -> None:
    log.write_bytes(BOOT + EMERGENCY)
    console = Console(log)
    assert cause_of(console) is Cause.EMERGENCY_SHELL
    append(log, FINAL)
    assert cause_of(console) is None
    append(log, EMERGENCY)
    assert cause_of(console) is Cause.EMERGENCY_SHELL


INITRAMFS = b"Gave up waiting for root file system device.\r\nALERT!  Dropping to a shell!\r\n"
NOISE = b"[   62.113] clocksource: Marking clocksource 'tsc' as unstable\r\n"


@pytest.mark.parametrize("noise", [NOISE, NOISE * 400, b"\r\n" + NOISE, NOISE[:4], NOISE[:14]])
@pytest.mark.parametrize("looks", [False, True])
def test_kernel_that_speaks_leaves_a_prompt_what_it_is(
    log: Path, noise: bytes, looks: bool
) -> None:
    log.write_bytes(FIRMWARE + KERNEL + INITRAMFS + b"(initramfs) ")
    console = Console(log)
    found = console.look().find_dead_end()
    assert found is not None
    if looks:
        # It is seen letter by letter.
        for byte in noise:
            append(log, bytes([byte]))
            console.look()
    else:
        append(log, noise)
    append(log, b"" if noise.endswith(b"\n") else NOISE[4:] if len(noise) == 4 else NOISE[14:])
    again = console.look().find_dead_end()
    assert again is not None
    assert (again.cause, again.offset) == (Cause.EMERGENCY_SHELL, found.offset)


@pytest.mark.parametrize("later", [b"exit\r\n" + NOISE, NOISE + b"exit\r\n", NOISE + FINAL])
def test_prompt_that_was_left_is_waited_at_no_more(log: Path, later: bytes) -> None:
    log.write_bytes(FIRMWARE + KERNEL + INITRAMFS + b"(initramfs) " + later)
    assert cause_of(Console(log)) is None


def test_emergency_shell_is_told_behind_what_is_for_the_terminal(log: Path) -> None:
    """As systemd from 256 on begins what a service says."""
    log.write_bytes(BOOT + b"\x1b[!p\x1b]104\x07\x1b[?7h\x1b[1G\x1b[0J" + EMERGENCY)
    assert cause_of(Console(log)) is Cause.EMERGENCY_SHELL


def test_words_of_programs_are_none_of_a_kernel(log: Path) -> None:
    log.write_bytes(BOOT + b"\r\nwhat ---[ end Kernel panic means\r\n")
    assert cause_of(Console(log)) is None


def test_many_threads_read_each_byte_once(log: Path) -> None:
    log.write_bytes(b"")
    console = Console(log)
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            console.look()
            assert console.lines is not None

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(100):
        append(log, b"line %d\r\n" % number)
    stop.set()
    for thread in threads:
        thread.join()
    console.look()
    assert list(console.lines) == [f"line {number}" for number in range(100)]


def test_forked_child_reads_though_the_parent_was_reading(log: Path) -> None:
    log.write_bytes(BOOT + EMERGENCY)
    console = Console(log)
    console.look()
    with holding_locks(console) as number:
        assert number == 1
        pid = os.fork()
        if pid == 0:
            os._exit(0 if cause_of(console) is Cause.EMERGENCY_SHELL else 1)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"one",
        b"one\n",
        b"one\ntwo",
        b"one\ntwo\n",
        b"\n\n\n",
        b"a\rb\fc\vd\x85e\n" * 5,
        b"x" * 70_000 + b"\n" + b"y" * 70_000,
        b"".join(b"%d\n" % number for number in range(30_000)),
    ],
)
@pytest.mark.parametrize("lines", [0, 1, 2, 3, 7, 29_999, 30_000, 40_000])
def test_last_lines_of_a_file_are_found(log: Path, content: bytes, lines: int) -> None:
    log.write_bytes(content)
    kept = [line + b"\n" for line in content.split(b"\n")]
    kept[-1] = kept[-1][:-1]
    kept = [line for line in kept if line]
    with log.open("rb") as file:
        start = find_last_lines(file, lines)
    assert content[start:] == b"".join(kept[max(len(kept) - lines, 0) :])


def test_last_lines_of_a_gibibyte_take_no_memory(log: Path) -> None:
    log.touch()
    os.truncate(log, 1 << 30)
    append(log, b"\none\ntwo\n")
    tracemalloc.start()
    with log.open("rb") as file:
        assert find_last_lines(file, 2) == (1 << 30) + 1
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


class Followed:
    """A machine that runs; its log is followed."""

    pid = 1


@pytest.mark.parametrize("replaced", [False, True])
def test_log_that_is_followed_is_read_anew_when_it_is_truncated(log: Path, replaced: bool) -> None:
    log.write_bytes(b"one\ntwo\f\vtwo\nthree\n")
    followed = reports.read_log(log, 2, Followed())  # type: ignore[arg-type]
    assert next(followed) == b"two\f\vtwo\nthree\n"
    if replaced:
        new = log.with_name("new")
        new.write_bytes(b"another log, which is as long")
        new.replace(log)
    else:
        log.write_bytes(b"another")
    assert next(followed) == log.read_bytes()
    append(log, b" line\n")
    assert next(followed) == b" line\n"
