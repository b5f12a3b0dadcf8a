"""One QEMU from its start, or from when it was found, to its end: process, session, events."""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.locks import renew_in_children
from pycloudlib.errors import CloudError, PycloudlibTimeoutError
from pycloudlib.qemu.host.processes import ProcessIdentity
from pycloudlib.qemu.parts.part import POWER_ON, Origin
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.state.spec import MachineSpec
from pycloudlib.qemu.vm import sockets
from pycloudlib.qemu.vm.process import (
    ProcessEnd,
    QemuProcess,
    StartedQemu,
    launch_error,
    start_qemu,
)
from pycloudlib.qemu.vm.programs import RunningPrograms
from pycloudlib.qemu.vm.qmp import Event, LoopThread, QmpError, QmpSession

_log = logging.getLogger(__name__)

# QEMU greets within milliseconds; the limit is for an overloaded host.
_GREETING_LIMIT = 30.0
ANSWER_LIMIT = 30.0
"""Seconds that QEMU may take to answer a QMP command."""
# Other programs may be asking it, each for a moment.
_LOOK_LIMIT = 5.0
NEEDED_SPACE = 64 << 20
"""Bytes that have to be free before a machine is resumed that a full disk has paused."""
_KEPT_EVENTS = 200
# Seconds between two queries of a QEMU whose events another process receives.
_LOOK_INTERVAL = 1.0


@enum.unique
class State(enum.Enum):
    """What a machine is doing."""

    OFF = "off"
    STARTING = "starting"
    PAUSED = "paused"
    RUNNING = "running"
    ELSEWHERE = "elsewhere"
    """It runs, or may run, where it is invisible: in another container, on another host."""


class HostDiskFullError(CloudError):
    """The machine is paused since the host's disk has no space for what it wrote.

    The next call resumes it once there is space.

    Attributes:
        path: The disk that has no space.
        free: Bytes that are free there.
    """

    def __init__(self, name: str, path: Path, free: int) -> None:
        self.path = path
        self.free = free
        super().__init__(
            f"{name} is paused: no space for its disk in {path.parent}, where {free >> 20} MiB "
            f"are free; it needs {NEEDED_SPACE >> 20} MiB to continue"
        )


class MachineEndedError(PycloudlibTimeoutError, CloudError):
    """The machine has ended, so that what was waited for cannot happen.

    It is a time-out, only sooner, to programs that catch one for an unreachable machine.

    Attributes:
        end: How the process ended; None when it was not running in the first place.
    """

    def __init__(self, name: str, end: ProcessEnd | None) -> None:
        self.end = end
        super().__init__(f"{name} is not running" + (f". {end}" if end else ""))


class MachineElsewhereError(QmpError):
    """The machine runs, or may run, where this program cannot reach its QEMU.

    Attributes:
        process: That QEMU.
    """

    def __init__(self, name: str, process: ProcessIdentity) -> None:
        self.process = process
        super().__init__(
            f"{name} runs elsewhere: its QEMU is {process.place}, and cannot be reached from here"
        )


