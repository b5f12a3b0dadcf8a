"""The running machine: its states, its power, its events, and how it ended."""

from __future__ import annotations

import contextlib
import enum
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pycloudlib.deadline import Deadline
from pycloudlib.errors import CloudError, PycloudlibTimeoutError
from pycloudlib.qemu import ports
from pycloudlib.qemu.command import Channels, Features, build_command
from pycloudlib.qemu.process import ProcessEnd, QemuProcess
from pycloudlib.qemu.qmp import Event, LoopThread, QmpError, QmpSession
from pycloudlib.qemu.rundir import RunDirectory, short_path
from pycloudlib.qemu.spec import MachineSpec

_log = logging.getLogger(__name__)

# QEMU greets within milliseconds; the limit is for a host that is out of breath.
_GREETING_LIMIT = 30.0
_KILL_LIMIT = 10.0
_KEPT_EVENTS = 200


@enum.unique
class State(enum.Enum):
    """What a machine is doing."""

    OFF = "off"
    STARTING = "starting"
    PAUSED = "paused"
    RUNNING = "running"


class LaunchError(CloudError):
    """QEMU did not start.

    Attributes:
        argv: Its command line.
        end: How the process ended, with its exit status and stderr.
    """

    def __init__(self, argv: list[str], end: ProcessEnd) -> None:
        self.argv = argv
        self.end = end
        super().__init__(f"The machine could not be started. {end}")


class PortTakenError(CloudError):
    """Another program listens on a port that the machine was to have."""


class MachineEndedError(PycloudlibTimeoutError, CloudError):
    """The machine is gone, so that what was waited for can never happen.

    A time-out to programs that catch one for a machine that cannot be reached; only sooner.

    Attributes:
        end: How the process ended; None when it was not running in the first place.
    """

    def __init__(self, name: str, end: ProcessEnd | None) -> None:
        self.end = end
        super().__init__(f"{name} is not running" + (f". {end}" if end else ""))


