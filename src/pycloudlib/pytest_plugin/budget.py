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

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.files import create_private_directory
from pycloudlib._base.locks import exclusive_lock, try_lock
from pycloudlib.errors import PycloudlibTimeoutError
from pycloudlib.qemu.host.resources import HostLimits
from pycloudlib.qemu.state.spec import InstanceType

# Of the memory that there is; the rest is for the host, and for the tests themselves.
_MEMORY_SHARE = 0.75
# Only the process that waits longest looks for room.
_LOOK_SECONDS = 0.1
# Others' tests may take long; but who waits for ever cannot be told from who hangs.
_LIMIT = 3600.0
_SUFFIX = ".taken"


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
        """Return what machines may use here: the processors, and most of the memory.

        In a container that is what the container may use.
        """
        limits = HostLimits.read()
        return cls(limits.processors, int(limits.memory * _MEMORY_SHARE) >> 20)

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


@dataclass(frozen=True, slots=True)
class _Share:
    """What a process has taken, which the name of a file tells.

    Attributes:
        room: How much.
        pid: The process.
    """

    room: Room
    pid: int

    def file_name(self) -> str:
        """Make a name that no other share has."""
        numbers = f"{self.room.processors}-{self.room.memory_mib}-{self.pid}"
        return f"{numbers}-{secrets.token_hex(8)}{_SUFFIX}"

    @classmethod
    def parse(cls, name: str) -> _Share:
        """Read such a name."""
        processors, memory_mib, pid = map(int, name.split("-")[:3])
        return cls(Room(processors, memory_mib), pid)


class Budget:
    """A budget that processes of one user share, and take from for as long as they live.

    What is taken is told by locked files, which the kernel unlocks when their process ends, however
    it does. Who waits does so in a queue: a machine that needs much is not overtaken for ever.

    A process that has something already does not wait for more, it takes it: else two processes
    with one machine each, which both want a second one, would wait for each other for ever.

    Args:
        directory: Where the files are; made when there is something to take.
        whole: What there is.
        limit: Seconds after which waiting is given up.
    """

    def __init__(self, directory: Path, whole: Room, limit: float = _LIMIT) -> None:
        self._directory = directory
        self._whole = whole
        self._limit = limit
        self._held = 0

    @contextlib.contextmanager
    def taking(self, room: Room, on_wait: Callable[[str], None]) -> Iterator[None]:
        """Take some of it inside the block; more than there is can be taken when nothing is.

        Args:
            room: How much.
            on_wait: Called, once, when there is no room yet, with who has it.

        Raises:
            PycloudlibTimeoutError: There was none for long.
        """
        create_private_directory(self._directory)
        with contextlib.ExitStack() as stack:
            if not (self._held and self._take(room, stack)):
                self._wait(room, stack, on_wait)
            yield

    def _wait(
        self, room: Room, stack: contextlib.ExitStack, on_wait: Callable[[str], None]
    ) -> None:
        deadline = Deadline.after(self._limit)
        told: list[str] = []

        def tell(_process: str = "") -> None:
            if not told:
                told.append(self._holders())
                on_wait(told[0])

        with exclusive_lock(self._directory / "queue", tell):
            while not self._take(room, stack):
                tell()
                if deadline.expired:
                    raise PycloudlibTimeoutError(
                        f"No room for a machine of {room.processors} processors and "
                        f"{room.memory_mib} MiB for {self._limit:.0f} s: {self._holders()} "
                        f"of {self._whole.processors} processors, {self._whole.memory_mib} MiB"
                    )
                time.sleep(_LOOK_SECONDS)

    def _take(self, room: Room, stack: contextlib.ExitStack) -> bool:
        with exclusive_lock(self._directory / "lock"):
            taken = self._count_taken()
            if taken.processors and not self._held and not room.fits(self._whole, taken):
                return False
            share = _Share(room, os.getpid())
            file = self._directory / share.file_name()
            stack.enter_context(exclusive_lock(file, remove=True))
            self._held += 1
            stack.callback(self._count_less)
            return True

    def _count_less(self) -> None:
        self._held -= 1

    def _count_taken(self) -> Room:
        shares = [share.room for share in self._shares()]
        return Room(
            sum(room.processors for room in shares), sum(room.memory_mib for room in shares)
        )

    def _shares(self) -> list[_Share]:
        """List what is taken; what processes left that have ended is removed."""
        found = []
        for file in self._directory.glob(f"*{_SUFFIX}"):
            # Its process may end, and another one remove the file, at any time.
            with contextlib.suppress(FileNotFoundError), try_lock(file) as free:
                if free:
                    file.unlink()
                else:
                    found.append(_Share.parse(file.name))
        return found

    def _holders(self) -> str:
        """Say who has what."""
        shares = self._shares()
        taken = sum(share.room.processors for share in shares)
        pids = ", ".join(sorted({str(share.pid) for share in shares})) or "others"
        return f"machines of processes {pids} have {taken}"