class MachinePausedError(PycloudlibTimeoutError, CloudError):
    """The machine stays paused, so that what was waited for does not happen.

    It is a time-out, only sooner, to programs that catch one for an unreachable machine.

    Attributes:
        status: QEMU's own word for its state (`paused`, `prelaunch`, `postmigrate` …).
    """

    def __init__(self, name: str, status: str, seconds: float) -> None:
        self.status = status
        super().__init__(
            f"{name} is paused, and has been for {seconds:.0f} s: QEMU's status is {status!r}"
        )


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Return a callback that calls a method as long as others hold its object."""
    weak = weakref.WeakMethod(method)

    def call(*arguments: object) -> None:
        alive = weak()
        if alive is not None:
            alive(*arguments)

    return call


class RunningQemu:
    """One QEMU process and what it reports. Safe to use from several threads.

    The process that started it keeps a QMP session and receives its events; others open a short
    session for each command.

    Attributes:
        name: The machine's name, for messages.
        process: The process.
        state: What it is doing.
        end: How it ended; None while it runs.
        disk_full: Whether it is paused since the host has no space for its disk.
        on_change: Called when its state has changed or an event came, in any thread.
    """

    def __init__(self, name: str, rundir: RunDirectory, process: QemuProcess, state: State) -> None:
        self.name = name
        self.process = process
        self.state = state
        self.end: ProcessEnd | None = None
        self.disk_full = False
        self.on_change: Callable[[], None] = lambda: None
        self._rundir = rundir
        self._paused_since: float | None = None
        self._looked = -_LOOK_INTERVAL
        self._session: QmpSession | None = None
        self._programs: RunningPrograms | None = None
        self._opened: QmpSession | None = None
        self._users = 0
        self._opening = threading.Lock()
        self._events: list[Event] = []
        self._changed = threading.Condition()
        renew_in_children(self, _changed=threading.Condition, _opening=threading.Lock)
        # The loop keeps the process alive, but not a RunningQemu that nobody else has.
        on_end = weakly(self.note_end)

        def report_end(_held: QemuProcess = process) -> None:
            on_end()

        LoopThread.get().watch(process.fileno(), report_end)
        # Last: `__del__` undoes the watching.
        self._owner_pid = os.getpid()

    @classmethod
    def start(
        cls, binary: Path, spec: MachineSpec, rundir: RunDirectory, origin: Origin = POWER_ON
    ) -> RunningQemu:
        """Start QEMU and connect to it.

        Raises:
            LaunchError: QEMU ended at once; carries its command line, exit status and stderr.
            PortTakenError: Another program listens on one of the machine's ports.
            CloudError: It does not answer.
        """
        programs = RunningPrograms.start(spec, rundir)
        try:
            numbers = {name: one.fileno() for name, one in programs.connections.items()}
            started = start_qemu(binary, spec, rundir, origin, numbers)
        except BaseException:
            programs.end(rundir)
            raise
        programs.close()
        try:
            qemu = cls(spec.name, rundir, started.process, State.STARTING)
            qemu._programs = programs
            programs.watch()
            # Before the session: a QEMU that others cannot find would be leaked.
            started.publish()
            qemu._open_session(started, spec)
        except BaseException:
            started.discard()
            programs.end(rundir)
            raise
        return qemu

    @property
    def events(self) -> tuple[Event, ...]:
        """The latest QMP events, oldest first; none of one that another process started."""
        with self._changed:
            return tuple(self._events)

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout: float = ANSWER_LIMIT,
    ) -> Any:
        """Execute a QMP command; arguments and errors are those of `QmpSession.execute`."""
        with self.session(timeout) as session:
            return session.execute(command, arguments, timeout=timeout)

    @contextlib.contextmanager
    def session(self, timeout: float = ANSWER_LIMIT) -> Iterator[QmpSession]:
        """Yield a QMP session: the one that is kept, or one for this block.

        Raises:
            MachineEndedError: QEMU is gone.
            QmpError: It did not answer in time; names the programs that are connected.
        """
        kept = self._kept_session
        if kept is not None:
            yield kept
            return
        opened = self._share_session(timeout)
        try:
            yield opened
        finally:
            self._leave_session(opened)

    def _share_session(self, timeout: float) -> QmpSession:
        """Open a session, or share the one that another thread has open."""
        if not self._opening.acquire(timeout=timeout):
            raise QmpError(f"No QMP session with {self.name} within {timeout:g} s")
        try:
            if self._opened is None or self._opened.ended:
                self._opened, self._users = self._open_another(timeout), 0
            self._users += 1
            return self._opened
        finally:
            self._opening.release()

    def _leave_session(self, session: QmpSession) -> None:
        with self._opening:
            if session is not self._opened:
                return  # it ended, and there is another by now
            self._users -= 1
            if self._users:
                return
            self._opened = None
        session.close()

    @property
    def _kept_session(self) -> QmpSession | None:
        """The session that is kept; None when this program is ending."""
        session = self._session
        return None if session is None or session.ended else session

    def _open_another(self, timeout: float) -> QmpSession:
        deadline = Deadline.after(timeout)
        path = self._rundir.attach_socket
        try:
            sock = sockets.connect(path, deadline)
            return QmpSession.open(sock, weakly(self._on_event), deadline.remaining)
        except (OSError, QmpError) as error:
            if deadline.expired:
                raise QmpError(
                    f"No QMP session with {self.name} within {timeout:g} s"
                    f"{sockets.describe_clients(path)}"
                ) from error
            # Nearly always because QEMU is gone.
            if self.process.wait(deadline.capped(1.0)):
                self.note_end()
                raise MachineEndedError(self.name, self.end) from error
            raise QmpError(f"No QMP session with {self.name}: {error}") from error

    def wait_for_event(self, wanted: Callable[[Event], bool], deadline: Deadline) -> Event:
        """Return the first wanted event since the start; wait for it if none has come yet.

        Raises:
            MachineEndedError: QEMU ended before.
            PycloudlibTimeoutError: It did not come in time.
        """

        def find() -> Event | None:
            return next(filter(wanted, self._events), None)

        with self._changed:
            self._changed.wait_for(lambda: find() or self.end, deadline.remaining)
            found = find()
        if found is not None:
            return found
        if self.end is not None:
            raise MachineEndedError(self.name, self.end)
        raise PycloudlibTimeoutError(
            f"QEMU of {self.name} did not report it within {deadline.limit:.0f} s"
        )

    def refresh(self, timeout: float = _LOOK_LIMIT) -> None:
        """Ask QEMU for its state, where another process receives its events.

        Raises:
            QmpError: QEMU did not answer within `timeout` seconds.
        """
        if self._kept_session is not None:
            return
        self._looked = time.monotonic()
        status = self.execute("query-status", timeout=timeout)
        self.disk_full = status["status"] == "io-error"
        self._follow(running=status["running"])

    def check_pause(self, patience: float, is_meant: Callable[[], bool]) -> None:
        """Raise when it has been paused for so long that nobody is about to resume it.

        Args:
            patience: Seconds for which it may be paused.
            is_meant: Returns whether what has paused it will resume it.

        Raises:
            MachinePausedError: It has; names QEMU's status.
            MachineEndedError: It is gone.
        """
        if self._kept_session is None and time.monotonic() - self._looked >= _LOOK_INTERVAL:
            with contextlib.suppress(QmpError):
                self.refresh(_LOOK_INTERVAL)
        since = self._paused_since
        if since is None or self.disk_full:
            return
        if is_meant():
            # A pause that follows is counted from its own beginning.
            self._paused_since = time.monotonic()
            return
        paused = time.monotonic() - since
        if paused < patience:
            return
        try:
            status = self.execute("query-status", timeout=_LOOK_INTERVAL)
        except QmpError:
            return
        if status["running"]:
            self._follow(running=True)
        else:
            raise MachinePausedError(self.name, status["status"], paused)

    def check_disk(self) -> None:
        """Resume it when it is paused since the host's disk was full, and there is space now.

        Raises:
            HostDiskFullError: There is still none.
        """
        if not self.disk_full:
            return
        disk = self._rundir.disk
        free = shutil.disk_usage(disk.parent).free
        if free < NEEDED_SPACE:
            raise HostDiskFullError(self.name, disk, free)
        _log.info("%s continues: there is space for its disk again", self.name)
        self.execute("cont")

    def kill(self) -> None:
        """End the process as `QemuProcess.kill` does, and record its end."""
        self.process.kill()
        self.note_end()

    def note_end(self) -> None:
        """Record its end; called in the loop's thread, or by whoever ended it."""
        with self._changed:
            if self.end is not None:
                return
            self.end = self.process.end()
            _log.debug("%s: %s", self.name, self.end)
            if self._session is not None:
                self._session.close_soon()
                self._session = None
            self.state = State.OFF
            self._changed.notify_all()
        if self._programs is not None:
            self._programs.terminate()
        self.on_change()

    def _open_session(self, started: StartedQemu, spec: MachineSpec) -> None:
        try:
            session = QmpSession.open(started.control, weakly(self._on_event), _GREETING_LIMIT)
            self._session = session
            started.queue_clients()
            self._follow(session.execute("query-status")["running"])
        except QmpError as error:
            # Nearly always because QEMU is gone.
            started.control.close()
            if not self.process.wait(1.0):
                raise
            self.note_end()
            assert self.end is not None
            raise launch_error(started.argv, self.end, spec) from error

    def _on_event(self, event: Event) -> None:
        """Record a QMP event; called in the loop's thread."""
        _log.debug("%s: %s %s", self.name, event.name, event.data)
        with self._changed:
            self._events = [*self._events[1 - _KEPT_EVENTS :], event]
            self._changed.notify_all()
        if event.name == "BLOCK_IO_ERROR" and event.data.get("nospace"):
            self.disk_full = True
        if event.name in ("STOP", "RESUME"):
            self.disk_full = self.disk_full and event.name == "STOP"
            self._follow(running=event.name == "RESUME")

    def _follow(self, running: bool) -> None:
        with self._changed:
            if self.state is not State.OFF:
                self.state = State.RUNNING if running else State.PAUSED
                if running:
                    self._paused_since = None
                elif self._paused_since is None:
                    self._paused_since = time.monotonic()
                self._changed.notify_all()
        self.on_change()

    def __del__(self) -> None:
        if not sys.is_finalizing() and getattr(self, "_owner_pid", None) == os.getpid():
            if not self.end:
                LoopThread.get().forget(self.process, self.process.fileno())
                if self._programs is not None:
                    self._programs.forget()
            if self._session is not None:
                self._session.close_soon()