class Machine:
    """One machine over all its power cycles. Safe to use from several threads.

    Args:
        rundir: The instance's directory.
        spec: What machine it is.
        binary: The QEMU binary.
        features: What the binary can do.
    """

    def __init__(
        self, rundir: RunDirectory, spec: MachineSpec, binary: Path, features: Features
    ) -> None:
        self.rundir = rundir
        self.spec = spec
        self._binary = binary
        self._features = features
        self._changed = threading.Condition()
        self._state = State.OFF
        self._process: QemuProcess | None = None
        self._session: QmpSession | None = None
        self._end: ProcessEnd | None = None
        self._events: list[Event] = []
        self._powered_on = time.monotonic()
        self._console_start = 0

    @property
    def state(self) -> State:
        """What it is doing now."""
        return self._state

    @property
    def end(self) -> ProcessEnd | None:
        """How QEMU ended; None while it runs, or when it never ran."""
        return self._end

    @property
    def events(self) -> tuple[Event, ...]:
        """The latest QMP events, oldest first."""
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
        process = self._process
        return None if process is None or self._state is State.OFF else process.identity.pid

    def power_on(self) -> None:
        """Start QEMU and talk to it.

        Raises:
            LaunchError: QEMU ended at once; carries its command line, exit status and stderr.
            PortTakenError: Another program listens on one of the machine's ports.
            CloudError: It runs already, or does not answer.
        """
        with self._changed:
            if self._state is not State.OFF:
                raise CloudError(f"{self.spec.name} is {self._state.value} already")
            self._state = State.STARTING
        try:
            self._start_process()
        except BaseException:
            self.kill()
            raise

    def attach(self) -> None:
        """Take over the machine that another process started, if it still runs."""
        identity = self.rundir.find_process()
        process = QemuProcess.attach(identity, self.rundir.qemu_log) if identity else None
        if process is not None:
            self._adopt(process)
            self._set_state(State.RUNNING)

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Execute a QMP command and give what it returns.

        Raises:
            MachineEndedError: The machine is off.
            QmpError: QEMU refused the command, or did not answer.
        """
        self.check_on()
        if self._session is not None:
            return self._session.execute(command, arguments)
        # Started by another process, which has a session of its own: ours is as short as can be.
        with short_path(self.rundir.qmp_socket) as address:
            session = QmpSession.open(address, self._on_event, _GREETING_LIMIT)
        try:
            return session.execute(command, arguments)
        finally:
            session.close()

    def check_on(self) -> None:
        """Raise when the machine is off.

        Raises:
            MachineEndedError: It is; says how QEMU ended.
        """
        if self._state is State.OFF:
            raise MachineEndedError(self.spec.name, self._end)

    def wait_until(self, reached: Callable[[State], bool], deadline: Deadline) -> bool:
        """Wait until the state is one that is looked for; say whether it came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: reached(self._state), deadline.remaining)

    def wait_for_end(self, deadline: Deadline) -> bool:
        """Wait until QEMU is gone; say whether it was in time."""
        return self.wait_until(lambda state: state is State.OFF, deadline)

    def power_off(self, deadline: Deadline) -> str:
        """Power the machine off: by ACPI, as its power button does, then by force.

        Returns:
            What it took: `off already`, `ACPI`, `quit` or `kill`.
        """
        if self._state is State.OFF:
            return "off already"
        with contextlib.suppress(QmpError, MachineEndedError):
            self.execute("system_powerdown")
            if self.wait_for_end(deadline):
                return "ACPI"
        with contextlib.suppress(QmpError, MachineEndedError):
            self.execute("quit")
            if self.wait_for_end(Deadline.after(_KILL_LIMIT)):
                return "quit"
        self.kill()
        return "kill"

    def reset(self) -> None:
        """Reset the machine, as its reset button does."""
        self.execute("system_reset")

    def kill(self) -> None:
        """End QEMU at once and wait until it is gone; no error when it is gone already.

        Raises:
            CloudError: The kernel did not end it.
        """
        process = self._process
        if process is None:
            self._set_state(State.OFF)
            return
        process.kill()
        if not self.wait_for_end(Deadline.after(_KILL_LIMIT)):
            raise CloudError(f"QEMU of {self.spec.name}, pid {process.identity.pid}, did not end")

    def _start_process(self) -> None:
        with contextlib.ExitStack() as stack:
            ours, theirs = socket.socketpair()
            stack.callback(theirs.close)
            qmp = stack.enter_context(self.rundir.open_qmp_listener())
            console = stack.enter_context(_listen(self.spec.telnet_port))
            channels = Channels(
                theirs.fileno(), qmp.fileno(), console.fileno(), self.rundir.console_log
            )
            argv = build_command(str(self._binary), self.spec, channels, self._features)
            _log.debug("Starting %s", argv)
            self._powered_on = time.monotonic()
            # QEMU appends to it, and would make it readable for everybody.
            self.rundir.console_log.touch(mode=0o600)
            self._console_start = self.rundir.console_log.stat().st_size
            descriptors = (channels.control, channels.qmp, channels.console)
            try:
                process = QemuProcess.start(argv, pass_fds=descriptors, log=self.rundir.qemu_log)
            except BaseException:
                ours.close()
                raise
        self._adopt(process)
        self.rundir.write_process(process.identity)
        try:
            self._session = QmpSession.open(ours, self._on_event, _GREETING_LIMIT)
            self._follow(self._session.execute("query-status")["running"])
        except QmpError as error:
            self._raise_launch_error(argv, error)

    def _raise_launch_error(self, argv: list[str], error: QmpError) -> None:
        """Say why there is no session: nearly always because QEMU is gone."""
        if not self.wait_for_end(Deadline.after(1.0)) or self._end is None:
            raise error
        if _names_taken_port(self._end.stderr):
            raise PortTakenError(self._end.stderr) from error
        raise LaunchError(argv, self._end) from error

    def _adopt(self, process: QemuProcess) -> None:
        self._process = process
        self._end = None
        LoopThread.get().watch(process.fileno(), lambda: self._on_end(process))

    def _on_end(self, process: QemuProcess) -> None:
        """Take note of QEMU's end; called in the loop's thread."""
        end = process.end()
        _log.debug("%s: %s", self.spec.name, end)
        with self._changed:
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
        if event.name in ("STOP", "RESUME"):
            self._follow(running=event.name == "RESUME")

    def _follow(self, running: bool) -> None:
        with self._changed:
            if self._state is not State.OFF:
                self._set_state(State.RUNNING if running else State.PAUSED)

    def _set_state(self, state: State) -> None:
        with self._changed:
            self._state = state
            self._changed.notify_all()


def _listen(port: int) -> socket.socket:
    try:
        return ports.listen(port)
    except OSError as error:
        raise PortTakenError(f"Cannot listen on {ports.LOOPBACK}:{port}: {error}") from error


def _names_taken_port(stderr: str) -> bool:
    # QEMU's own words when it cannot bind the port of a `hostfwd`.
    return "could not set up host forwarding rule" in stderr.lower()
