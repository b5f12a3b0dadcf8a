"""The running machine: its states, its power, its events, and how it ended."""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pycloudlib.deadline import Deadline
from pycloudlib.errors import CloudError, InstanceNotFoundError, PycloudlibTimeoutError
from pycloudlib.qemu.process import ProcessEnd, ProcessIdentity, QemuProcess
from pycloudlib.qemu.qmp import Event, LoopThread, QmpError, QmpSession
from pycloudlib.qemu.rundir import RunDirectory, short_path
from pycloudlib.qemu.spec import MachineSpec
from pycloudlib.qemu.start import StartedQemu, launch_error, start_qemu

_log = logging.getLogger(__name__)

# QEMU greets within milliseconds; the limit is for a host that is out of breath.
_GREETING_LIMIT = 30.0
_ANSWER_LIMIT = 30.0
_KILL_LIMIT = 10.0
# A guest that is still booting misses the power button: it is pressed again this often.
_BUTTON_INTERVAL = 10.0
# Of the time for powering off, the last part is kept for harder ways.
_ACPI_SHARE = 0.9
_KEPT_EVENTS = 200


@enum.unique
class State(enum.Enum):
    """What a machine is doing."""

    OFF = "off"
    STARTING = "starting"
    PAUSED = "paused"
    RUNNING = "running"


@enum.unique
class PowerOff(enum.Enum):
    """What it took to power a machine off, from gentle to hard."""

    OFF_ALREADY = "it was off already"
    ACPI = "ACPI: the guest powered itself off"
    QUIT = "QMP quit: the guest did not react in time"
    KILL = "SIGKILL: QEMU did not react in time"


class MachineEndedError(PycloudlibTimeoutError, CloudError):
    """The machine is gone, so that what was waited for can never happen.

    A time-out to programs that catch one for a machine that cannot be reached; only sooner.

    Attributes:
        end: How the process ended; None when it was not running in the first place.
    """

    def __init__(self, name: str, end: ProcessEnd | None) -> None:
        self.end = end
        super().__init__(f"{name} is not running" + (f". {end}" if end else ""))


