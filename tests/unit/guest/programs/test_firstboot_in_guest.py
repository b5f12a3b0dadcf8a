"""What puts a guest right whose first boot began in the middle, run on files of ours."""

from __future__ import annotations

import ast
import fcntl
import os
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pycloudlib.guest import helper
from pycloudlib.guest.programs import firstboot_in_guest

OLD = "0123456789abcdef0123456789abcdef"
NEW = "fedcba9876543210fedcba9876543210"
SAVED_AT = 1_700_000_000.5


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Give the program, with the files of a guest below a directory."""
    for name in (
        "RESULT",
        "RTC",
        "RANDOM_SEED",
        "PROBLEMS",
        "MACHINE_ID",
        "TRANSIENT_MACHINE_ID",
        "DBUS_MACHINE_ID",
        "CLOUD_INIT_LOG",
    ):
        path = f"{tmp_path}{getattr(firstboot_in_guest, name)}"
        monkeypatch.setattr(firstboot_in_guest, name, path)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    journals = tuple(f"{tmp_path}{base}" for base in firstboot_in_guest.JOURNALS)
    monkeypatch.setattr(firstboot_in_guest, "JOURNALS", journals)
    facts = {
        "saved_at": str(SAVED_AT),
        "rtc_lag": "0.25",
        "entropy": "00" * 64,
        "machine_id": NEW,
    }
    monkeypatch.setattr(firstboot_in_guest, "FACTS", facts)
    Path(firstboot_in_guest.MACHINE_ID).write_text(f"{OLD}\n")
    marks = tuple(f"{tmp_path}{mark}" for mark in firstboot_in_guest.MADE_IN_EACH_BOOT)
    monkeypatch.setattr(firstboot_in_guest, "MADE_IN_EACH_BOOT", marks)
    boot(firstboot_in_guest)
    # The other machine is stopped now that this has been made.
    facts["saved_at"] = str(time.time() + 0.1)
    return firstboot_in_guest


def boot(guest: ModuleType) -> None:
    """Begin a boot: what is in /run is new."""
    for mark in reversed(guest.MADE_IN_EACH_BOOT):
        shutil.rmtree(mark, ignore_errors=True)
        Path(mark).mkdir(parents=True)
    Path(guest.RESULT).unlink(missing_ok=True)


def boot_again(guest: ModuleType) -> None:
    guest.FACTS["saved_at"] = str(time.time() - 30)
    boot(guest)


@pytest.fixture
def ioctls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any]]:
    """Keep the program from stirring the random numbers of this host."""
    calls: list[tuple[int, Any]] = []

    def ioctl(_device: object, request: int, content: bytes = b"") -> None:
        calls.append((request, content))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    return calls


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Keep the program from setting the clock of this host; tell how wrong it would be."""
    errors: list[float] = []
    monkeypatch.setattr(time, "clock_settime", lambda _c, now: errors.append(now - time.time()))
    return errors


@pytest.fixture
def ticking(guest: ModuleType) -> Iterator[None]:
    """Let a real-time clock tick that is 0.25 s late, as QEMU's would be."""
    stop = threading.Event()
    rtc = Path(guest.RTC)

    def tick() -> None:
        while not stop.wait(0.001):
            rtc.with_suffix(".new").write_text(f"{int(time.time() - 0.25)}\n")
            rtc.with_suffix(".new").replace(rtc)

    rtc.write_text(f"{int(time.time() - 0.25)}\n")
    thread = threading.Thread(target=tick)
    thread.start()
    yield
    stop.set()
    thread.join()


def restarts(monkeypatch: pytest.MonkeyPatch, status: int = 0) -> list[list[str]]:
    calls: list[list[str]] = []

    def spawn(_mode: int, _file: str, argv: list[str]) -> int:
        calls.append(argv)
        return status

    monkeypatch.setattr(os, "spawnvp", spawn)
    return calls


def test_program_is_filled_in_and_runs_on_old_pythons() -> None:
    one, other = (helper.first_boot_program(saved_at=SAVED_AT, rtc_lag=0.25) for _ in range(2))
    tree = ast.parse(one, feature_version=(3, 5))
    (facts,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FACTS"
    )
    assert float(facts["saved_at"]) == SAVED_AT
    assert float(facts["rtc_lag"]) == 0.25
    assert len(bytes.fromhex(facts["entropy"])) == 64
    assert len(bytes.fromhex(facts["machine_id"])) == 16
    assert one != other
    different = [ours for ours in one.splitlines() if ours not in other.splitlines()]
    assert len(different) == 1
    assert different[0].startswith("FACTS = ")


