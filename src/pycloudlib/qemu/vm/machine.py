"""A machine over all its power cycles: its power, and which QEMU runs it now."""

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
from pycloudlib.errors import CloudError, InstanceNotFoundError, PycloudlibTimeoutError
from pycloudlib.guest.boot.console import Console
from pycloudlib.qemu.host.processes import ProcessIdentity
from pycloudlib.qemu.parts.part import Origin
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.state.spec import MachineSpec
from pycloudlib.qemu.vm import livedisk
from pycloudlib.qemu.vm.memory import check_command, choose_memory
from pycloudlib.qemu.vm.process import ProcessEnd, QemuProcess, is_open_elsewhere, retry_taken_ports
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
# The last part of the time for powering off is kept for harder ways.
_ACPI_SHARE = 0.9
_PAUSE_PATIENCE = 10.0
_STOP_INTERVAL = 1.0


@enum.unique
class PowerOff(enum.Enum):
    """What it took to power a machine off, from gentle to hard."""

    OFF_ALREADY = "it was off already"
    ACPI = "ACPI: the guest powered itself off"
    QUIT = "QMP quit: the guest did not react in time"
    KILL = "SIGKILL: QEMU did not react in time"


class Machine:
    """One machine over all its power cycles. Safe to use from several threads.

    Several processes may each have a `Machine` of the same run directory, which says which QEMU
    runs.

    Args:
        rundir: The instance's directory.
        spec: What machine it is.
        binary: The QEMU binary.

    Attributes:
        powered_on: When this object switched it on last, in `time.monotonic` seconds.
        pause_patience: Seconds for which a machine may be paused while a wait for it continues;
            pauses for a save or a copy do not count.
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
        self.powered_on = time.monotonic()
        self.console = Console(rundir.console_log, rundir.read_console_start)
        self._dead_ends = DeadEndCheck(spec.name, self.console, spec.ssh_port)
        self._owner_pid = os.getpid()
        self.pause_patience = _PAUSE_PATIENCE
        self.paused_by_saves = 0.0

    @property
    def state(self) -> State:
        """What it is doing now."""
        self._catch_up()
        return self._current_state() if self._find_elsewhere() is None else State.ELSEWHERE

    @property
    def end(self) -> ProcessEnd | None:
        """How QEMU ended; None while it runs, or when it never ran."""
        return self._qemu.end if self._qemu else None

    @property
    def events(self) -> tuple[Event, ...]:
        """The latest QMP events, oldest first; none of a machine that another process started."""
        return self._qemu.events if self._qemu else ()

    @property
    def last_reset(self) -> float:
        """When the guest was last reset, by the events that were kept; 0 if by none of them."""
        return max((event.timestamp for event in self.events if event.name == "RESET"), default=0)

    @property
    def console_start(self) -> int:
        """Where its present boot begins in the console log, in bytes, whoever started it."""
        return self.console.look().boot_start

    @property
    def pid(self) -> int | None:
        """The process id of its QEMU; None when it is off, or runs elsewhere."""
        on = self.state not in (State.OFF, State.ELSEWHERE)
        return self._qemu.process.pid if on and self._qemu else None

    def power_on(
        self, origin: Origin | None = None, load_state: Callable[[RunningQemu], None] | None = None
    ) -> None:
        """Start QEMU and connect to it.

        Args:
            origin: What it begins with; by default with a boot.
            load_state: Loads a state into the QEMU, which becomes the machine's only then.

        Raises:
            LaunchError: QEMU ended at once; carries its command line, exit status and stderr.
            PortTakenError: Another program listens on one of the machine's ports.
            InstanceNotFoundError: The machine is deleted.
            CloudError: It runs already, or does not answer.
        """
        with self.changing():
            self._power_on(origin, load_state)

    def power_on_again(self) -> None:
        """Start QEMU of a machine that has run before on its known ports, unless it runs.

        Raises the errors of `power_on`; retries a port that another program holds for a while.
        """
        with self.changing():
            if self.state in (State.RUNNING, State.PAUSED):
                return  # another program was quicker
            retry_taken_ports(lambda: self._power_on(None, None))

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Lock the machine for changes in the block: of its power, QEMU, disk and devices.

        Completes first what another program has left half done. Raises InstanceNotFoundError when
        the machine is deleted.
        """
        with self.rundir.power_lock():
            livedisk.recover(self.rundir)
            # Another program may have added a disk, or removed one. A file that is damaged by now
            # is no reason not to power the machine off.
            with contextlib.suppress(InstanceNotFoundError):
                self.spec = self.rundir.read_spec()
            yield

    def change_spec(self, spec: MachineSpec) -> None:
        """Let it be another machine from its next start on; the caller is `changing` it."""
        if spec != self.spec:
            self.rundir.write_spec(spec, created=self.rundir.created)
            self.spec = spec

    @contextlib.contextmanager
    def staying_off(self) -> Iterator[None]:
        """Keep others from switching the machine on in the block; raise CloudError if it is on."""
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
        """End QEMU, call `prepare`, and start another QEMU; the caller is `changing` the machine.

        Other arguments and the errors are those of `power_on`.
        """
        self.kill()
        prepare()
        retry_taken_ports(lambda: self._power_on(origin, load_state))

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout: float = ANSWER_LIMIT,
    ) -> Any:
        """Execute a QMP command within `timeout` seconds and return what it returns.

        Raises:
            MachineEndedError: The machine is off.
            QmpError: QEMU refused the command, or did not answer.
            KeptMemoryError: The machine runs on memory that other machines share, and the command
                would change that (a balloon).
            ValueError: `timeout` is not a positive number.
        """
        timeout = positive("timeout", timeout, "seconds")
        with self.session(timeout) as session:
            check_command(self.spec.name, session, command, arguments)
            return session.execute(command, arguments, timeout=timeout)

    def session(
        self, timeout: float = ANSWER_LIMIT
    ) -> contextlib.AbstractContextManager[QmpSession]:
        """Open a QMP session for several commands; raises as `RunningQemu.session` does."""
        return self.qemu().session(timeout)

    def qemu(self) -> RunningQemu:
        """Return the QEMU that runs it now; raises as `check_on` and `check_here` do."""
        self.check_on()
        self.check_here()
        if self._qemu is None:
            raise MachineEndedError(self.spec.name, None)
        return self._qemu

    def refresh(self) -> None:
        """Ask QEMU what the machine is doing, where another process started it.

        Until then it counts as running when its QEMU does.
        """
        try:
            self.qemu().refresh()
        except MachineEndedError:
            pass  # its state shows that
        except QmpError as error:
            _log.info("%s does not report its state: %s", self.spec.name, error)

    def check_here(self) -> None:
        """Raise MachineElsewhereError when the machine runs where this program cannot reach it."""
        self._catch_up()
        elsewhere = self._find_elsewhere()
        if elsewhere is not None:
            raise MachineElsewhereError(self.spec.name, elsewhere)

    def check_on(self) -> None:
        """Raise MachineEndedError, which says how QEMU ended, when the machine is off."""
        if self.state is State.OFF:
            raise MachineEndedError(self.spec.name, self.end)

    def check_disk(self) -> None:
        """Resume a machine that is paused since the host's disk is full, if there is space now.

        Raises:
            HostDiskFullError: There is still none.
        """
        qemu = self._qemu
        if qemu is None or not qemu.disk_full:
            return
        # Whoever holds the lock may wait for this very check, which is called again.
        with contextlib.suppress(InstanceNotFoundError), self.rundir.try_lock() as ours:
            if ours:
                qemu.check_disk()

    def check_kernel(self, *, decided: bool = False) -> None:
        """Raise KernelPanicError when the guest's kernel has; see `DeadEndCheck.check_kernel`."""
        self._dead_ends.check_kernel(self.execute, decided=decided)

    def check_boot(self, since: int) -> None:
        """Raise BootFailedError when the boot cannot continue; see `DeadEndCheck.check_boot`."""
        self._dead_ends.check_boot(since, self.execute)

    def wait_until_off(self, deadline: Deadline) -> None:
        """Wait until the machine is off.

        Raises:
            MachinePausedError: It stays paused (a `PycloudlibTimeoutError`).
            PycloudlibTimeoutError: It still runs at the deadline.
        """
        while not self.wait_for_end(Deadline.after(deadline.capped(_STOP_INTERVAL))):
            if deadline.expired:
                raise PycloudlibTimeoutError(
                    f"{self.spec.name} still runs after {deadline.limit:.0f} s of waiting for its "
                    "stop"
                )
            # The guest of a paused machine cannot power it off.
            with contextlib.suppress(MachineEndedError):
                self.check_pause()

    def check_pause(self) -> None:
        """Raise MachinePausedError when it has been paused for over `pause_patience` seconds."""
        if self._qemu:
            self._qemu.check_pause(self.pause_patience, self.rundir.is_locked)

    def wait_for_end(self, deadline: Deadline) -> bool:
        """Wait until QEMU is gone; return whether it was in time; raises as `check_here` does."""
        self.check_here()
        with self._changed:
            return self._changed.wait_for(lambda: self.state is State.OFF, deadline.remaining)

    def power_off(self, deadline: Deadline) -> PowerOff:
        """Power the machine off: cleanly if the guest reacts in time, else by force.

        The last tenth of the time until the deadline is for force.
        """
        if self.state is State.OFF:
            return PowerOff.OFF_ALREADY
        # A guest whose processors are paused cannot react; a save pauses them for a moment only.
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
        """End QEMU as `QemuProcess.kill` does; raises as `check_here` does, too."""
        self.check_here()
        if self._qemu:
            self._qemu.kill()

    def delete(self) -> None:
        """End QEMU and remove the run directory; one that is gone already is no error.

        Raises:
            CloudError: The kernel did not end it, or it runs elsewhere; the directory stays.
        """
        with contextlib.suppress(InstanceNotFoundError), self.rundir.lock():
            self.kill()
            livedisk.end_process(self.rundir)
            self.rundir.remove()

    def _power_on(
        self, origin: Origin | None, load_state: Callable[[RunningQemu], None] | None
    ) -> None:
        name = self.spec.name
        origin = origin or Origin(choose_memory(self.spec.accelerator))
        with self._changed:
            state = self.state
            if state is not State.OFF:
                self.check_here()
                raise CloudError(
                    f"{name} is {state.value}; only a machine that is off can be switched on"
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
        # It may be of another QEMU.
        self.rundir.base_state.unlink(missing_ok=True)
        qemu = RunningQemu.start(self.binary, self.spec, self.rundir, origin)
        if load_state is not None:
            try:
                load_state(qemu)
            except BaseException:
                qemu.kill()
                raise
        with self._changed:
            self.powered_on = begun
            self._take(qemu)

    def _take(self, qemu: RunningQemu) -> None:
        """Make a QEMU the one that runs the machine."""
        self._qemu = qemu
        qemu.on_change = weakly(self._notify)
        self._notify()

    def _current_state(self) -> State:
        qemu = self._qemu
        if self._starting and (qemu is None or qemu.state is State.OFF):
            return State.STARTING
        return State.OFF if qemu is None else qemu.state

    def _catch_up(self) -> None:
        """Adopt the QEMU that another process started, if one runs now."""
        livedisk.recover_abandoned(self.rundir)
        with self._changed:
            if self._owner_pid != os.getpid():
                # A forked child does not share its parent's session and threads.
                self._owner_pid, self._qemu = os.getpid(), None
            if self._current_state() is not State.OFF:
                return
            identity = self._find_new_process()
            process = None
            if identity is not None:
                process = QemuProcess.attach(identity, self.rundir.disk, self.rundir.qemu_log)
            if process is not None:
                self._take(RunningQemu(self.spec.name, self.rundir, process, State.RUNNING))

    def _find_elsewhere(self) -> ProcessIdentity | None:
        """Find the QEMU that runs it, or may, where this program cannot see it."""
        identity = self._find_new_process() if self._current_state() is State.OFF else None
        elsewhere = identity is not None and is_open_elsewhere(identity, self.rundir.disk)
        return identity if elsewhere else None

    def _find_new_process(self) -> ProcessIdentity | None:
        """Read which process runs it; None if that is the one that is known."""
        identity, known = self.rundir.find_process(), self._qemu
        return None if known is not None and known.process.identity == identity else identity

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
