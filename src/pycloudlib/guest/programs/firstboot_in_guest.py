#!/usr/bin/python3 -IS
"""Fixes up a guest whose first boot began where another machine was saved.

Not imported: its text is part of the machine's vendor-data, and cloud-init runs it before any of
its modules. The guest's own Python runs it (3.5 or newer, nothing but its standard library).
"""

# Each further import takes noticeable time in emulation.
import fcntl
import os
import struct
import sys
import time

FACTS = {"saved_at": "", "rtc_lag": "", "entropy": "", "machine_id": ""}
# Filled in on the host, as texts:
#   saved_at    when the other machine was saved, in seconds since the epoch
#   rtc_lag     seconds that the real-time clock is behind
#   entropy     random bytes, in hexadecimal digits
#   machine_id  the new machine-id

RESULT = "/run/pycloudlib/first-boot"
# Where problems are kept for the boots that follow; made only when there are any.
PROBLEMS = "/var/lib/pycloudlib-first-boot"
# Made early in each boot, and not changed later: by systemd for udev, by udev.
MADE_IN_EACH_BOOT = ("/run/udev/control", "/run/udev")
MACHINE_ID = "/etc/machine-id"
# It may be mounted over the one above while /etc is read-only.
TRANSIENT_MACHINE_ID = "/run/machine-id"
DBUS_MACHINE_ID = "/var/lib/dbus/machine-id"
JOURNALS = ("/run/log/journal/", "/var/log/journal/")
RTC = "/sys/class/rtc/rtc0/since_epoch"
CLOUD_INIT_LOG = "/var/log/cloud-init.log"
# Seconds within which events count as simultaneous.
SURE = 0.03
RANDOM_SEED = "/var/lib/systemd/random-seed"
# linux/random.h: _IOW('R', 0x03, int[2]) and _IO('R', 0x07).
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207
# systemd's journal-def.h: where a journal file names the machine.
JOURNAL_MACHINE_ID = 40


