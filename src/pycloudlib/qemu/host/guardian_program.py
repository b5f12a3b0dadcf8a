"""Ends the machines of a program that dies; see `Guardian` in `ownership.py`.

It is not imported: another Python runs its text, with nothing but the standard library. Its
arguments are the program's pid, for people, and the mark of its machines. Descriptor 3 is a pidfd
of the program; no pid is compared, since /proc may show another PID namespace than the program's.
"""

import os
import select
import signal
import sys
import time

MARK = b"PYCLOUDLIB_OWNER="
PROGRAM = 3
# A QEMU that was being started when the program died may appear a moment later.
SCANS = 8
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
    """Kill all processes that have one of these marks; return whether there were any."""
    found = False
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            # The open directory stays this process's, and signals can be sent through it.
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
    # Neither files that the program had open nor its directory must stay in use.
    os.closerange(PROGRAM + 1, 4096)
    os.chdir("/")
    wait_for_end(PROGRAM)
    reaped = ["reap"] if ended_normally() else ["reap", "reap-after-crash"]
    marks = [MARK + f"{token} {orphans}".encode() for orphans in reaped]
    scans = 0
    while scans < SCANS:
        scans = 0 if end_machines(marks) else scans + 1
        time.sleep(PAUSE)


main()
