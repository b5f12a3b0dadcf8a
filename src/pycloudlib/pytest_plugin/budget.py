"""The processors and memory that the machines of all test processes of a host may use at once.

With many workers on few processors, machines that run at the same time slow each other down until
tests time out. So a worker that wants a machine waits until the machine fits into the budget.
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
from pycloudlib.qemu.parts.standard import InstanceType

# The rest is for the host, and for the tests themselves.
_MEMORY_SHARE = 0.75
# Only the process that has waited longest polls.
_POLL_SECONDS = 0.1
# Tests of others may take long; but a process that waits for ever looks like one that hangs.
_LIMIT = 3600.0
_SUFFIX = ".taken"


@dataclass(frozen=True, slots=True)
class Capacity:
    """Processors and memory.

    Attributes:
        processors: Number of processors.
        memory_mib: MiB of memory.
    """

    processors: int
    memory_mib: int

    @classmethod
    def of_host(cls, limits: HostLimits | None = None) -> Capacity:
        """Return what machines may use here: the processors, and most of the memory.

        In a container that is what the container may use.

        Args:
            limits: What the host has; by default it is looked up.
        """
        limits = limits or HostLimits.read()
        return cls(limits.processors, int(limits.memory * _MEMORY_SHARE) >> 20)

    @classmethod
    def of_machine(cls, instance_type: InstanceType) -> Capacity:
        """Return what a machine of a size uses."""
        return cls(instance_type.cpus, instance_type.memory_mib)

    def fits(self, whole: Capacity, reserved: Capacity) -> bool:
        """Whether this fits into a whole of which some is reserved."""
        return (
            reserved.processors + self.processors <= whole.processors
            and reserved.memory_mib + self.memory_mib <= whole.memory_mib
        )


@dataclass(frozen=True, slots=True)
class _Reservation:
    """What a process has reserved, as the name of a file.

    Attributes:
        capacity: How much.
        pid: The process.
    """

    capacity: Capacity
    pid: int

    def file_name(self) -> str:
        """Return a file name that no other reservation has."""
        numbers = f"{self.capacity.processors}-{self.capacity.memory_mib}-{self.pid}"
        return f"{numbers}-{secrets.token_hex(8)}{_SUFFIX}"

    @classmethod
    def parse(cls, name: str) -> _Reservation:
        """Parse such a file name."""
        processors, memory_mib, pid = map(int, name.split("-")[:3])
        return cls(Capacity(processors, memory_mib), pid)


class Budget:
    """A budget of which all processes of one user reserve parts, until they end at the latest.

    A reservation is a locked file, which the kernel unlocks when its process ends in any way.
    Processes wait in a queue, so that small machines do not overtake a large one for ever.

    A process that has a reservation does not wait for another: else two processes with one machine
    each, which both want a second one, would wait for each other for ever.

    Args:
        directory: Where the files are; made when it is needed.
        whole: What all processes together may reserve.
        limit: Seconds after which a wait fails.
    """

    def __init__(self, directory: Path, whole: Capacity, limit: float = _LIMIT) -> None:
        self._directory = directory
        self._whole = whole
        self._limit = limit
        self._held = 0

    @contextlib.contextmanager
    def reserving(self, capacity: Capacity, on_wait: Callable[[str], None]) -> Iterator[None]:
        """Reserve a part inside the block; one larger than the whole if nothing else is reserved.

        Args:
            capacity: The part.
            on_wait: Called once, if the part does not fit yet, with who has reserved the rest.

        Raises:
            PycloudlibTimeoutError: It did not fit within the limit.
        """
        create_private_directory(self._directory)
        with contextlib.ExitStack() as stack:
            if not (self._held and self._reserve(capacity, stack)):
                self._wait(capacity, stack, on_wait)
            yield

    def _wait(
        self, capacity: Capacity, stack: contextlib.ExitStack, on_wait: Callable[[str], None]
    ) -> None:
        deadline = Deadline.after(self._limit)
        reported: list[str] = []

        def report(_process: str = "") -> None:
            if not reported:
                reported.append(self._describe_holders())
                on_wait(reported[0])

        with exclusive_lock(self._directory / "queue", report):
            while not self._reserve(capacity, stack):
                report()
                if deadline.expired:
                    raise PycloudlibTimeoutError(
                        f"A machine of {capacity.processors} processors and {capacity.memory_mib} "
                        f"MiB did not fit for {self._limit:.0f} s: {self._describe_holders()} "
                        f"of {self._whole.processors} processors, {self._whole.memory_mib} MiB"
                    )
                time.sleep(_POLL_SECONDS)

    def _reserve(self, capacity: Capacity, stack: contextlib.ExitStack) -> bool:
        with exclusive_lock(self._directory / "lock"):
            reserved = self._count_reserved()
            if reserved.processors and not self._held and not capacity.fits(self._whole, reserved):
                return False
            file = self._directory / _Reservation(capacity, os.getpid()).file_name()
            stack.enter_context(exclusive_lock(file, remove=True))
            self._held += 1
            stack.callback(self._release)
            return True

    def _release(self) -> None:
        self._held -= 1

    def _count_reserved(self) -> Capacity:
        parts = [reservation.capacity for reservation in self._reservations()]
        return Capacity(
            sum(part.processors for part in parts), sum(part.memory_mib for part in parts)
        )

    def _reservations(self) -> list[_Reservation]:
        """List the reservations; remove those of processes that have ended."""
        found = []
        for file in self._directory.glob(f"*{_SUFFIX}"):
            # Its process may end, and another one remove the file, at any time.
            with contextlib.suppress(FileNotFoundError), try_lock(file) as free:
                if free:
                    file.unlink()
                else:
                    found.append(_Reservation.parse(file.name))
        return found

    def _describe_holders(self) -> str:
        """Return which processes have reserved how many processors."""
        reservations = self._reservations()
        processors = sum(reservation.capacity.processors for reservation in reservations)
        pids = ", ".join(sorted({str(reservation.pid) for reservation in reservations})) or "others"
        return f"machines of processes {pids} have {processors}"