def read(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read().strip()


def write(path: str, text: str, mode: int = 0o444) -> None:
    """Replace a file's content at once."""
    descriptor = os.open(path + ".pycloudlib", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
        os.fchmod(file.fileno(), mode)
    os.rename(path + ".pycloudlib", path)


def is_itself() -> bool:
    """Whether the machine already has its own identity."""
    return os.path.exists(MACHINE_ID) and read(MACHINE_ID) == FACTS["machine_id"]


def is_later_boot() -> bool:
    """Whether the machine was powered on after the other one was saved.

    By files, not by the clock, which NTP may have set, nor by the uptime, which does not count
    the time that it was saved.
    """
    marks = [path for path in MADE_IN_EACH_BOOT if os.path.exists(path)]
    return bool(marks) and os.stat(marks[0]).st_ctime > float(FACTS["saved_at"])


def stir_random_numbers() -> None:
    """Stir the random number generator, so that no two machines draw the same numbers."""
    entropy = bytes.fromhex(FACTS["entropy"])
    with open("/dev/random", "wb", buffering=0) as device:
        content = struct.pack("ii", 8 * len(entropy), len(entropy)) + entropy
        fcntl.ioctl(device, RNDADDENTROPY, content)
        fcntl.ioctl(device, RNDRESEEDCRNG)
    if os.path.exists(RANDOM_SEED):
        with open(RANDOM_SEED, "r+b") as file:
            file.write(os.urandom(os.fstat(file.fileno()).st_size))


def wait_for_tick() -> "tuple[int, float]":
    """Wait until the real-time clock ticks; return its seconds, and the monotonic time of the tick.

    The time of a tick is not exact if another process had the processor: then another tick is
    waited for, twice.
    """
    begun = time.monotonic()
    latest, looked = int(read(RTC)), begun
    for _ in range(3):
        first = latest
        while latest == first:
            if time.monotonic() - begun > 6:
                raise OSError("the real-time clock stands still")
            time.sleep(0.003)
            before, latest, looked = looked, int(read(RTC)), time.monotonic()
        if looked - before < SURE:
            break
    return latest, (before + looked) / 2


def set_clock() -> None:
    """Set the clock by the real-time clock, which has whole seconds, at the moment of a tick.

    The times in cloud-init's log are moved with it.
    """
    seconds, ticked = wait_for_tick()
    old_ahead = time.time() - time.monotonic()
    for _ in range(5):
        at = time.monotonic()
        now = seconds + float(FACTS["rtc_lag"]) + at - ticked
        time.clock_settime(time.CLOCK_REALTIME, now)
        # Another process may have had the processor in between.
        if time.monotonic() - at < SURE:
            break
    old = old_ahead + at
    if os.path.exists(CLOUD_INIT_LOG):
        move_log(old, now)


def move_log(old: float, now: float) -> None:
    """Move the times of what cloud-init has logged in this boot, from an old clock to a new one.

    Otherwise the time that the machine was saved would be part of a stage, whose length its own
    tools show (`cloud-init analyze`). Nothing else changes, not even the file's length: programs
    that write to it continue at its end.
    """
    begun = old - time.monotonic() - 1
    with open(CLOUD_INIT_LOG, "r+b") as file:
        lines = file.read().split(b"\n")
        for number, line in enumerate(lines):
            # 2026-11-30 03:18:47,055 - util.py[DEBUG]: what there is to say
            at = parse_time(line[:23])
            if begun <= at <= old:
                lines[number] = format_time(at + now - old) + line[23:]
        file.seek(0)
        file.write(b"\n".join(lines))


def parse_time(text: bytes) -> float:
    """Read a time of cloud-init's log, which is in UTC; 0 where there is none."""
    try:
        year, month, day = int(text[:4]), int(text[5:7]), int(text[8:10])
        hours, minutes, millis = int(text[11:13]), int(text[14:16]), int(text[17:19] + text[20:])
    except ValueError:
        return 0
    # Years begin with March here, so that they end with the leap day.
    if month < 3:
        year, month = year - 1, month + 12
    days = 365 * year + year // 4 - year // 100 + year // 400 + (153 * month - 457) // 5 + day
    return (days - 719469) * 86400 + hours * 3600 + minutes * 60 + millis / 1000


def format_time(seconds: float) -> bytes:
    """Write a time as cloud-init's log has it."""
    millis = round(seconds * 1000)
    text = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(millis // 1000))
    return "{},{:03}".format(text, millis % 1000).encode()


def take_machine_id() -> None:
    """Change the machine-id, also that of D-Bus and of the journal."""
    old, new = read(MACHINE_ID), FACTS["machine_id"]
    if old == new:
        return
    if os.path.exists(TRANSIENT_MACHINE_ID):
        # It has to stay the same file.
        with open(TRANSIENT_MACHINE_ID, "r+", encoding="ascii") as file:
            file.write(new)
    if read(MACHINE_ID) != new:
        write(MACHINE_ID, new + "\n")
    if os.path.isfile(DBUS_MACHINE_ID) and read(DBUS_MACHINE_ID) != new:
        write(DBUS_MACHINE_ID, new + "\n", 0o644)
    moved = [base for base in JOURNALS if move(base, old, new)]
    if moved:
        # It identifies its files by their paths.
        restart = ["systemctl", "--no-block", "restart", "systemd-journald.service"]
        if os.spawnvp(os.P_WAIT, restart[0], restart) != 0:
            raise OSError("systemd did not restart the journal")


def move(base: str, old: str, new: str) -> bool:
    """Move the journal of a machine to another machine-id; return whether there is one."""
    if not os.path.isdir(base + old):
        return False
    for name in os.listdir(base + old):
        with open(base + old + "/" + name, "r+b") as file:
            file.seek(JOURNAL_MACHINE_ID)
            file.write(bytes.fromhex(new))
    os.rename(base + old, base + new)
    return True


def fix_up(late: bool) -> "list[str]":
    """Fix up the machine; return the problems."""
    problems = []
    if late:
        problems.append("cloud-init did not run this program, its modules came before")
    for step in (stir_random_numbers, set_clock, take_machine_id):
        try:
            step()
        except Exception as error:  # noqa: BLE001 - reported to the host; the next step follows
            problems.append("{}: {!r}".format(step.__name__, error))
    if problems:
        with open(PROBLEMS, "w", encoding="utf-8", errors="replace") as file:
            file.write("; ".join(problems))
    return problems


def main(late: bool = False) -> None:
    if is_itself():
        problems = [read(PROBLEMS)] if os.path.exists(PROBLEMS) else []
    elif is_later_boot():
        problems = ["it was started again before, or somebody changed its machine-id"]
    else:
        problems = fix_up(late)
    os.makedirs(os.path.dirname(RESULT), exist_ok=True)
    with open(RESULT, "w", encoding="utf-8", errors="replace") as file:
        file.write("; ".join(problems))


if __name__ == "__main__":
    main(late=sys.argv[0] == "-")
    # cloud-init's copy of it: a boot from its beginning has none.
    if "/boothooks/" in sys.argv[0]:
        os.unlink(sys.argv[0])
        if not os.listdir(os.path.dirname(sys.argv[0])):
            os.rmdir(os.path.dirname(sys.argv[0]))
