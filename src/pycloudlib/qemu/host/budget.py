"""The processors and memory that the machines of all programs of a user may use at once.

With many machines on few processors, those that run or boot at the same time slow each other down
until waits time out. So whoever wants a machine waits until the machine fits into the budget.

The budget is a directory. Each part that is reserved is a locked file, which the kernel unlocks
when its process ends in any way, and so is the ticket of each thread that waits. File names say
everything else.

Waiting never ends in a deadlock: a process with a machine in use waits only for what comes back by
itself, parts of machines that boot, and spares. Otherwise two processes with one machine each that
both want a second one would wait for each other for ever.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.files import create_private_directory, moved
from pycloudlib._base.locks import exclusive_lock, is_locked
from pycloudlib.errors import PycloudlibTimeoutError
from pycloudlib.qemu.host.resources import HostLimits

_log = logging.getLogger(__name__)

# The rest is for the host, and for the tests themselves.
_MEMORY_SHARE = 0.75
# Of each process, only the thread that has waited longest looks.
_POLL_SECONDS = 0.1
# Tests of others may take long; but a process that waits for ever looks like one that hangs.
_LIMIT = 3600.0
_PATIENCE = 5.0
_RESERVED, _TICKET, _WANTED = ".taken", ".waiting", ".wanted"
_WRITE = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW

# Which process this is, in names of files: unlike its pid, also in other PID namespaces.
_process = secrets.token_hex(8)
# The tickets of this process's threads in the order of their numbers, by their directories.
_lines: dict[Path, list[_Ticket]] = {}


def _become_another_process() -> None:
    global _process  # noqa: PLW0603 - a forked child has none of what its parent has
    _process = secrets.token_hex(8)
    _lines.clear()


os.register_at_fork(after_in_child=_become_another_process)


class _Size(Protocol):
    @property
    def cpus(self) -> int: ...

    @property
    def memory_mib(self) -> int: ...


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
    def of_machine(cls, instance_type: _Size) -> Capacity:
        """Return what a machine of a size uses."""
        return cls(instance_type.cpus, instance_type.memory_mib)

    def __add__(self, other: Capacity) -> Capacity:
        """Return both together."""
        return Capacity(self.processors + other.processors, self.memory_mib + other.memory_mib)

    def fits(self, whole: Capacity, reserved: Capacity) -> bool:
        """Whether this fits into a whole of which some is reserved.

        What is larger than the whole fits if nothing else is reserved.
        """
        return all(
            not wanted or used + min(wanted, most) <= most
            for wanted, used, most in (
                (self.processors, reserved.processors, whole.processors),
                (self.memory_mib, reserved.memory_mib, whole.memory_mib),
            )
        )


_NOTHING = Capacity(0, 0)


class _Kind(enum.Enum):
    """What a part is reserved for."""

    USE = "use"  # until its owner gives it back
    BOOT = "boot"  # ends by itself
    SPARE = "spare"  # given back when it is wanted


@dataclass(frozen=True, slots=True)
class _Reservation:
    """What a process has reserved, as the name of a file.

    Attributes:
        capacity: How much.
        pid: The process.
        process: Which process that is, whatever its PID namespace; "" if it does not say so.
        kind: What for.
    """

    capacity: Capacity
    pid: int
    process: str
    kind: _Kind

    def file_name(self) -> str:
        """Return a file name that no other reservation has."""
        numbers = f"{self.capacity.processors}-{self.capacity.memory_mib}-{self.pid}"
        return f"{numbers}-{self.process}-{self.kind.value}-{secrets.token_hex(8)}{_RESERVED}"

    @classmethod
    def parse(cls, name: str) -> _Reservation:
        """Parse such a file name."""
        processors, memory_mib, pid, *rest = name.removesuffix(_RESERVED).split("-")
        process, kind = rest[:2] if len(rest) > 1 else ("", "")
        kinds = [known for known in _Kind if known.value == kind]
        capacity = Capacity(int(processors), int(memory_mib))
        return cls(capacity, int(pid), process, kinds[0] if kinds else _Kind.USE)


class _Held:
    """A part that this process has reserved, until the block ends."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lock = exclusive_lock(file, remove=True)
        # A list, whose `pop` is one step: whoever gives the part back, it is given back once.
        self._locks = [lock]
        lock.__enter__()

    def __bool__(self) -> bool:
        """Whether it was not given back."""
        return bool(self._locks)

    def release(self) -> bool:
        """Give it back; return False if it was given back before."""
        try:
            lock = self._locks.pop()
        except IndexError:
            return False
        lock.__exit__(None, None, None)
        return True

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


