"""Whether a dead end that the console shows is real: not only the guest can write there."""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable
from typing import Any

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.locks import renew_in_children
from pycloudlib.diagnosis import Cause
from pycloudlib.errors import (
    BootFailedError,
    CloudError,
    KernelPanicError,
    PycloudlibTimeoutError,
)
from pycloudlib.guest.access import ssh
from pycloudlib.guest.boot.console import Console, DeadEnd
from pycloudlib.qemu.host.resources import LOOPBACK

# Seconds for which a dead machine does nothing at all.
_SILENCE = 2.0
# Seconds that its SSH server may take to answer, and QEMU.
_SSH_LIMIT = 1.0
_QMP_LIMIT = 2.0
# Seconds in which it is decided whether a guest is dead, and between two checks.
_DOUBT_LIMIT = 6.0
_DOUBT_INTERVAL = 0.1


@enum.unique
class Verdict(enum.Enum):
    """Whether a dead end is real."""

    UNDECIDED = "it may be one"
    CONFIRMED = "nothing happens in the machine any more"
    REFUTED = "the machine lives"


class DeadEndCheck:
    """Checks what the console says against what only the machine can do.

    A dead machine prints nothing more, neither reads nor writes its disk, and answers no
    connection. So words that are typed on the console, or that a program in the guest prints, end
    no wait for a machine that does anything. Safe to use from several threads.

    Args:
        name: The machine's name.
        console: The machine's console.
        port: The local port of its SSH server.
        answer_limit: Seconds that its SSH server may take to show that the machine lives.
        clock: Returns the time in seconds, from some moment on.
    """

    def __init__(
        self,
        name: str,
        console: Console,
        port: int,
        *,
        answer_limit: float = _SSH_LIMIT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._console = console
        self._port = port
        self._answer_limit = answer_limit
        self._clock = clock
        self._lock = threading.Lock()
        renew_in_children(self, _lock=threading.Lock)
        self._offset = -1
        self._since = 0.0
        self._activity: object = None
        self._verdict = Verdict.UNDECIDED

    def check_kernel(self, execute: Callable[..., Any], *, decided: bool) -> None:
        """Raise when the guest's kernel has panicked, and does not boot again by itself.

        Args:
            execute: Executes a QMP command of the machine.
            decided: Whether to wait until it is decided, where the console says so: some seconds.

        Raises:
            KernelPanicError: It has.
        """
        deadline = Deadline.after(_DOUBT_LIMIT if decided else 0)
        while (panic := self._find_panic()) is not None:
            verdict = self.judge(panic, execute)
            if verdict is Verdict.CONFIRMED:
                raise KernelPanicError(self._name, panic.cause, panic.line)
            if verdict is Verdict.REFUTED or deadline.expired:
                return
            time.sleep(deadline.capped(_DOUBT_INTERVAL))

    def _find_panic(self) -> DeadEnd | None:
        found = self._console.look().find_dead_end(kernels=True)
        is_panic = found is not None and found.cause in (Cause.KERNEL_PANIC, Cause.GUEST_MEMORY)
        return found if is_panic else None

    def check_boot(self, since: int, execute: Callable[..., Any]) -> None:
        """Raise when the boot cannot continue by itself.

        Args:
            since: The position in the console's log from which on it has to say so.
            execute: Executes a QMP command of the machine.

        Raises:
            BootFailedError: It cannot, by the console and by all else that can be seen.
        """
        found = self._console.look().find_dead_end(since)
        if found is not None and self.judge(found, execute) is Verdict.CONFIRMED:
            raise BootFailedError(self._name, found.cause, found.line)

    def judge(self, found: DeadEnd, execute: Callable[..., Any]) -> Verdict:
        """Decide on a dead end; it takes some seconds from the first time on.

        Args:
            found: What the console says.
            execute: Executes a QMP command of the machine.

        Raises:
            MachineEndedError: The machine is off.
        """
        if not self._lock.acquire(blocking=False):
            return Verdict.UNDECIDED  # another thread is deciding
        try:
            return self._judge(found, execute)
        finally:
            self._lock.release()

    def _judge(self, found: DeadEnd, execute: Callable[..., Any]) -> Verdict:
        if found.offset != self._offset:
            self._offset, self._verdict, self._activity = found.offset, Verdict.UNDECIDED, None
            if self._answers(found):
                self._verdict = Verdict.REFUTED
        if self._verdict is Verdict.REFUTED:
            return self._verdict
        printed = self._console.look().position
        if self._verdict is Verdict.CONFIRMED and self._activity == printed:
            return self._verdict
        activity = (printed, _count_disk_operations(execute))
        # A paused machine cannot do anything, dead or not.
        if not _runs(execute):
            self._activity = None
            return Verdict.UNDECIDED
        if activity != self._activity:
            self._activity, self._since = activity, self._clock()
            return Verdict.UNDECIDED
        if self._clock() - self._since < _SILENCE:
            return Verdict.UNDECIDED
        if self._answers(found):
            self._verdict = Verdict.REFUTED
        else:
            self._verdict, self._activity = Verdict.CONFIRMED, printed
        return self._verdict

    def _answers(self, found: DeadEnd) -> bool:
        """Whether the guest answers a connection."""
        try:
            ssh.open_with_banner(LOOPBACK, self._port, self._answer_limit).close()
        except TimeoutError:
            return False
        except OSError:
            # Its kernel has refused the connection, which a dead one cannot.
            return found.is_kernels
        return True


def _runs(execute: Callable[..., Any]) -> bool:
    answer = _query(execute, "query-status")
    return answer is None or bool(answer["running"])


def _count_disk_operations(execute: Callable[..., Any]) -> tuple[int, ...]:
    stats = [drive["stats"] for drive in _query(execute, "query-blockstats") or ()]
    return tuple(each["rd_operations"] + each["wr_operations"] for each in stats)


def _query(execute: Callable[..., Any], command: str) -> Any:
    """Execute a QMP command; None where QEMU cannot answer now. Errors of a time-out are raised."""
    try:
        return execute(command, timeout=_QMP_LIMIT)
    except PycloudlibTimeoutError:
        raise  # the machine is off
    except CloudError:
        return None
