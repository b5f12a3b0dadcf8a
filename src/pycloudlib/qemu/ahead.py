"""Machines that are started before they are asked for: one at a time, and a pool of them."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import TracebackType
from typing import TYPE_CHECKING

from pycloudlib._base.locks import renew_in_children
from pycloudlib.qemu.host.budget import Budget, Capacity, Spare
from pycloudlib.qemu.host.ownership import Orphans, at_normal_end, claim
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.launching import admission
from pycloudlib.qemu.state.spec import make_name
from pycloudlib.qemu.vm.running import State
from pycloudlib.util import raise_cleanup_errors

if TYPE_CHECKING:
    from typing_extensions import Self

    from pycloudlib.qemu.cloud import Qemu

_log = logging.getLogger(__name__)

# How often a machine that is still being started is ended, until its thread notices.
_END_SECONDS = 0.05


class MachineAhead:
    """One machine that a thread gets ready, until it is taken or not wanted any more.

    Its room in the budget is given back, and the machine ended, as soon as somebody else waits for
    room.

    Args:
        name: What the thread and the log call it.
        spare: Its room in the budget.
        begin: Makes the machine ready; called in the thread.
        undo: Ends the machine, also while `begin` runs; may be called several times.
    """

    def __init__(
        self, name: str, spare: Spare, begin: Callable[[], QemuInstance], undo: Callable[[], None]
    ) -> None:
        self.name = name
        self._spare = spare
        self._begin = begin
        self._undo = undo
        self._outcome: Future[QemuInstance] = Future()
        self._ending = threading.Lock()
        self._dropped = False
        self._ended = False
        self._pid = os.getpid()
        _note(self)
        try:
            # A daemon: a program ends what its thread starts, rather than wait for it.
            threading.Thread(target=self._run, name=f"ahead: {name}", daemon=True).start()
        except BaseException:
            _not_taken.discard(self)
            raise

    @classmethod
    def start(
        cls,
        name: str,
        budget: Budget,
        capacity: Capacity,
        begin: Callable[[], QemuInstance],
        undo: Callable[[], None],
    ) -> MachineAhead | None:
        """Start a machine ahead; None if there is no room for it now, or no thread.

        Args:
            name: What the thread and the log call it.
            budget: What machines may use.
            capacity: What this one uses.
            begin: Makes the machine ready; called in the thread.
            undo: Ends the machine, also while `begin` runs; may be called several times.
        """
        started: Future[MachineAhead] = Future()
        with contextlib.ExitStack() as undone:
            try:
                spare = budget.try_spare(capacity, lambda: started.result().drop())
                if spare is None:
                    _log.debug("There is no room to start %s ahead", name)
                    return None
                undone.callback(spare.release)
                undone.callback(started.cancel)
                ahead = cls(name, spare, begin, undo)
            except RuntimeError as error:
                # What waits for the machine then starts it itself.
                _log.info("%s is not started ahead: no thread can be started: %s", name, error)
                return None
            started.set_result(ahead)
            undone.pop_all()
        return ahead

    @property
    def is_dropped(self) -> bool:
        """Whether it was ended, or is being ended, and can be had no more."""
        return self._dropped

    @property
    def has_ended(self) -> bool:
        """Whether it was ended: nothing is done with the machine any more."""
        return self._ended

    @property
    def is_done(self) -> bool:
        """Whether it is ready, or has failed: taking it takes no time."""
        return self._outcome.done()

    def take(self) -> tuple[QemuInstance, contextlib.ExitStack] | None:
        """Wait until it is ready, and return it; None if it was given back, or has failed.

        What has failed is told in the log: the caller starts another machine in its place.

        Returns:
            The machine, and its room in the budget until that is closed.
        """
        begun = time.monotonic()
        reservation = self._spare.promote()
        if reservation is None:
            self.drop()
            return None
        with contextlib.ExitStack() as undo:
            room = undo.enter_context(contextlib.ExitStack())
            room.enter_context(reservation)
            undo.callback(self.drop)
            try:
                machine = self._outcome.result()
                state = machine.machine.state
            except Exception as error:  # noqa: BLE001 - another one shows what is wrong
                _log.info("%s was not ready ahead: %s", self.name, error)
                return None
            if state is not State.RUNNING:
                _log.info("%s was ready ahead, and is %s now", self.name, state.value)
                return None
            undo.pop_all()
        _not_taken.discard(self)
        _log.info("%s was started ahead: waited %.3f s", self.name, time.monotonic() - begun)
        return machine, room

    def drop(self) -> None:
        """End the machine and give back its room; errors are logged.

        Idempotent, and without effect in a forked child. What a Ctrl-C interrupts, the next call
        does.
        """
        if self._pid != os.getpid():
            return
        self._dropped = True
        with self._ending:
            if self._ended:
                return
            while not self._outcome.done():
                # What is being started may not be there yet, and then soon is.
                self._try_undo(logging.DEBUG)
                wait([self._outcome], _END_SECONDS)
            self._try_undo(logging.WARNING)
            self._spare.release()
            self._ended = True
            _not_taken.discard(self)

    def _try_undo(self, level: int) -> None:
        try:
            self._undo()
        except Exception as error:  # noqa: BLE001 - others are to be ended, too
            _log.log(level, "%s, which was started ahead, is not ended: %s", self.name, error)

    def _run(self) -> None:
        try:
            self._outcome.set_result(self._begin())
        except BaseException as error:  # noqa: BLE001 - who takes it hears of it
            self._outcome.set_exception(error)


_not_taken: set[MachineAhead] = set()
_noted_by: int | None = None


def _note(ahead: MachineAhead) -> None:
    """Have a machine ended at a normal end of this program, unless it is taken or dropped before.

    The guardian ends it if the program is killed. But one that is just being launched is not yet
    known to have to end with a program that ends by itself.
    """
    global _noted_by  # noqa: PLW0603 - one for each process
    if _noted_by != os.getpid():
        _noted_by = os.getpid()
        _not_taken.clear()  # a forked child has none of its parent's threads
        at_normal_end(_drop_all)
    _not_taken.add(ahead)


def _drop_all() -> None:
    if _noted_by == os.getpid():
        for ahead in list(_not_taken):
            ahead.drop()


def launching(
    cloud: Qemu, name: str, launch: Callable[[], QemuInstance]
) -> tuple[Callable[[], QemuInstance], Callable[[], None]]:
    """Return what launches a machine and waits until it is ready, and what ends it again.

    Until it is taken, it ends with this program, however that ends: nobody has got it yet.

    Args:
        cloud: The cloud that launches it.
        name: The machine's name.
        launch: Launches it.
    """

    def begin() -> QemuInstance:
        machine = launch()
        claim(machine.instance_dir, Orphans.REAP)
        machine.wait()
        return machine

    def undo() -> None:
        for machine in list(cloud.created_instances):
            if machine.name == name:
                raise_cleanup_errors(machine.delete(), None)

    return begin, undo


class Pool:
    """Machines of one kind that are ready before they are asked for; made by `Qemu.pool`.

    A context manager: leaving it ends the machines that wait. Those that were taken belong to the
    cloud, as any that it launches. Safe to use from several threads.

    Args:
        cloud: The cloud of the machines.
        launch: Launches a machine of a name.
        size: How many wait at most.
        capacity: What one of them uses.
        budget: What machines may use at once.
    """

    def __init__(
        self,
        cloud: Qemu,
        launch: Callable[[str], QemuInstance],
        size: int,
        capacity: Capacity,
        budget: Budget,
    ) -> None:
        self._cloud = cloud
        self._launch = launch
        self._size = size
        self._capacity = capacity
        self._budget = budget
        self._waiting: list[MachineAhead] = []
        self._changing = threading.Lock()
        self._closed = False
        renew_in_children(self, _changing=threading.Lock)
        self._refill()

    @property
    def ready(self) -> int:
        """How many machines can be taken without a wait."""
        with self._changing:
            return sum(ahead.is_done and not ahead.is_dropped for ahead in self._waiting)

    def take(self) -> QemuInstance:
        """Return a machine that is ready, and start the next one ahead.

        If none is there, wait for the first that is being started; without one, launch one, within
        the budget as far as this program has no other machine.

        Raises:
            ValueError: The pool is closed.
            PycloudlibTimeoutError: It was not ready in time, or there was no room for it in the
                budget, for an hour.
            CloudError: It did not start; as `Qemu.launch`.
        """
        while (ahead := self._next()) is not None:
            taken = ahead.take()
            if taken is not None:
                machine, room = taken
                break
        else:
            machine, room = self._launch_now()
        claim(machine.instance_dir, self._cloud.orphans)
        admission.hold(machine.instance_dir, room)
        self._refill()
        return machine

    def close(self) -> None:
        """End the machines that wait; a closed pool stays as it is."""
        with self._changing:
            self._closed = True
            waiting = list(self._waiting)
        for ahead in waiting:
            ahead.drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _next(self) -> MachineAhead | None:
        """Take the one that is ready first from those that wait; None if none does."""
        with self._changing:
            if self._closed:
                raise ValueError("the pool is closed: its machines have ended")
            ahead = min(self._waiting, key=lambda ahead: not ahead.is_done, default=None)
            if ahead is not None:
                self._waiting.remove(ahead)
            return ahead

    def _refill(self) -> None:
        with self._changing:
            self._waiting = [ahead for ahead in self._waiting if not ahead.is_dropped]
            while not self._closed and len(self._waiting) < self._size:
                name = make_name(self._cloud.tag)
                begin, undo = launching(self._cloud, name, functools.partial(self._launch, name))
                ahead = MachineAhead.start(name, self._budget, self._capacity, begin, undo)
                if ahead is None:
                    break  # the next machine that is taken tries again
                self._waiting.append(ahead)

    def _launch_now(self) -> tuple[QemuInstance, contextlib.ExitStack]:
        with contextlib.ExitStack() as undo:
            room = undo.enter_context(contextlib.ExitStack())
            room.enter_context(self._budget.reserving(self._capacity, _log_wait))
            machine = self._launch(make_name(self._cloud.tag))
            undo.callback(machine.delete)
            machine.wait()
            undo.pop_all()
        return machine, room


def _log_wait(holders: str) -> None:
    _log.info("Waiting until a machine fits: %s processors", holders)