@dataclass(frozen=True, slots=True)
class _Ticket:
    """The place of a thread among those who wait, as the name of a file.

    Attributes:
        number: Lower ones come first.
        capacity: How much it waits for.
        process: The process; see `_Reservation`.
    """

    number: int
    capacity: Capacity
    process: str

    @property
    def name(self) -> str:
        """The name of its file."""
        wanted = f"{self.capacity.processors}-{self.capacity.memory_mib}"
        return f"{self.number}-{wanted}-{self.process}{_TICKET}"

    @classmethod
    def parse(cls, name: str) -> _Ticket:
        """Parse such a file name."""
        number, processors, memory_mib, process = name.removesuffix(_TICKET).split("-")
        return cls(int(number), Capacity(int(processors), int(memory_mib)), process)


@dataclass(slots=True)
class _Request:
    """What is asked for.

    Attributes:
        parts: What is to be reserved, all or nothing.
        ticket: Its place among those who wait; None before it is waited for.
        asked: The spares that were asked for, and when, in `time.monotonic` seconds.
        returning: Whether nothing is in its way but spares that were just asked for.
    """

    parts: Sequence[tuple[Capacity, _Kind]]
    ticket: _Ticket | None = None
    asked: dict[Path, float] = field(default_factory=dict)
    returning: bool = False

    @property
    def capacity(self) -> Capacity:
        """How much it is in all."""
        return sum((capacity for capacity, _kind in self.parts), _NOTHING)


class Spare:
    """A part that is given back as soon as it is wanted; made by `Budget.try_spare`.

    It is held until it is released, even if it is dropped. Safe to use from several threads.
    """

    def __init__(self, budget: Budget, capacity: Capacity, on_wanted: Callable[[], None]) -> None:
        self._budget = budget
        self._capacity = capacity
        self._on_wanted = on_wanted
        self._pid = os.getpid()
        self._asked_for = False
        self._speaking = -1
        self._held = _Held(budget.new_file(capacity, _Kind.SPARE))
        # Those who want the part write to this FIFO.
        self._fifo = self._held.file.with_suffix(_WANTED)
        try:
            os.mkfifo(self._fifo, 0o600)
            # The thread alone closes the one, who ends the reservation the other: so neither is
            # used when it is closed, and is another file perhaps.
            listening = moved(os.open(self._fifo, os.O_RDWR | os.O_CLOEXEC))
            self._speaking = moved(os.open(self._fifo, _WRITE))
            threading.Thread(
                target=self._listen, args=(listening,), name="budget-spare", daemon=True
            ).start()
        except BaseException:
            self._end()
            raise

    def promote(self) -> contextlib.AbstractContextManager[None] | None:
        """Make it an ordinary reservation, which ends with the block of the returned manager.

        Returns:
            None if it was given back, or is wanted by now.
        """
        if self._pid != os.getpid():
            return None
        with self._budget.locked():
            if self._asked_for or not self._held:
                return None
            held = _Held(self._budget.new_file(self._capacity, _Kind.USE))
            if not self._end():
                held.release()
                return None
        return held

    def release(self) -> None:
        """Give it back; idempotent, and without effect in a forked child."""
        if self._pid == os.getpid():
            self._end()

    def _end(self) -> bool:
        """End the reservation; return whether it was not ended before."""
        if not self._held.release():
            return False
        try:
            self._fifo.unlink(missing_ok=True)
        finally:
            self._stop_listening()
        return True

    def _stop_listening(self) -> None:
        if self._speaking >= 0:
            with contextlib.suppress(BrokenPipeError, BlockingIOError):  # it has stopped already
                os.write(self._speaking, b"\n")
            os.close(self._speaking)

    def _is_wanted(self) -> bool:
        """Whether it is to be given back: from now on it is not promoted, or it has been before."""
        with self._budget.locked():
            self._asked_for = bool(self._held)
            return self._asked_for

    def _listen(self, descriptor: int) -> None:
        try:
            os.read(descriptor, 1)
            if self._held and self._is_wanted():
                self._on_wanted()
        except Exception:  # noqa: BLE001 - nobody is there to get it
            _log.exception("A spare part of the budget could not be given back")
        finally:
            os.close(descriptor)


class Admission:
    """What a machine that boots has reserved; made by `Budget.admit`. Safe to use from threads."""

    def __init__(self, boot: _Held, memory: _Held) -> None:
        self._boot = boot
        self._memory = memory

    @property
    def boots(self) -> bool:
        """Whether its processors are reserved."""
        return bool(self._boot)

    def end_boot(self) -> None:
        """Give its processors back, since it has booted or will not; idempotent."""
        self._boot.release()

    def release(self) -> None:
        """Give all back; idempotent."""
        self._boot.release()
        self._memory.release()