def test_boothook_is_one_to_cloud_init_and_to_the_kernel() -> None:
    hook = helper.first_boot_hook(helper.first_boot_program(saved_at=SAVED_AT, rtc_lag=0.25))
    kind, interpreter = hook.splitlines()[:2]
    assert kind == b"#cloud-boothook"
    assert interpreter == b"#!/usr/bin/python3 -IS"


def test_check_tells_what_the_program_left_and_runs_it_where_it_left_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = tmp_path / "result"
    monkeypatch.setattr(helper, "RESULT", str(result))
    sudo = tmp_path / "bin" / "sudo"
    sudo.parent.mkdir()
    sudo.write_text('#!/bin/sh\nexec "$@"\n')
    sudo.chmod(0o755)

    def check(program: str) -> str:
        return subprocess.run(
            ["sh", "-c", helper.first_boot_check()],
            input=program,
            text=True,
            capture_output=True,
            check=True,
            env={"PATH": f"{sudo.parent}:{os.environ['PATH']}"},
        ).stdout

    assert check(f"open({str(result)!r}, 'w').write('a problem')") == "a problem"
    assert check("raise SystemExit('not run again')") == "a problem"


def test_first_boot_is_put_right(
    guest: ModuleType,
    ticking: None,
    clocks: list[float],
    ioctls: list[tuple[int, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path(guest.RANDOM_SEED).write_bytes(b"s" * 32)
    restarted = restarts(monkeypatch)
    guest.main()
    assert Path(guest.RESULT).read_text() == ""
    assert [request for request, _ in ioctls] == [guest.RNDADDENTROPY, guest.RNDRESEEDCRNG]
    # linux/random.h: bits of entropy, bytes, the bytes.
    assert ioctls[0][1] == (512).to_bytes(4, "little") + (64).to_bytes(4, "little") + bytes(64)
    seed = Path(guest.RANDOM_SEED).read_bytes()
    assert len(seed) == 32
    assert seed != b"s" * 32
    (error,) = clocks
    # A busy host is late at its reading. How well a tick is known is tested by a clock that waits.
    assert abs(error) < 5
    assert Path(guest.MACHINE_ID).read_text() == f"{NEW}\n"
    assert restarted == [], "there is no journal to begin anew"


@pytest.mark.parametrize("marks", [2, 1, 0], ids=["udev", "old udev", "no udev"])
def test_later_boots_are_told_from_the_first(marks: int, guest: ModuleType) -> None:
    for mark in guest.MADE_IN_EACH_BOOT[: 2 - marks]:
        shutil.rmtree(mark)
    assert not guest.is_later_boot()
    boot_again(guest)
    for mark in guest.MADE_IN_EACH_BOOT[: 2 - marks]:
        shutil.rmtree(mark)
    # Where nothing tells, it is put right: that does no harm.
    assert guest.is_later_boot() is (marks > 0)


def test_clock_of_the_guest_does_not_tell_which_boot_it_is(
    guest: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NTP may have set it, a machine that was held back has slept."""
    monkeypatch.setattr(time, "time", lambda: SAVED_AT + 1e9)
    assert not guest.is_later_boot()


def test_later_boot_of_a_machine_that_was_put_right_stays_as_it_is(
    guest: ModuleType, clocks: list[float], ioctls: list[tuple[int, Any]]
) -> None:
    Path(guest.MACHINE_ID).write_text(f"{NEW}\n")
    boot_again(guest)
    guest.main()
    assert clocks == []
    assert ioctls == []
    assert Path(guest.MACHINE_ID).read_text() == f"{NEW}\n"
    assert Path(guest.RESULT).read_text() == ""
    assert not Path(guest.PROBLEMS).exists()


def test_later_boot_tells_of_a_first_one_that_was_not_put_right(
    guest: ModuleType, clocks: list[float], ioctls: list[tuple[int, Any]]
) -> None:
    boot_again(guest)
    guest.main()
    assert clocks == []
    assert ioctls == []
    assert Path(guest.MACHINE_ID).read_text() == f"{OLD}\n", "its user may have given it that"
    assert "started again" in Path(guest.RESULT).read_text()
    assert not Path(guest.PROBLEMS).exists(), "a machine that is cleaned is left alone"


def test_problem_of_the_first_boot_is_told_by_later_ones(
    guest: ModuleType,
    clocks: list[float],
    ioctls: list[tuple[int, Any]],
) -> None:
    guest.main()  # there is no real-time clock
    told = Path(guest.RESULT).read_text()
    assert "set_clock" in told
    boot_again(guest)
    guest.main()
    assert Path(guest.RESULT).read_text() == told


def test_putting_right_by_ssh_is_told_to_be_late(
    guest: ModuleType,
    ticking: None,
    clocks: list[float],
    ioctls: list[tuple[int, Any]],
) -> None:
    guest.main(late=True)
    assert "its modules came before" in Path(guest.RESULT).read_text()
    assert len(clocks) == 1
    assert Path(guest.MACHINE_ID).read_text() == f"{NEW}\n"


def test_check_by_ssh_of_one_that_was_put_right_finds_nothing(guest: ModuleType) -> None:
    Path(guest.MACHINE_ID).write_text(f"{NEW}\n")
    boot_again(guest)
    guest.main(late=True)
    assert Path(guest.RESULT).read_text() == ""


def test_step_that_fails_is_told_and_the_others_are_taken(
    guest: ModuleType,
    clocks: list[float],
    ioctls: list[tuple[int, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guest_time = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(guest_time)))
    Path(guest.RTC).write_text("1700000000\n")  # stands still
    guest.main()
    told = Path(guest.RESULT).read_text()
    assert "set_clock" in told
    assert "stands still" in told
    assert clocks == []
    assert len(ioctls) == 2
    assert Path(guest.MACHINE_ID).read_text() == f"{NEW}\n"


@pytest.mark.parametrize("nothing", ["RTC", "MACHINE_ID"])
def test_guest_that_lacks_something_is_told(
    nothing: str,
    guest: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    clocks: list[float],
    ioctls: list[tuple[int, Any]],
    ticking: None,
) -> None:
    if nothing == "RTC":
        monkeypatch.setattr(guest, "RTC", "/nonexistent")
    else:
        Path(guest.MACHINE_ID).unlink()
    guest.main()
    assert "FileNotFoundError" in Path(guest.RESULT).read_text()


def make_journal(base: str, content: bytes) -> Path:
    file = Path(f"{base}{OLD}/system.journal")
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    return file


def test_journal_goes_with_the_machine_id(
    guest: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = b"LPKSHHRH" + bytes(16) + b"f" * 16 + bytes.fromhex(OLD) + b"rest"
    make_journal(guest.JOURNALS[1], header)
    restarted = restarts(monkeypatch)
    guest.take_machine_id()
    (directory,) = Path(guest.JOURNALS[1]).iterdir()
    assert directory.name == NEW
    expected = header.replace(bytes.fromhex(OLD), bytes.fromhex(NEW))
    assert (directory / "system.journal").read_bytes() == expected
    assert restarted == [["systemctl", "--no-block", "restart", "systemd-journald.service"]]


def test_journal_that_does_not_begin_anew_is_told(
    guest: ModuleType,
    clocks: list[float],
    ioctls: list[tuple[int, Any]],
    ticking: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_journal(guest.JOURNALS[0], bytes(100))
    restarts(monkeypatch, status=1)
    guest.main()
    assert "take_machine_id" in Path(guest.RESULT).read_text()


def test_all_files_of_the_machine_id_are_changed(guest: ModuleType) -> None:
    for path in (guest.TRANSIENT_MACHINE_ID, guest.DBUS_MACHINE_ID):
        Path(path).write_text(f"{OLD}\n")
    same_file = Path(guest.TRANSIENT_MACHINE_ID).stat().st_ino
    guest.take_machine_id()
    for path in (guest.MACHINE_ID, guest.TRANSIENT_MACHINE_ID, guest.DBUS_MACHINE_ID):
        assert Path(path).read_text() == f"{NEW}\n"
    assert Path(guest.TRANSIENT_MACHINE_ID).stat().st_ino == same_file
    assert stat.S_IMODE(Path(guest.MACHINE_ID).stat().st_mode) == 0o444
    assert sorted(file.name for file in Path(guest.MACHINE_ID).parent.iterdir()) == ["machine-id"]


def test_machine_id_that_is_mounted_stays_the_same_file(guest: ModuleType) -> None:
    Path(guest.TRANSIENT_MACHINE_ID).write_text(f"{OLD}\n")
    Path(guest.MACHINE_ID).unlink()
    os.link(guest.TRANSIENT_MACHINE_ID, guest.MACHINE_ID)
    guest.take_machine_id()
    assert Path(guest.MACHINE_ID).samefile(guest.TRANSIENT_MACHINE_ID)
    assert Path(guest.MACHINE_ID).read_text() == f"{NEW}\n"


def test_second_run_changes_nothing(guest: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    make_journal(guest.JOURNALS[0], bytes(100))
    restarted = restarts(monkeypatch)
    guest.take_machine_id()
    guest.take_machine_id()
    assert len(restarted) == 1


LOGGED = """\
2023-11-13 08:00:00,000 - util.py[DEBUG]: logged when the image was made
2023-11-14 23:59:58,900 - util.py[DEBUG]: Cloud-init v. 22.4.2 running 'init-local' at Tue
2023-11-14 23:59:59,999 - handlers.py[DEBUG]: start: init-local/check-cache
Traceback (most recent call last):
2023-11-15 00:00:01,005 - util.py[WARNING]: \N{SNOWMAN} no time stamp, but 2023-11-15 00:00:01,005
2023-1
"""
MOVED = """\
2023-11-13 08:00:00,000 - util.py[DEBUG]: logged when the image was made
2024-02-29 00:10:03,400 - util.py[DEBUG]: Cloud-init v. 22.4.2 running 'init-local' at Tue
2024-02-29 00:10:04,499 - handlers.py[DEBUG]: start: init-local/check-cache
Traceback (most recent call last):
2024-02-29 00:10:05,505 - util.py[WARNING]: \N{SNOWMAN} no time stamp, but 2023-11-15 00:00:01,005
2023-1
"""


def test_what_cloud_init_has_logged_moves_with_the_clock(
    guest: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Path(guest.CLOUD_INIT_LOG)
    log.write_text(LOGGED)
    monkeypatch.setattr(time, "monotonic", lambda: 30.0)
    with log.open("ab") as writer:
        # From 15 November 2023, 0:00:02 UTC, on.
        guest.move_log(1_700_006_402.0, 1_700_006_402.0 + 106 * 86400 + 604.5)
        writer.write(b"2024-02-29 00:10:07,000 - util.py[DEBUG]: goes on at its end\n")
    assert log.read_text().startswith(MOVED)
    assert log.read_text().count("\n") == MOVED.count("\n") + 1


@pytest.mark.parametrize("seconds", [0.0, 951782399.999, 951782400.0, 1_700_000_000.123, 4e9])
def test_time_of_the_log_is_read_as_it_is_written(seconds: float, guest: ModuleType) -> None:
    assert guest.parse_time(guest.format_time(seconds)) == pytest.approx(seconds, abs=1e-6)


def test_clock_that_is_set_takes_the_log_with_it(
    guest: ModuleType,
    ticking: None,
    clocks: list[float],
    ioctls: list[tuple[int, Any]],
) -> None:
    # It was stopped for an hour.
    guest.FACTS["rtc_lag"] = "3600.25"
    log = Path(guest.CLOUD_INIT_LOG)
    log.write_bytes(guest.format_time(time.time()) + b" - util.py[DEBUG]: x\n")
    guest.main()
    assert Path(guest.RESULT).read_text() == ""
    assert clocks[0] == pytest.approx(3600, abs=60)
    assert guest.parse_time(log.read_bytes()[:23]) == pytest.approx(time.time() + 3600, abs=60)


def test_tick_that_came_while_the_processor_was_taken_away_is_not_relied_on(
    guest: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is known no better than the time that it may have come in."""
    clock = [100.0]
    # Seconds that each pause really takes: in the third, the clock ticks, and nobody looks.
    pauses = iter([0.003, 0.003, 0.4] + [0.003] * 1000)

    def sleep(_seconds: float) -> None:
        clock[0] += next(pauses)

    monkeypatch.setattr(guest.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(guest.time, "sleep", sleep)
    # It ticks 0.1 s after the beginning, and each second from then on.
    monkeypatch.setattr(guest, "read", lambda _path: str(int(clock[0] - 0.1)))

    seconds, ticked = guest.wait_for_tick()

    assert ticked == pytest.approx(seconds + 0.1, abs=0.003)
    assert clock[0] > 101
