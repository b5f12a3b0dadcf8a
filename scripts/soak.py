"""Launch, use and delete machines for a long time, some of them killed meanwhile: nothing may grow.

    python -m scripts.soak [--minutes 30] [--rounds N] [--kills 0.3]

Copies of one saved machine; each runs a command and is deleted. Of some, QEMU is killed while the
command runs: then the error has to say so. Prints descriptors, threads and memory as they go.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import random
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import paramiko

from pycloudlib import Qemu
from pycloudlib.diagnosis import Cause
from pycloudlib.errors import PycloudlibException
from pycloudlib.qemu.instance import QemuInstance

SHOWN_EVERY = 25
# What may be more at the end than after the first rounds: caches of the allocator.
MEMORY_SLACK_MIB = 20


@dataclass(frozen=True, slots=True)
class Usage:
    """What this process has.

    Attributes:
        descriptors: Open file descriptors.
        threads: Threads.
        memory_mib: Resident memory.
        children: Processes that it has started and that run.
    """

    descriptors: int
    threads: int
    memory_mib: int
    children: int

    @classmethod
    def now(cls) -> Usage:
        """Look."""
        gc.collect()
        status = Path("/proc/self/status").read_text()
        resident = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return cls(
            len(list(Path("/proc/self/fd").iterdir())),
            threading.active_count(),
            int(resident.split()[1]) >> 10,
            len(children),
        )


def use(machine: QemuInstance, *, kill: bool, moments: random.Random) -> bool:
    """Run a command in a machine; say whether it was killed meanwhile, and that was told."""
    pid = machine.machine.pid
    killer = threading.Timer(moments.uniform(0, 0.5), os.kill, (pid, signal.SIGKILL))
    if not kill:
        assert machine.execute("echo here") == "here"
        return False
    killer.start()
    try:
        while machine.execute("echo here").ok:
            pass
    except (PycloudlibException, paramiko.SSHException) as error:
        told = getattr(error, "diagnosis", None)
        if told is None or told.cause is not Cause.QEMU_KILLED:
            raise
    finally:
        killer.join()
    return True


def soak(cloud: Qemu, image: str, minutes: float, rounds: int, kills: float) -> None:
    """Go on for so long, or so many rounds."""
    moments = random.Random(1)  # noqa: S311 - it is to be the same again
    ends = time.monotonic() + minutes * 60
    first, killed, number = Usage.now(), 0, 0
    while time.monotonic() < ends and (not rounds or number < rounds):
        number += 1
        with cloud.launch(image) as machine:
            killed += use(machine, kill=moments.random() < kills, moments=moments)
        if number == SHOWN_EVERY:
            first = Usage.now()  # by now all is loaded that is loaded when first used
        if number % SHOWN_EVERY == 0:
            print(f"{number} rounds, {killed} killed: {Usage.now()}", flush=True)
    last = Usage.now()
    print(f"{number} rounds, {killed} killed; after {SHOWN_EVERY}: {first}; at the end: {last}")
    left = [str(path.parent) for path in cloud.parent_dir.glob("*/machine.json")]
    grown = (
        last.descriptors > first.descriptors + 2
        or last.threads > first.threads + 1
        or last.memory_mib > first.memory_mib + MEMORY_SLACK_MIB
        or last.children > first.children
    )
    if grown or left:
        sys.exit(f"Something has grown, or was left behind: {left}")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=0, help="at most; default: no limit")
    parser.add_argument("--kills", type=float, default=0.3, help="share; default: %(default)s")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    with Qemu(tag="soak") as cloud:
        source = cloud.launch(cloud.build_image(), "c1m512", fast_boot=True)
        source.wait()
        image = cloud.snapshot(source, memory=True)
        source.delete()
        soak(cloud, image, arguments.minutes, arguments.rounds, arguments.kills)


if __name__ == "__main__":
    main()
