"""The machine over all its power cycles: its power, and which QEMU runs it now."""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pycloudlib._base.deadline import Deadline, positive
from pycloudlib._base.locks import renew_in_children
from pycloudlib._base.tools import uninterrupted
from pycloudlib.errors import (
    CloudError,
    InstanceNotFoundError,
    PycloudlibTimeoutError,
)
from pycloudlib.guest.boot.console import Console
from pycloudlib.qemu.host.processes import ProcessIdentity
from pycloudlib.qemu.parts.part import Origin
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.state.spec import MachineSpec
from pycloudlib.qemu.vm import recovery
from pycloudlib.qemu.vm.memory import check_command, choose_memory
from pycloudlib.qemu.vm.process import PortTakenError, ProcessEnd, QemuProcess, is_open_elsewhere
from pycloudlib.qemu.vm.qmp import Event, QmpError, QmpSession
from pycloudlib.qemu.vm.running import (
    ANSWER_LIMIT,
    MachineElsewhereError,
    MachineEndedError,
    RunningQemu,
    State,
    weakly,
)
from pycloudlib.qemu.vm.vitality import DeadEndCheck

_log = logging.getLogger(__name__)

# A guest that is still booting misses the power button: it is pressed again this often.
_BUTTON_INTERVAL = 10.0
# Of the time for powering off, the last part is kept for harder ways.
_ACPI_SHARE = 0.9
# Seconds in which a port may be busy that another program only looks at, and between two tries.
_PORT_PATIENCE = 1.0
_PORT_INTERVAL = 0.05
_PAUSE_PATIENCE = 10.0
_STOP_LOOK = 1.0


@enum.unique
class PowerOff(enum.Enum):
    """What it took to power a machine off, from gentle to hard."""

    OFF_ALREADY = "it was off already"
    ACPI = "ACPI: the guest powered itself off"
    QUIT = "QMP quit: the guest did not react in time"
    KILL = "SIGKILL: QEMU did not react in time"


