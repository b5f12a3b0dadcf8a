from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pycloudlib.diagnosis import Cause
from pycloudlib.guest.boot.bootlines import Phase, clean_line, find_phase
from pycloudlib.guest.boot.console import Console
from pycloudlib.guest.boot.readiness import BootWatch
from tests.unit.guest.boot.test_deadends import told

FIRMWARE = (
    b"\x1bc\x1b[?7l\x1b[2J\x1b[0mSeaBIOS (version 1.16.2-debian-1.16.2-1)\r\n"
    b"Booting from Hard Disk...\r\n"
)
LOADER = b"\x1b[0m\x1b[30m\x1b[47mWelcome to GRUB!\r\n\r\n\x1b[0m\x1b[37m\x1b[40m"
KERNEL = (
    b"[    0.000000] Linux version 6.8.0-48-generic (buildd@lcy02) #48-Ubuntu SMP\r\n"
    b"[    0.000000] Command line: root=LABEL=cloudimg-rootfs ro console=ttyS0\r\n"
    b"[    1.512345] Run /init as init process\r\n"
)
INITRD = b"Loading, please wait...\r\nBegin: Loading essential drivers ... done.\r\n"
SYSTEMD = (
    b"[    5.123456] systemd[1]: systemd 255.4-1ubuntu8 running in system mode\r\n"
    b"\r\nWelcome to \x1b[1mUbuntu 24.04.1 LTS\x1b[0m!\r\n\r\n"
    b"[\x1b[0;32m  OK  \x1b[0m] Created slice \x1b[0;1;39msystem-getty.slice\x1b[0m.\r\n"
)
CLOUD_INIT = {
    Phase.CLOUD_INIT_LOCAL: b"[   11.0] cloud-init[350]: Cloud-init v. 24.3.1 running "
    b"'init-local' at Mon, 23 Nov 2026 12:00:00 +0000. Up 11.02 seconds.\r\n",
    Phase.CLOUD_INIT_NETWORK: b"[   14.0] cloud-init[420]: Cloud-init v. 24.3.1 running "
    b"'init' at Mon, 23 Nov 2026 12:00:03 +0000. Up 14.10 seconds.\r\n",
    Phase.CLOUD_INIT_CONFIG: b"[   16.0] cloud-init[600]: Cloud-init v. 24.3.1 running "
    b"'modules:config' at Mon, 23 Nov 2026 12:00:05 +0000. Up 16.10 seconds.\r\n",
    Phase.CLOUD_INIT_FINAL: b"[   17.0] cloud-init[700]: Cloud-init v. 24.3.1 running "
    b"'modules:final' at Mon, 23 Nov 2026 12:00:06 +0000. Up 17.10 seconds.\r\n",
    Phase.CLOUD_INIT_DONE: b"[   18.0] cloud-init[700]: Cloud-init v. 24.3.1 finished at Mon, "
    b"23 Nov 2026 12:00:07 +0000. Datasource DataSourceNoCloud [seed=/dev/vda].\r\n",
}
WHOLE_BOOT = FIRMWARE + LOADER + KERNEL + INITRD + SYSTEMD + b"".join(CLOUD_INIT.values())


def watch_file(log: Path, content: bytes, offset: int = 0) -> BootWatch:
    """Give a watch that has seen a whole file."""
    log.write_bytes(content)
    with BootWatch(Console(log), offset, time.monotonic()) as watch:
        pass
    return watch


def phases_of(watch: BootWatch) -> list[Phase]:
    return [start.phase for start in watch.timeline]


@pytest.mark.parametrize(
    ("line", "phase"),
    [
        (FIRMWARE.splitlines()[0], Phase.FIRMWARE),
        (b'BdsDxe: loading Boot0001 "UEFI QEMU HARDDISK"', Phase.FIRMWARE),
        (LOADER, Phase.BOOT_LOADER),
        (b"GRUB loading..", Phase.BOOT_LOADER),
        (b"  Booting `Ubuntu'", Phase.BOOT_LOADER),
        (KERNEL.splitlines()[0], Phase.KERNEL),
        (b"Begin: Loading essential drivers ... done.", Phase.INITRD),
        (b"Welcome to \x1b[1mDebian GNU/Linux 12 (bookworm)\x1b[0m!", Phase.SYSTEMD),
        (b"[    5.1] systemd[1]: Detected virtualization qemu.", Phase.SYSTEMD),
        *((line, phase) for phase, line in CLOUD_INIT.items()),
    ],
)
def test_line_begins_its_phase(line: bytes, phase: Phase) -> None:
    assert find_phase(line) is phase