class _Uninterrupted:
    """Runs a function where no KeyboardInterrupt can come, and gives what came of it."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        # Not Thread.join(): once interrupted, it takes the thread for ended.
        self._ended = threading.Event()
        threading.Thread(target=self._run, args=(work,), name="qemu-start", daemon=True).start()

    def wait(self) -> None:
        """Wait for the end."""
        self._ended.wait()

    def result(self) -> None:
        """Wait for the end; raise what was raised."""
        self.wait()
        if self._error is not None:
            raise self._error

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._error = error
        finally:
            self._ended.set()


class Machine:
    """One machine over all its power cycles. Safe to use from several threads.

    Several processes may each have a `Machine` of the same run directory: which QEMU runs is read
    from there. The one that started it keeps a QMP session and hears its events; the others open a
    short session for each command.

    Args:
        rundir: The instance's directory.
        spec: What machine it is.
        binary: The QEMU binary.
    """

    def __init__(self, rundir: RunDirectory, spec: MachineSpec, binary: Path) -> None:
        self.rundir = rundir
        self.spec = spec
        self._binary = binary
        self._changed = threading.Condition()
        self._state = State.OFF
        self._process: QemuProcess | None = None
        self._session: QmpSession | None = None
        self._end: ProcessEnd | None = None
        self._events: list[Event] = []
        self._powered_on = time.monotonic()
        self._console_start = 0
        self._owner_pid = os.getpid()

    @property
    def state(self) -> State:
        """What it is doing now."""
        self._catch_up()
        return self._state

    @property
    def end(self) -> ProcessEnd | None:
        """How QEMU ended; None while it runs, or when it never ran."""
        return self._end

    @property
    def events(self) -> tuple[Event, ...]:
        """The latest QMP events, oldest first; none of a machine that another process started."""
        with self._changed:
            return tuple(self._events)

    @property
    def powered_on(self) -> float:
        """When it was last switched on by us, in `time.monotonic` seconds."""
        return self._powered_on

    @property
    def console_start(self) -> int:
        """Where in the console log that power cycle begins, in bytes."""
        return self._console_start

    @property
    def pid(self) -> int | None:
        """The process id of its QEMU; None when it is off."""
        off = self.state is State.OFF
        process = self._process
        return None if off or process is None else process.identity.pid

    def power_on(self) -> None:
        """Start QEMU and talk to it.

        Raises:
            LaunchError: QEMU ended at once; carries its command line, exit status and stderr.
            PortTakenError: Another program listens on one of the machine's ports.
            InstanceNotFoundError: The machine is deleted.
            CloudError: It runs already, or does not answer.
        """
        with self.rundir.power_lock():
            with self._changed:
                if self.state is not State.OFF:
                    raise CloudError(
                        f"{self.spec.name} is {self._state.value}; only a machine that is off can "
                        "be switched on"
                    )
                self._state, self._process = State.STARTING, None
            # In a thread of its own, because Ctrl-C reaches the main thread alone: so there is no
            # moment at which a process exists that nobody knows of.
            birth = _Uninterrupted(self._start)
            try:
                birth.result()
            except BaseException:
                birth.wait()
                self.kill()
                raise

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout: float = _ANSWER_LIMIT,
    ) -> Any:
        """Execute a QMP command and give what it returns.

        Args:
            command: Its name (`query-status` …).
            arguments: Its arguments.
            timeout: Seconds it may take.

        Raises:
            MachineEndedError: The machine is off.
            QmpError: QEMU refused the command, or did not answer.
        """
        self.check_on()
        session = self._session
        if session is not None:
            return session.execute(command, arguments, timeout=timeout)
        with short_path(self.rundir.attach_socket) as address:
            session = QmpSession.open(address, self._on_event, timeout)
        try:
            return session.execute(command, arguments, timeout=timeout)
        finally:
            session.close()

    def check_on(self) -> None:
        """Raise when the machine is off.

        Raises:
            MachineEndedError: It is; says how QEMU ended.
        """
        if self.state is State.OFF:
            raise MachineEndedError(self.spec.name, self._end)

    def wait_for_end(self, deadline: Deadline) -> bool:
        """Wait until QEMU is gone; say whether it was in time."""
        self._catch_up()
        return self._wait_until(lambda state: state is State.OFF, deadline)

    def power_off(self, deadline: Deadline) -> PowerOff:
        """Power the machine off: cleanly if the guest does so in time, then by force.

        Args:
            deadline: When it has to be off; the last tenth of the time is for force.
        """
        if self.state is State.OFF:
            return PowerOff.OFF_ALREADY
        # A guest whose processors do not run cannot react.
        share = 0 if self.state is State.PAUSED else _ACPI_SHARE
        acpi = Deadline(deadline.started, deadline.limit * share)
        try:
            while not acpi.expired:
                self.execute("system_powerdown", timeout=acpi.remaining)
                if self.wait_for_end(Deadline.after(acpi.capped(_BUTTON_INTERVAL))):
                    return PowerOff.ACPI
        except MachineEndedError:
            return PowerOff.ACPI
        except QmpError as error:
            _log.warning("%s: %s", self.spec.name, error)
        with contextlib.suppress(QmpError, MachineEndedError):
            self.execute("quit", timeout=max(deadline.remaining, 1.0))
            if self.wait_for_end(deadline):
                return PowerOff.QUIT
        self.kill()
        return PowerOff.KILL

    def kill(self) -> None:
        """End QEMU at once and wait until it is gone; no error when it is gone already.

        Raises:
            CloudError: The kernel did not end it.
        """
        self._catch_up()
        process = self._process
        if process is None:
            self._set_state(State.OFF)
            return
        process.kill()
        # Asked of the kernel, not of the loop's thread, which may not watch it yet.
        if not process.wait(_KILL_LIMIT):
            raise CloudError(f"QEMU of {self.spec.name}, pid {process.identity.pid}, did not end")
        self._on_end(process)

    def delete(self) -> None:
        """End QEMU and remove the run directory; one that is gone already is no error.

        Raises:
            CloudError: The kernel did not end it; the directory stays.
        """
        with contextlib.suppress(InstanceNotFoundError), self.rundir.power_lock():
            self.kill()
            self.rundir.remove()
        self._set_state(State.OFF)

    def _start(self) -> None:
        started = start_qemu(self._binary, self.spec, self.rundir)
        self._adopt(started.process)
        self._powered_on = time.monotonic()
        self._console_start = started.console_start
        try:
            session = QmpSession.open(started.control, self._on_event, _GREETING_LIMIT)
            self._session = session
            self._follow(session.execute("query-status")["running"])
        except QmpError as error:
            self._raise_launch_error(started, error)

    def _raise_launch_error(self, started: StartedQemu, error: QmpError) -> None:
        """Say why there is no session: nearly always because QEMU is gone."""
        started.control.close()
        if not self.wait_for_end(Deadline.after(1.0)) or self._end is None:
            raise error
        raise launch_error(started.argv, self._end, self.spec) from error

    def _catch_up(self) -> None:
        """Take over the QEMU that another process started, if one runs now."""
        with self._changed:
            if self._owner_pid != os.getpid():
                # A forked child has no part in its parent's session and threads.
                self._owner_pid = os.getpid()
                self._session, self._process, self._state = None, None, State.OFF
            if self._state is not State.OFF:
                return
            identity = self.rundir.find_process()
            if identity is None or not self._is_news(identity):
                return
            process = QemuProcess.attach(identity, self.rundir.disk, self.rundir.qemu_log)
            if process is not None:
                self._state = State.RUNNING
                self._adopt(process)

    def _is_news(self, identity: ProcessIdentity) -> bool:
        return self._process is None or self._process.identity != identity

    def _adopt(self, process: QemuProcess) -> None:
        self._process = process
        self._end = None
        # The loop holds on to the process, but not to a machine that nobody else knows any more.
        on_end = weakref.WeakMethod(self._on_end)

        def tell() -> None:
            method = on_end()
            if method is not None:
                method(process)

        LoopThread.get().watch(process.fileno(), tell)

    def __del__(self) -> None:
        process = getattr(self, "_process", None)
        if sys.is_finalizing():
            return
        if process is not None and self._owner_pid == os.getpid() and not self._end:
            LoopThread.get().forget(process, process.fileno())
        session = getattr(self, "_session", None)
        if session is not None:
            session.close_soon()

    def _on_end(self, process: QemuProcess) -> None:
        """Take note of QEMU's end; called in the loop's thread, or by whoever saw to it."""
        with self._changed:
            if process is not self._process or self._end is not None:
                return
            end = process.end()
            _log.debug("%s: %s", self.spec.name, end)
            self._end = end
            if self._session is not None:
                self._session.close_soon()
                self._session = None
            self._state = State.OFF
            self._changed.notify_all()

    def _on_event(self, event: Event) -> None:
        """Take note of a QMP event; called in the loop's thread."""
        _log.debug("%s: %s %s", self.spec.name, event.name, event.data)
        with self._changed:
            self._events = [*self._events[1 - _KEPT_EVENTS :], event]
            self._changed.notify_all()
        if event.name in ("STOP", "RESUME"):
            self._follow(running=event.name == "RESUME")

    def _follow(self, running: bool) -> None:
        with self._changed:
            if self._state is not State.OFF:
                self._set_state(State.RUNNING if running else State.PAUSED)

    def _wait_until(self, reached: Callable[[State], bool], deadline: Deadline) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: reached(self._state), deadline.remaining)

    def _set_state(self, state: State) -> None:
        with self._changed:
            self._state = state
            self._changed.notify_all()
