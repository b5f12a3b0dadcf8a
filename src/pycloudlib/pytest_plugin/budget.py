"""What all test processes of a host may use at once: processors and memory.

With many workers on few processors, machines that all run get in each other's way, and each test
takes longer than its limits. So a worker that wants a machine waits until there is room for it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pycloudlib.files import create_private_directory, exclusive_lock, trying_lock
from pycloudlib.qemu.spec import InstanceType

# Of the host's memory; the rest is for the host, and for the tests themselves.
_MEMORY_SHARE = 0.75
# Only the process that waits longest looks for room.
_LOOK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Room:
    """An amount of what machines use.

    Attributes:
        processors: How many.
        memory_mib: MiB of memory.
    """

    processors: int
    memory_mib: int

    @classmethod
    def of_host(cls) -> Room:
        """Give what machines may use on this host: its processors, and most of its memory."""
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return cls(len(os.sched_getaffinity(0)), int(memory * _MEMORY_SHARE) >> 20)

    @classmethod
    def of_machine(cls, instance_type: InstanceType) -> Room:
        """Give what a machine of a size uses."""
        return cls(instance_type.cpus, instance_type.memory_mib)

    def fits(self, whole: Room, taken: Room) -> bool:
        """Say whether there is still room for this in a whole of which some is taken."""
        return (
            taken.processors + self.processors <= whole.processors
            and taken.memory_mib + self.memory_mib <= whole.memory_mib
        )


class Budget:
    """A budget that processes of one user share, and take from for as long as they live.

    What is taken is told by locked files, which the kernel unlocks when their process ends, however
    it does.

    A process that has something already does not wait for more, it takes it: else two processes
    with one machine each, which both want a second one, would wait for each other for ever.

    Args:
        directory: Where the files are; made when there is something to take.
        whole: What there is.
    """

    def __init__(self, directory: Path, whole: Room) -> None:
        self._directory = directory
        self._whole = whole
        self._held = 0

    @contextlib.contextmanager
    def taking(self, room: Room, on_wait: Callable[[], None]) -> Iterator[None]:
        """Take some of it inside the block; more than there is can be taken when nothing is.

        Args:
            room: How much.
            on_wait: Called, once, when there is no room yet.
        """
        create_private_directory(self._directory)
        with contextlib.ExitStack() as stack:
            if not self._take(room, stack):
                on_wait()
                with exclusive_lock(self._directory / "queue"):
                    while not self._take(room, stack):
                        time.sleep(_LOOK_SECONDS)
            yield

    def _take(self, room: Room, stack: contextlib.ExitStack) -> bool:
        with exclusive_lock(self._directory / "lock"):
            taken = self._count_taken()
            if taken.processors and not self._held and not room.fits(self._whole, taken):
                return False
            name = f"{room.processors}-{room.memory_mib}-{secrets.token_hex(8)}.taken"
            file = self._directory / name
            stack.enter_context(exclusive_lock(file))
            stack.callback(file.unlink)
            self._held += 1
            stack.callback(self._count_less)
            return True

    def _count_less(self) -> None:
        self._held -= 1

    def _count_taken(self) -> Room:
        processors = memory_mib = 0
        for file in self._directory.glob("*.taken"):
            # Its process may end, and another one remove the file, at any time.
            with contextlib.suppress(FileNotFoundError), trying_lock(file) as free:
                if free:
                    file.unlink()
                    continue
                counts = file.stem.split("-")
                processors += int(counts[0])
                memory_mib += int(counts[1])
        return Room(processors, memory_mib)