@pytest.mark.parametrize("line", WHOLE_BOOT.splitlines())
def test_line_that_is_not_whole_yet_begins_no_other_phase(line: bytes) -> None:
    # The log is looked at while a line is being written to it.
    assert {find_phase(line[:end]) for end in range(len(line))} <= {None, find_phase(line)}


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[    0.5] pci 0000:00:01.0: reg 0x10: [io 0xc000-0xc01f]",
        b"[\x1b[0;32m  OK  \x1b[0m] Reached target basic.target - Basic System.",
        b"vm login: ",
        b"-----BEGIN SSH HOST KEY KEYS-----",
    ],
)
def test_most_lines_begin_nothing(line: bytes) -> None:
    assert find_phase(line) is None


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"plain", "plain"),
        (b"  spaces around \r", "spaces around"),
        (b"[\x1b[0;32m  OK  \x1b[0m] Started \x1b[0;1;39mssh\x1b[0m.\r", "[  OK  ] Started ssh."),
        (b"\x1bc\x1b[?7l\x1b[2J\x1b[0mSeaBIOS", "SeaBIOS"),
        (b"\x1bcBooting from disk", "Booting from disk"),
        (b"\x1b(BDone", "Done"),
        (b"\x1b[!p\x1b]104\x07\x1b[?7h\x1b[1G\x1b[0JYou are in", "You are in"),
        (b"\x1b]3008;start=1f;type=service\x1b\\[  OK  ]\x1b]3008;end=1f\x1b\\", "[  OK  ]"),
        (b"\x1bP+q6E616D65\x1b\\login: ", "login:"),
        (b"\x1b]0;no end", "]0;no end"),
        (b"\x1b[01;01H\x1b[=3h\x1b[2JBdsDxe", "BdsDxe"),
        (b"a\x00\x07\x08b", "ab"),
        ("grüß ☃".encode(), "grüß ☃"),
        (b"broken \xff", "broken \N{REPLACEMENT CHARACTER}"),
        (b"\x1b[0m\r", ""),
    ],
)
def test_line_is_given_without_control_sequences(line: bytes, text: str) -> None:
    assert clean_line(line) == text


def test_whole_boot_goes_through_every_phase_in_order(tmp_path: Path) -> None:
    assert phases_of(watch_file(tmp_path / "console.log", WHOLE_BOOT)) == list(Phase)


def test_latest_phase_and_line_are_known(tmp_path: Path) -> None:
    watch = watch_file(tmp_path / "console.log", FIRMWARE + LOADER + KERNEL)

    assert watch.phase is Phase.KERNEL
    assert watch.last_line == "[    1.512345] Run /init as init process"


def test_machine_that_said_nothing_has_no_phase(tmp_path: Path) -> None:
    watch = watch_file(tmp_path / "console.log", b"")

    assert watch.phase is None
    assert watch.timeline == ()
    assert watch.last_line == ""


def test_log_may_not_exist(tmp_path: Path) -> None:
    with BootWatch(Console(tmp_path / "missing.log"), 0, time.monotonic()) as watch:
        pass

    assert watch.phase is None


def test_phase_begins_once(tmp_path: Path) -> None:
    watch = watch_file(tmp_path / "console.log", KERNEL + SYSTEMD + SYSTEMD)

    assert phases_of(watch) == [Phase.KERNEL, Phase.SYSTEMD]


def test_phase_never_goes_back(tmp_path: Path) -> None:
    # A machine that loads its kernel directly, and whose user-data installs a boot loader.
    later = b"[   20.0] cloud-init[700]: Setting up GRUB 2 ...\r\n"
    watch = watch_file(
        tmp_path / "console.log",
        KERNEL + SYSTEMD + b"".join(CLOUD_INIT.values()) + later,
    )

    assert watch.phase is Phase.CLOUD_INIT_DONE
    assert Phase.BOOT_LOADER not in phases_of(watch)


