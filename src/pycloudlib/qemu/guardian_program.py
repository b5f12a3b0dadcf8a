"""Ends the machines of a program that dies; see `guardian.py`.

Not imported: its text is run by a Python of its own, which has nothing but the standard library.
Arguments: the program's pid, its start time (proc(5), field 22), and the mark of its machines.
"""

import os
import select
import signal
import sys
import time

MARK = b"PYCLOUDLIB_OWNER="
# A QEMU that was being born when the program died may come to be seen a moment later.
LOOKS = 8
PAUSE = 0.05


def is_program(pid: int, start_time: str) -> bool:
    try:
        # The name in it is bytes of anybody's choice.
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19] == start_time.encode()
    except OSError:
        return False


def wait_for_end(pid: int, start_time: str) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    # Looked at only now: the descriptor holds on to whatever process has the pid.
    if is_program(pid, start_time):
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        while not poller.poll():
            pass


def ended_normally() -> bool:
    os.set_blocking(0, False)
    try:
        return os.read(0, 1) != b""
    except BlockingIOError:
        return False


def end_machines(marks: "list[bytes]") -> bool:
    """End all processes that have one of these marks; say whether there were any."""
    found = False
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            descriptor = os.pidfd_open(int(name))
        except OSError:
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                variables = file.read().split(b"\0")
            if any(mark in variables for mark in marks):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                found = True
        except OSError:
            continue  # another user's, or gone
        finally:
            os.close(descriptor)
    return found


def main() -> None:
    pid, start_time, token = sys.argv[1:]
    # Nobody is to wait for what the program had open, nor for the directory that it was in.
    os.closerange(3, 4096)
    os.chdir("/")
    wait_for_end(int(pid), start_time)
    reaped = ["reap"] if ended_normally() else ["reap", "reap-after-crash"]
    marks = [MARK + f"{token} {orphans}".encode() for orphans in reaped]
    looks = 0
    while looks < LOOKS:
        looks = 0 if end_machines(marks) else looks + 1
        time.sleep(PAUSE)


main()