class Machine:
    """One machine over all its power cycles. Safe to use from several threads.

    Several processes may each have a `Machine` of the same run directory: which QEMU runs is read
    from there.

    Args:
        rundir: The instance's directory.
        spec: What machine it is.
        binary: The QEMU binary.

    Attributes:
        pause_patience: Seconds for which a machine that is waited for may be paused; that it is for
            a save or a copy does not count.
        paused_by_saves: Seconds for which saves by this object have paused its guest: its clock has
            lost them.
    """

    def __init__(self, rundir: RunDirectory, spec: MachineSpec, binary: Path) -> None:
        self.rundir = rundir
        self.spec = spec
        self.binary = binary
        self._changed = threading.Condition()
        renew_in_children(self, _changed=threading.Condition)
        self._qemu: RunningQemu | None = None
        self._starting = False
        self._powered_on = time.monotonic()
        self.console = Console(rundir.console_log, rundir.read_console_start)
        self._dead_ends = DeadEndCheck(spec.name, self.console, spec.ssh_port)
        self._owner_pid = os.getpid()
        self.pause_patience = _PAUSE_PATIENCE
        self.paused_by_saves = 0.0

    @property
    def state(self) -> State:
        """What it is doing now."""
        self._catch_up()
        state = self._current_state()
        if state is State.OFF and self._find_elsewhere() is not None:
            return State.ELSEWHERE
        return state

    @property
    def end(self) -> ProcessEnd | None:
        """How QEMU ended; None while it runs, or when it never ran."""
        qemu = self._qemu
        return None if qemu is None else qemu.end

    @property
    def events(self) -> tuple[Event, ...]:
        """The latest QMP events, oldest first; none of a machine that another process started."""
        qemu = self._qemu
        return () if qemu is None else qemu.events

    @property
    def last_reset(self) -> float:
        """When the guest last began anew, as far as the events tell; 0 when it did not."""
        return max((event.timestamp for event in self.events if event.name == "RESET"), default=0)

    @property
    def powered_on(self) -> float:
        """When it was last switched on by us, in `time.monotonic` seconds."""
        return self._powered_on

    @property
    def console_start(self) -> int:
        """Where in the console log its present boot begins, in bytes, whoever started it."""
        return self.console.look().boot_start

    @property
    def boots(self) -> int:
        """How often its guest has booted since it was switched on, as its console tells."""
        return self.console.look().boots

    @property
    def pid(self) -> int | None:
        """The process id of its QEMU; None when it is off, or runs elsewhere."""
        gone = self.state in (State.OFF, State.ELSEWHERE)
        qemu = self._qemu
        return None if gone or qemu is None else qemu.process.pid

    def power_on(
        self, origin: Origin | None = None, load_state: Callable[[RunningQemu], None] | None = None
    ) -> None:
        """Start QEMU and talk to it.

        Args:
            origin: What it begins with; by default with a boot.
            load_state: What has to succeed before the QEMU is taken for the machine's.

        Raises:
            LaunchError: QEMU ended at once; carries its command line, exit status and stderr.
            PortTakenError: Another program listens on one of the machine's ports.
            InstanceNotFoundError: The machine is deleted.
            CloudError: It runs already, or does not answer.
        """
        with self.changing():
            self._power_on(origin or Origin(choose_memory(self.spec.accelerator)), load_state)

    def power_on_again(self) -> None:
        """Start QEMU of a machine that has run before, and whose ports are known, unless it runs.

        Errors are those of `power_on`; a port that another program holds is tried for a while.
        """
        with self.changing():
            if self.state in (State.RUNNING, State.PAUSED):
                return  # another program was quicker
            origin = Origin(choose_memory(self.spec.accelerator))
            _when_ports_are_free(lambda: self._power_on(origin, None))

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Keep all others from changing the machine in the block: its power, QEMU, disk, devices.

        What another program has left half done is settled first.

        Raises:
            InstanceNotFoundError: The machine is deleted.
        """
        with self.rundir.power_lock():
            recovery.recover(self.rundir)
            yield

    @contextlib.contextmanager
    def staying_off(self) -> Iterator[None]:
        """Keep a machine that is off from being switched on in the block.

        Raises:
            InstanceNotFoundError: It is deleted.
            CloudError: It is on, as another program has switched it on.
        """
        with self.changing():
            self.check_here()
            state = self.state
            if state is not State.OFF:
                raise CloudError(
                    f"{self.spec.name} has to be off for this, and is {state.value}: another "
                    "program has switched it on meanwhile"
                )
            yield

    def restart_with(
        self,
        prepare: Callable[[], None],
        origin: Origin,
        load_state: Callable[[RunningQemu], None],
    ) -> None:
        """End QEMU, do something, and start another; the caller is `changing` the machine.

        Arguments and errors are those of `power_on`; `prepare` is what is done.
        """
        self.kill()
        prepare()
        _when_ports_are_free(lambda: self._power_on(origin, load_state))

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout: float = ANSWER_LIMIT,
    ) -> Any:
        """Execute a QMP command and give what it returns.

        Args:
            command: Its name (`query-status` …).
            arguments: Its arguments.
            timeout: Seconds it may take.

        Raises:
            MachineEndedError: The machine is off.
            QmpError: QEMU refused the command, or did not answer.
            KeptMemoryError: The machine goes on from memory that is kept for others, too, and
                would change it (a balloon).
            ValueError: `timeout` is not a positive number.
        """
        timeout = positive("timeout", timeout, "seconds")
        with self.session(timeout) as session:
            check_command(self.spec.name, session, command, arguments)
            return session.execute(command, arguments, timeout=timeout)

    @contextlib.contextmanager
    def session(self, timeout: float = ANSWER_LIMIT) -> Iterator[QmpSession]:
        """Give a QMP session for several commands.

        Raises:
            MachineEndedError: The machine is off.
            QmpError: QEMU did not answer.
        """
        with self.qemu().session(timeout) as session:
            yield session

    def qemu(self) -> RunningQemu:
        """Give the QEMU that runs it now.

        Raises:
            MachineEndedError: The machine is off.
            MachineElsewhereError: It runs where it cannot be reached from here.
        """
        self.check_on()
        self.check_here()
        qemu = self._qemu
        if qemu is None:
            raise MachineEndedError(self.spec.name, None)
        return qemu

    def refresh(self) -> None:
        """Find out what it is doing, where another process started it.

        Until then it is taken to run when its QEMU does.
        """
        try:
            self.qemu().refresh()
        except MachineEndedError:
            pass  # which its state tells
        except QmpError as error:
            _log.info("%s does not tell what it is doing: %s", self.spec.name, error)

    def check_here(self) -> None:
        """Raise when the machine runs where this program cannot reach it.

        Raises:
            MachineElsewhereError: It does; says where.
        """
        self._catch_up()
        elsewhere = None
        if self._current_state() is State.OFF:
            elsewhere = self._find_elsewhere()
        if elsewhere is not None:
            raise MachineElsewhereError(self.spec.name, elsewhere)

    def check_on(self) -> None:
        """Raise when the machine is off.

        Raises:
            MachineEndedError: It is; says how QEMU ended.
        """
        if self.state is State.OFF:
            raise MachineEndedError(self.spec.name, self.end)

    def check_disk(self) -> None:
        """Let it go on that stood still for want of room on the host, if there is some now.

        Raises:
            HostDiskFullError: There is none still.
        """
        qemu = self._qemu
        if qemu is None or not qemu.disk_full:
            return
        # Whoever changes the machine may wait for one who looks at it so; it is looked at again.
        with contextlib.suppress(InstanceNotFoundError), self.rundir.try_lock() as ours:
            if ours:
                qemu.check_disk()

    def check_kernel(self, *, decided: bool = False) -> None:
        """Raise when the guest's kernel has panicked, and does not boot again by itself.

        Args:
            decided: Whether to wait until it is decided, where the console says so: some seconds.

        Raises:
            KernelPanicError: It has.
        """
        self._dead_ends.check_kernel(self.execute, decided=decided)

    def check_boot(self, since: int) -> None:
        """Raise when the boot goes no further by itself.

        Args:
            since: Where in the console's log that has to be told, at the earliest.

        Raises:
            BootFailedError: It does not, by the console and by what else can be seen.
        """
        self._dead_ends.check_boot(since, self.execute)

    def wait_until_off(self, deadline: Deadline) -> None:
        """Wait until the machine is off.

        Raises:
            MachinePausedError: It is paused for long (a `PycloudlibTimeoutError`).
            PycloudlibTimeoutError: It still runs at the deadline.
        """
        while not self.wait_for_end(Deadline.after(deadline.capped(_STOP_LOOK))):
            if deadline.expired:
                raise PycloudlibTimeoutError(
                    f"{self.spec.name} still runs after {deadline.limit:.0f} s of waiting for its "
                    "stop"
                )
            # Its guest cannot do anything then.
            with contextlib.suppress(MachineEndedError):
                self.check_pause()

    def check_pause(self) -> None:
        """Raise when the machine is paused, and has been for more than `pause_patience` seconds.

        Raises:
            MachinePausedError: It is; names QEMU's status.
            MachineEndedError: It is off.
        """
        qemu = self._qemu
        if qemu is not None:
            qemu.check_pause(self.pause_patience, self.rundir.is_locked)

    def wait_for_end(self, deadline: Deadline) -> bool:
        """Wait until QEMU is gone; say whether it was in time.

        Raises:
            MachineElsewhereError: It runs where its end cannot be seen.
        """
        self.check_here()
        with self._changed:
            return self._changed.wait_for(lambda: self.state is State.OFF, deadline.remaining)

    def power_off(self, deadline: Deadline) -> PowerOff:
        """Power the machine off: cleanly if the guest does so in time, then by force.

        Args:
            deadline: When it has to be off; the last tenth of the time is for force.
        """
        if self.state is State.OFF:
            return PowerOff.OFF_ALREADY
        # A guest whose processors do not run cannot react; for a save, it is for a moment.
        paused = self.state is State.PAUSED and not self.rundir.is_locked()
        share = 0 if paused else _ACPI_SHARE
        acpi = Deadline(deadline.started, deadline.limit * share)
        try:
            while not acpi.expired:
                self.execute("system_powerdown", timeout=max(acpi.remaining, 0.1))
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
        with contextlib.suppress(InstanceNotFoundError), self.changing():
            self.kill()
        return PowerOff.KILL

    def kill(self) -> None:
        """End QEMU at once and wait until it is gone; no error when it is gone already.

        Raises:
            CloudError: The kernel did not end it.
            MachineElsewhereError: It runs where it cannot be ended from here.
        """
        self.check_here()
        qemu = self._qemu
        if qemu is not None:
            qemu.kill()

    def delete(self) -> None:
        """End QEMU and remove the run directory; one that is gone already is no error.

        Raises:
            CloudError: The kernel did not end it, or it runs elsewhere; the directory stays.
        """
        with contextlib.suppress(InstanceNotFoundError), self.rundir.lock():
            self.kill()
            recovery.end_process(self.rundir)
            self.rundir.remove()

    def _power_on(self, origin: Origin, load_state: Callable[[RunningQemu], None] | None) -> None:
        with self._changed:
            state = self.state
            if state is not State.OFF:
                self.check_here()
                raise CloudError(
                    f"{self.spec.name} is {state.value}; only a machine that is off can be "
                    "switched on"
                )
            self._starting = True
        try:
            uninterrupted(lambda: self._start(origin, load_state), undo=self.kill)
        finally:
            self._starting = False
            self._notify()

    def _start(self, origin: Origin, load_state: Callable[[RunningQemu], None] | None) -> None:
        begun = time.monotonic()
        log = self.rundir.console_log
        self.rundir.write_console_start(log.stat().st_size if log.exists() else 0)
        # It may have been another QEMU's.
        self.rundir.base_state.unlink(missing_ok=True)
        qemu = RunningQemu.start(self.binary, self.spec, self.rundir, origin)
        if load_state is not None:
            try:
                load_state(qemu)
            except BaseException:
                qemu.kill()
                raise
        with self._changed:
            self._powered_on = begun
            self._take(qemu)

    def _take(self, qemu: RunningQemu) -> None:
        """Take a QEMU for the one that runs the machine."""
        self._qemu = qemu
        qemu.on_change = weakly(self._notify)
        self._notify()

    def _current_state(self) -> State:
        qemu = self._qemu
        if self._starting and (qemu is None or qemu.state is State.OFF):
            return State.STARTING
        return State.OFF if qemu is None else qemu.state

    def _catch_up(self) -> None:
        """Take over the QEMU that another process started, if one runs now."""
        recovery.recover_abandoned(self.rundir)
        with self._changed:
            if self._owner_pid != os.getpid():
                # A forked child has no part in its parent's session and threads.
                self._owner_pid, self._qemu = os.getpid(), None
            if self._current_state() is not State.OFF:
                return
            identity = self.rundir.find_process()
            if identity is None or not self._is_news(identity):
                return
            process = QemuProcess.attach(identity, self.rundir.disk, self.rundir.qemu_log)
            if process is not None:
                self._take(RunningQemu(self.spec.name, self.rundir, process, State.RUNNING))

    def _find_elsewhere(self) -> ProcessIdentity | None:
        """Find the QEMU that runs it, or may run it, where this program cannot see it."""
        identity = self.rundir.find_process()
        if identity is None or not self._is_news(identity):
            return None
        return identity if is_open_elsewhere(identity, self.rundir.disk) else None

    def _is_news(self, identity: ProcessIdentity) -> bool:
        return self._qemu is None or self._qemu.process.identity != identity

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _when_ports_are_free(start: Callable[[], None]) -> None:
    """Start a machine whose ports cannot be others, though a program may look at one just now."""
    deadline = Deadline.after(_PORT_PATIENCE)
    while True:
        try:
            start()
        except PortTakenError:
            if deadline.expired:
                raise
            time.sleep(_PORT_INTERVAL)
        else:
            return
