"""Ends the machines of a program that dies; see `guardian.py`.

Not imported: its text is run by a Python of its own, which has nothing but the standard library.
Arguments: the program's pid, for people, and the mark of its machines. Descriptor 3 is a pidfd of
the program: no pid is compared, as /proc may show another PID namespace than its own.
"""

import os
import select
import signal
import sys
import time

MARK = b"PYCLOUDLIB_OWNER="
PROGRAM = 3
# A QEMU that was being born when the program died may come to be seen a moment later.
LOOKS = 8
PAUSE = 0.05


def wait_for_end(program: int) -> None:
    poller = select.poll()
    poller.register(program, select.POLLIN)
    while not poller.poll():
        pass


def read_environment(process: int) -> bytes:
    """Read the environment of the process whose directory of /proc is open."""
    file = os.open("environ", os.O_RDONLY, dir_fd=process)
    with os.fdopen(file, "rb") as environment:
        return environment.read()


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
            # The directory stays that very process's, and signals can be sent through it.
            process = os.open(f"/proc/{name}", os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            variables = read_environment(process).split(b"\0")
            if any(mark in variables for mark in marks):
                signal.pidfd_send_signal(process, signal.SIGKILL)
                found = True
        except OSError:
            continue  # another user's, or gone
        finally:
            os.close(process)
    return found


def main() -> None:
    _pid, token = sys.argv[1:]
    # Nobody is to wait for what the program had open, nor for the directory that it was in.
    os.closerange(PROGRAM + 1, 4096)
    os.chdir("/")
    wait_for_end(PROGRAM)
    reaped = ["reap"] if ended_normally() else ["reap", "reap-after-crash"]
    marks = [MARK + f"{token} {orphans}".encode() for orphans in reaped]
    looks = 0
    while looks < LOOKS:
        looks = 0 if end_machines(marks) else looks + 1
        time.sleep(PAUSE)


main()