class Budget:
    """A budget of which all processes of one user reserve parts, until they end at the latest.

    Who waits is served in the order of arrival, so that small machines do not overtake a large one
    for ever; only a process with a machine in use, which waits for less, may pass others.
    Safe to use from several threads.

    Args:
        directory: Where the files are; made when it is needed.
        whole: What all processes together may reserve.
        limit: Seconds after which a wait fails.
        patience: Seconds until a spare that was asked for, and is not given back, is not counted
            on.
    """

    def __init__(
        self,
        directory: Path,
        whole: Capacity,
        limit: float = _LIMIT,
        patience: float = _PATIENCE,
    ) -> None:
        self._directory = directory
        self._whole = whole
        self._limit = limit
        self._patience = patience

    @contextlib.contextmanager
    def reserving(self, capacity: Capacity, on_wait: Callable[[str], None]) -> Iterator[None]:
        """Reserve a part inside the block; one larger than the whole if nothing else is reserved.

        Args:
            capacity: The part.
            on_wait: Called once, if the part does not fit yet, with who has reserved the rest; not
                where only spares have to be given back.

        Raises:
            PycloudlibTimeoutError: It did not fit within the limit.
        """
        with contextlib.ExitStack() as stack:
            self._reserve_or_wait([(capacity, _Kind.USE)], stack, lambda who, _of: on_wait(who))
            yield

    def admit(self, capacity: Capacity, on_wait: Callable[[str], None]) -> Admission:
        """Reserve what a machine needs that boots: its processors until then, and its memory.

        Args:
            capacity: What it needs.
            on_wait: Called as in `reserving`; it gets the memory, too.

        Raises:
            PycloudlibTimeoutError: It did not fit within the limit.
        """
        parts = (
            (Capacity(capacity.processors, 0), _Kind.BOOT),
            (Capacity(0, capacity.memory_mib), _Kind.USE),
        )
        with contextlib.ExitStack() as stack:
            admission = Admission(
                *self._reserve_or_wait(parts, stack, lambda who, of: on_wait(who + of))
            )
            stack.pop_all()
        return admission

    def try_spare(self, capacity: Capacity, on_wanted: Callable[[], None]) -> Spare | None:
        """Reserve a part that is given back as soon as it is wanted.

        It is wanted when some process or thread begins to wait. As many spares as that needs are
        asked for, the newest first. The process does not count as one with a machine in use.

        Args:
            capacity: The part.
            on_wanted: Called once when it is wanted, at once, in a thread of its own: it has the
                spare released.

        Returns:
            None if it does not fit now, or anybody waits.
        """
        with self.locked():
            self._remove_ended()
            reserved = self._reservations().values()
            if self._tickets() or not capacity.fits(self._whole, _total(reserved)):
                return None
            try:
                return Spare(self, capacity, on_wanted)
            except OSError as error:
                # The file system has no FIFOs, perhaps; everything works without spares.
                _log.info("No spare part of the budget can be reserved: %s", error)
                return None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from reserving anything in the block."""
        create_private_directory(self._directory)
        with exclusive_lock(self._directory / "lock"):
            yield

    def new_file(self, capacity: Capacity, kind: _Kind) -> Path:
        """Return a file for a part that this process reserves; it is not made yet."""
        return self._directory / _Reservation(capacity, os.getpid(), _process, kind).file_name()

    def _reserve_or_wait(
        self,
        parts: Sequence[tuple[Capacity, _Kind]],
        stack: contextlib.ExitStack,
        on_wait: Callable[[str, str], None],
    ) -> Sequence[_Held]:
        """Reserve parts, all or nothing, and wait for them if need be; `stack` gives them back."""
        request = _Request(parts)
        return self._reserve(request, stack) or self._wait(request, stack, on_wait)

    def _wait(
        self, request: _Request, stack: contextlib.ExitStack, on_wait: Callable[[str, str], None]
    ) -> Sequence[_Held]:
        deadline = Deadline.after(self._limit)
        reported = False
        with self._waiting_in_line(request):
            while not (held := self._reserve(request, stack)):
                if not (reported or request.returning):
                    reported = True
                    on_wait(*self._describe_holders())
                if deadline.expired:
                    wanted, holders = request.capacity, self._describe_holders()
                    raise PycloudlibTimeoutError(
                        f"A machine of {wanted.processors} processors and {wanted.memory_mib} "
                        f"MiB did not fit for {self._limit:.0f} s: {''.join(holders)}"
                    )
                time.sleep(deadline.capped(_POLL_SECONDS))
        return held

    @contextlib.contextmanager
    def _waiting_in_line(self, request: _Request) -> Iterator[None]:
        """Hold a ticket for a request in the block, behind all who wait already."""
        line = _lines.setdefault(self._directory, [])
        with contextlib.ExitStack() as stack:
            with self.locked():
                last = max((ticket.number for ticket in self._tickets()), default=0)
                ticket = _Ticket(last + 1, request.capacity, _process)
                stack.enter_context(exclusive_lock(self._directory / ticket.name, remove=True))
                stack.callback(_remove, line, ticket)
                line.append(ticket)
            request.ticket = ticket
            yield

    def _reserve(self, request: _Request, stack: contextlib.ExitStack) -> Sequence[_Held]:
        """Reserve all parts of a request; none if they do not fit, or another comes first."""
        ticket = request.ticket
        if ticket and (_lines[self._directory][0] != ticket or self._is_behind(ticket)):
            return ()
        with self.locked():
            self._remove_ended()
            if self._is_behind(ticket):
                return ()
            reserved = self._reservations()
            request.returning = self._ask_for_spares(request, reserved)
            if _has_machine(_process, reserved.values()):
                beside = [held for held in reserved.values() if held.kind is not _Kind.USE]
            else:
                beside = list(reserved.values())
            if not request.capacity.fits(self._whole, _total(beside)):
                return ()
            files = [self.new_file(capacity, kind) for capacity, kind in request.parts]
            held = []
            for file in files:
                held.append(_Held(file))
                stack.callback(held[-1].release)
            return held

    def _ask_for_spares(self, request: _Request, reserved: dict[Path, _Reservation]) -> bool:
        """Have as many spares given back as a request needs, the newest first.

        Returns:
            Whether it fits when they are given back.
        """
        left = dict(reserved)
        spares = [file for file, held in reserved.items() if held.kind is _Kind.SPARE]
        for file in sorted(spares, key=_made_at, reverse=True):
            if request.capacity.fits(self._whole, _total(left.values())):
                break
            _write_to(file.with_suffix(_WANTED))
            now = time.monotonic()
            if now - request.asked.setdefault(file, now) < self._patience:
                del left[file]
        return request.capacity.fits(self._whole, _total(left.values()))

    def _is_behind(self, own: _Ticket | None) -> bool:
        """Whether another waits who comes before a ticket, or before one who has none yet."""
        reserved = self._reservations().values()
        may_pass = _has_machine(_process, reserved)
        in_use = _total(held for held in reserved if held.kind is _Kind.USE)
        stuck = False
        for ticket in self._tickets():
            if own is not None and ticket.number >= own.number:
                break
            if not may_pass or _has_machine(ticket.process, reserved):
                return True
            # Who waits for a machine that is in use, perhaps of this process, may wait long, and so
            # do all behind, but not this process. For what ends by itself, who came first is first.
            stuck = stuck or not ticket.capacity.fits(self._whole, in_use)
            if not stuck:
                return True
        return False

    def _tickets(self) -> list[_Ticket]:
        """List the tickets of those who wait, the first one first."""
        found = [_Ticket.parse(file.name) for file in self._files(_TICKET)]
        return sorted(found, key=lambda ticket: ticket.number)

    def _reservations(self) -> dict[Path, _Reservation]:
        return {file: _Reservation.parse(file.name) for file in self._files(_RESERVED)}

    def _files(self, suffix: str) -> list[Path]:
        """List the files of one kind whose processes live."""
        return [file for file in self._directory.glob(f"*{suffix}") if is_locked(file)]

    def _remove_ended(self) -> None:
        """Remove the files of processes that have ended; all are made while this lock is held."""
        # Reservations first: what belongs to one goes after it.
        for file in sorted(self._directory.iterdir(), key=lambda file: file.suffix):
            if file.suffix in (_RESERVED, _TICKET):
                ended = not is_locked(file)
            else:
                ended = file.suffix == _WANTED and not file.with_suffix(_RESERVED).exists()
            if ended:
                file.unlink(missing_ok=True)

    def _describe_holders(self) -> tuple[str, str]:
        """Return which processes have reserved how many processors; and of how much, in words."""
        reserved = self._reservations().values()
        pids = ", ".join(sorted({str(held.pid) for held in reserved})) or "others"
        total, whole = _total(reserved), self._whole
        return (
            f"machines of processes {pids} have {total.processors}",
            f" of {whole.processors} processors, {total.memory_mib} of {whole.memory_mib} MiB",
        )


def _total(reserved: Iterable[_Reservation]) -> Capacity:
    return sum((held.capacity for held in reserved), _NOTHING)


def _has_machine(process: str, reserved: Iterable[_Reservation]) -> bool:
    return any(held.process == process and held.kind is _Kind.USE for held in reserved)


def _made_at(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:  # given back meanwhile
        return 0


def _write_to(fifo: Path) -> None:
    """Write to the FIFO of a spare, if its owner lives and still reads it."""
    try:
        descriptor = os.open(fifo, _WRITE)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.ENXIO:  # nobody reads it
            raise
        return
    try:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(descriptor, b"\n")
    finally:
        os.close(descriptor)


def _remove(line: list[_Ticket], ticket: _Ticket) -> None:
    with contextlib.suppress(ValueError):  # a Ctrl-C came before it was there
        line.remove(ticket)