def test_earlier_boots_do_not_count(tmp_path: Path) -> None:
    watch = watch_file(tmp_path / "console.log", WHOLE_BOOT + FIRMWARE, offset=len(WHOLE_BOOT))

    assert phases_of(watch) == [Phase.FIRMWARE]


def test_line_that_is_left_open_counts(tmp_path: Path) -> None:
    watch = watch_file(tmp_path / "console.log", FIRMWARE + b"GRUB loading..")

    assert watch.phase is Phase.BOOT_LOADER
    assert watch.last_line == "GRUB loading.."


def test_times_are_seconds_since_power_on(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_bytes(WHOLE_BOOT)
    with BootWatch(Console(log), 0, time.monotonic() - 1000) as watch:
        pass

    seconds = [start.seconds for start in watch.timeline]
    assert seconds == sorted(seconds)
    assert all(1000 <= s < 2000 for s in seconds)


def test_growing_log_is_followed(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    looked = threading.Event()
    reports: list[tuple[Phase | None, str]] = []

    def report(phase: Phase | None, line: str) -> None:
        reports.append((phase, line))
        looked.set()

    def append(content: bytes) -> None:
        with log.open("ab") as file:
            file.write(content)

    def wait_until(seen: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not seen():
            assert looked.wait(deadline - time.monotonic()), reports
            looked.clear()

    with BootWatch(Console(log), 0, time.monotonic(), report) as watch:
        wait_until(lambda: bool(reports))
        assert reports[0] == (None, "")
        append(FIRMWARE + b"[    0.000000] Linux ver")
        wait_until(lambda: watch.last_line == "[    0.000000] Linux ver")
        assert watch.phase is Phase.FIRMWARE
        append(b"sion 6.8.0\r\nWelcome to \x1b[1mUb")
        wait_until(lambda: watch.phase is Phase.KERNEL)
        append("untu! ☃\r\n".encode())
        wait_until(lambda: watch.last_line == "Welcome to Ubuntu! ☃")

    assert phases_of(watch) == [Phase.FIRMWARE, Phase.KERNEL, Phase.SYSTEMD]
    assert (Phase.SYSTEMD, "Welcome to Ubuntu! ☃") in reports


WARNED = (
    b"[   46.5] cloud-init[353]: 2026-11-30 03:19:01,327 - __init__.py[WARNING]: Unhandled\r\n"
    b"[   46.6] cloud-init[353]: 2026-11-30 03:19:01,328 - __init__.py[WARNING]: Unhandled\r\n"
)


def test_boot_that_follows_another_begins_anew(tmp_path: Path) -> None:
    watch = watch_file(tmp_path / "console.log", WHOLE_BOOT + b"vm login: " + FIRMWARE + KERNEL)

    assert phases_of(watch) == [Phase.FIRMWARE, Phase.KERNEL]


def test_kernel_that_another_has_started_begins_a_boot(tmp_path: Path) -> None:
    watch = watch_file(tmp_path / "console.log", WHOLE_BOOT + KERNEL)

    assert phases_of(watch) == [Phase.KERNEL]


def test_what_cloud_init_warns_of_is_kept_over_boots(tmp_path: Path) -> None:
    later = WARNED.replace(b"Unhandled", b"of the second boot")
    watch = watch_file(tmp_path / "console.log", WHOLE_BOOT + WARNED + WHOLE_BOOT + later)

    assert watch.warnings == ("WARNING: Unhandled", "WARNING: of the second boot")


def test_dead_end_of_a_later_boot_is_seen(tmp_path: Path) -> None:
    watch = watch_file(tmp_path / "console.log", WHOLE_BOOT + FIRMWARE + b"No bootable device.\r\n")

    assert told(watch) == (Cause.NO_BOOTABLE_DISK, "No bootable device.")


def test_guest_that_has_halted_is_seen_after_its_boot(tmp_path: Path) -> None:
    halted = b"[  130.2] reboot: System halted\r\n"
    watch = watch_file(tmp_path / "console.log", WHOLE_BOOT + halted)

    assert told(watch) == (Cause.HALTED, "[  130.2] reboot: System halted")


def test_what_is_printed_after_the_boot_ends_nothing(tmp_path: Path) -> None:
    watch = watch_file(tmp_path / "console.log", WHOLE_BOOT + b"You are in emergency mode.\r\n")

    assert watch.dead_end is None
