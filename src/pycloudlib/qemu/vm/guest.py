"""The guest of a machine, reached by SSH or by the helper that runs in a copy of a saved one."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pycloudlib._base.deadline import Deadline, command_limit, use_deadline
from pycloudlib._base.later import ImportedLater
from pycloudlib.errors import CloudError, KernelPanicError, PycloudlibTimeoutError
from pycloudlib.guest.access import ssh
from pycloudlib.guest.access.commands import encode_stdin
from pycloudlib.guest.access.hostkeys import MachineHostKeys
from pycloudlib.guest.access.kept import Keeper
from pycloudlib.guest.access.sessions import Connections
from pycloudlib.guest.boot.bootlines import Phase, PhaseStart
from pycloudlib.guest.boot.readiness import BootWatch
from pycloudlib.guest.data import runconfig
from pycloudlib.guest.data.seed import read_iso
from pycloudlib.guest.data.userdata import explain_logins
from pycloudlib.progress import Progress, ProgressCallback
from pycloudlib.qemu.host import processes
from pycloudlib.qemu.host.resources import LOOPBACK
from pycloudlib.qemu.vm.fileport import MachineFilePort
from pycloudlib.qemu.vm.helper import FixUps, HelperLink, cap_by_wait
from pycloudlib.qemu.vm.machine import Machine
from pycloudlib.qemu.vm.running import MachineEndedError
from pycloudlib.result import Result

if TYPE_CHECKING:
    import paramiko
else:
    paramiko = ImportedLater("paramiko")

_log = logging.getLogger(__name__)

SHUTDOWN_LIMIT = 120.0
"""Seconds that a guest may take to power itself off before it is switched off."""

# QEMU's end is known at once by the kernel; the connections it held end a moment earlier.
_END_GRACE = 0.5
_BANNER_LIMIT = 30.0
_BANNER_PAUSE = 0.05
# How long it may take to begin a reboot.
_REBOOT_LIMIT = 60.0


class GuestRebootedError(Exception):
    """The guest has begun to reboot, which ends the connection."""


def _weakly(method: Callable[..., Result]) -> Callable[..., Result]:
    """Return a method that does not keep its object alive, which closes its connections."""
    weak = weakref.WeakMethod(method)

    def call(*arguments: Any, **options: Any) -> Result:
        alive = weak()
        assert alive is not None, "its object has it called"
        return alive(*arguments, **options)

    return call


class Guest:
    """Reaches one machine's guest.

    Args:
        machine: The machine.
        connections: The SSH connections to it.
        execute: Runs a command in the guest as the login user, as `BaseInstance.execute` does: a
            method, whose object this does not keep alive.

    Attributes:
        helper: The connection to the helper in the guest.
        keeper: The SSH connection that is kept for programs that run one after another.
        execute: Runs a command in the guest as the login user; see `BaseInstance.execute`.
        fixes: Fixes up a copy, by the helper or by SSH.
        watch: Follows the boot that is waited for; None when none is.
        timeline: The phases of the boot that was followed last.
    """

    def __init__(
        self, machine: Machine, connections: Connections, execute: Callable[..., Result]
    ) -> None:
        self.machine = machine
        self.helper = HelperLink(machine)
        self.keeper = Keeper(machine.rundir.kept_ssh)
        self.watch: BootWatch | None = None
        self.timeline: tuple[PhaseStart, ...] = ()
        self._connections = connections
        self.execute = _weakly(execute)
        self.fixes = FixUps(self.helper, self.execute, connections.close)
        self._may_go_down = False
        # The console's position and the time when a reboot was last requested.
        self._reboot = (0, 0.0)

    @property
    def name(self) -> str:
        """The machine's name."""
        return self.machine.spec.name

    @property
    def is_reachable(self) -> bool:
        """Whether commands can be run without making a connection first."""
        return self._connections.any_open or self.helper.expected

    def file_port(self, username: str) -> MachineFilePort:
        """Return what files of a login user go by where that is faster than SSH."""
        return MachineFilePort(self.helper, self._connections, username)

    def forget(self) -> None:
        """Close the connections and forget the helper: the guest that had them is gone."""
        self._connections.close()
        self.keeper.end()
        self.helper.forget()

    @contextlib.contextmanager
    def following_boot(self, on_progress: ProgressCallback | None) -> Iterator[BootWatch]:
        """Follow the boot on the console in the block, so that its outcome ends waits.

        Args:
            on_progress: Called every quarter of a second; see `BaseInstance.wait`.
        """
        machine = self.machine
        boots = (self._reboot, (machine.console_start, machine.powered_on))
        # The latest; (0, 0.0) where no reboot was requested.
        console_start, begun = max(boots)

        def report(phase: Phase | None, line: str) -> None:
            if on_progress is not None:
                elapsed = time.monotonic() - begun
                activity = f"booting: {phase.value if phase else 'power-on'}"
                on_progress(Progress(activity, line, done=elapsed, unit="s"))

        watch = BootWatch(machine.console, console_start, begun, report)
        outer, self.watch = self.watch, watch
        try:
            yield watch
        finally:
            self.watch = outer
            self.timeline = watch.timeline

    def reboot(self) -> None:
        """Begin a reboot: by the guest itself, or by a power cycle when it cannot be asked."""
        log = self.machine.rundir.console_log
        self._reboot = (log.stat().st_size if log.exists() else 0, time.monotonic())
        try:
            # A guest that obeys may take the connection with it: then there is no exit status.
            result = self.execute("systemctl reboot", use_sudo=True, timeout=_REBOOT_LIMIT)
            problem = result.stderr if result.return_code > 0 else None
        except (paramiko.SSHException, PycloudlibTimeoutError) as error:
            problem = str(error)
        if problem is not None:
            _log.warning("%s does not reboot by itself (%s): power cycle", self.name, problem)
            self.power_off()
            self.machine.power_on_again()
        self.forget()

    def power_off(self) -> None:
        """Power the machine off: cleanly if the guest answers to its power button, else by force.

        Raises:
            CloudError: QEMU did not end.
        """
        how = self.machine.power_off(Deadline.after(SHUTDOWN_LIMIT))
        self.forget()
        _log.info("%s is off (%s)", self.name, how.value)

    def run_user_data(self, follow_cloudinit: Callable[[], object]) -> None:
        """Run the user-data of a copy; a failure is logged as one of cloud-init is.

        Args:
            follow_cloudinit: Waits until cloud-init has ended, since the user-data may reboot the
                guest.

        Raises:
            PycloudlibTimeoutError: It did not end in time.
        """
        script = self.machine.rundir.first_run
        try:
            text = script.read_text(encoding="utf-8")
            script.unlink()
        except FileNotFoundError:
            return
        try:
            result = self.execute(
                "exec sh -s", stdin=text, use_sudo=True, description="running the user-data"
            )
        except PycloudlibTimeoutError as error:
            raise PycloudlibTimeoutError(
                f"The user-data of {self.name} did not end in time; its output is in "
                f"{runconfig.OUTPUT_LOG} there"
            ) from error
        if result.return_code < 0:
            _log.info("The connection to %s ended while its user-data ran", self.name)
        elif result.failed:
            _log.warning(
                "The user-data failed on %s with exit status %d: %s",
                self.name,
                result.return_code,
                result.stderr,
            )
        self._may_go_down = True
        try:
            follow_cloudinit()
        finally:
            self._may_go_down = False

    def wait_for_execute(
        self,
        deadline: Deadline,
        username: str,
        old_boot_id: str | None,
        wait_for_ssh: Callable[[], None],
    ) -> None:
        """Wait until commands can be executed: by the helper, where one runs, else over SSH.

        Args:
            deadline: Until when.
            username: The login user.
            old_boot_id: When given, a boot with another id than this is waited for.
            wait_for_ssh: Waits for SSH.
        """
        with use_deadline(deadline):
            if old_boot_id is None and self.helper.expected:
                with contextlib.suppress(CloudError, PycloudlibTimeoutError, paramiko.SSHException):
                    self.fixes.fix_up()
                    limit = cap_by_wait(_BANNER_LIMIT)
                    if self.fixes.ssh_restarts and self.helper.wait_for_ssh(limit):
                        # It answered, so it runs commands.
                        self.fixes.ssh_restarts = False
                        return
                    if self.helper.execute(["true"], username, b"", limit) is not None:
                        self._wait_for_banner()
                        return
            wait_for_ssh()
            self.fixes.check_first_boot()
            self.fixes.fix_up()

    def _wait_for_banner(self) -> None:
        """Wait for an SSH server that was restarted."""
        if not self.fixes.ssh_restarts:
            return
        deadline = Deadline.after(cap_by_wait(_BANNER_LIMIT))
        spec = self.machine.spec
        while True:
            try:
                limit = max(deadline.remaining, 0.1)
                ssh.open_with_banner(LOOPBACK, spec.ssh_port, limit).close()
                self.fixes.ssh_restarts = False
                return
            except OSError as error:
                self.check_alive()
                if deadline.expired:
                    raise PycloudlibTimeoutError(
                        f"SSH did not come back in {self.name}: {error}"
                    ) from error
                time.sleep(deadline.capped(_BANNER_PAUSE))

    def check_alive(self) -> None:
        """Raise when it is decided that the machine will not be ready.

        Raises:
            MachineEndedError: It is off.
            HostDiskFullError: It is paused, since the host has no space for its disk.
            MachinePausedError: It is waited for, and paused for long.
            BootFailedError: Its boot goes no further.
            KernelPanicError: Its kernel has panicked.
        """
        self.machine.check_on()
        self.machine.check_disk()
        if self.watch is None:
            # A command may be running while its caller pauses the machine, and resumes it.
            self.machine.check_kernel()
        else:
            self.machine.check_pause()
            self.machine.check_boot(self.watch.offset)

    def has_settled(self) -> object:
        """Return whether cloud-init has ended in the present boot; see `Readiness`."""
        watch = self.watch
        return watch.position if watch and watch.phase is Phase.CLOUD_INIT_DONE else None

    @property
    def was_followed(self) -> bool:
        """Whether the present boot was followed to its end before."""
        # The helper comes with a machine that was ready when it was saved, or will be.
        return self.helper.expected and not self._may_go_down

    def explain_refusal(self, username: str) -> str:
        """Describe who can log in, by the user-data and the console."""
        try:
            user_data = read_iso(self.machine.rundir.seed).user_data
        except (OSError, ValueError) as error:
            _log.debug("The seed of %s names no users: %s", self.name, error)
            user_data = b""
        return explain_logins(user_data, self.watch.lines if self.watch else (), username)

    def watchdog(self) -> Callable[[], None]:
        """Return what ends the wait for a command when the guest reboots: nobody will answer."""
        machine = self.machine
        # Others may type on the console. Who waits for a boot connects again, which does no harm.
        believed = self.watch is not None

        def count_boots() -> int:
            return machine.console.look().boots if believed else 0

        last_reset, boots = machine.last_reset, count_boots()

        def look() -> None:
            self.check_alive()
            if machine.last_reset > last_reset or count_boots() > boots:
                raise GuestRebootedError

        return look

    def host_keys(self) -> ssh.HostKeys:
        """Return the host keys that the guest may have."""
        return MachineHostKeys(self.machine.rundir.known_hosts, self._ends_in_machine)

    def _ends_in_machine(self, connection: socket.socket) -> bool:
        """Whether QEMU has the other end of a connection, which it forwards to the guest's sshd."""
        process = self.machine.rundir.find_process()
        return process is not None and processes.ends_in(connection, process)

    @contextlib.contextmanager
    def connecting(self) -> Iterator[None]:
        """Name the cause where a connection that is made in the block fails."""
        with self.naming_end():
            self.check_alive()
            self._wait_for_banner()
            yield

    def run(
        self,
        command: Sequence[str],
        username: str,
        stdin: str | bytes | None,
        timeout: float | None,
        by_ssh: Callable[[], Result],
        *,
        get_pty: bool = False,
    ) -> Result:
        """Run an argument vector: by the helper where that is possible, else by SSH.

        Args:
            command: The arguments.
            username: The login user.
            stdin: What the command reads.
            timeout: Seconds it may take.
            by_ssh: Runs it over SSH.
            get_pty: Whether it needs a terminal, which only SSH has.

        Returns:
            Its result; the exit status is -1 where the guest ended meanwhile.

        Raises:
            paramiko.SSHException: The machine is gone; says how it ended.
        """
        with self.naming_end():
            # After a panic, nobody answers on a connection that is kept.
            self.machine.check_kernel()
            data = encode_stdin(stdin)
            limit = command_limit(timeout)
            result = None if get_pty else self.helper.execute(command, username, data, limit)
            if result is None:
                try:
                    result = by_ssh()
                except GuestRebootedError:
                    self.forget()
                    result = Result("", "", -1)
            # The connection ended before the command did: because the guest closed it, which
            # the caller may have wanted, or because the machine is gone.
            if result.return_code < 0 and self.machine.wait_for_end(Deadline.after(_END_GRACE)):
                self.machine.check_on()
        return result

    @contextlib.contextmanager
    def naming_end(self) -> Iterator[None]:
        """Name the cause where SSH failed because QEMU is gone, or the guest's kernel is."""
        try:
            yield
        except (MachineEndedError, KernelPanicError) as error:
            raise paramiko.SSHException(str(error)) from error
        except GuestRebootedError as error:
            raise paramiko.SSHException(f"{self.name} has begun to reboot") from error
        except paramiko.SSHException as error:
            if self.machine.wait_for_end(Deadline.after(_END_GRACE)):
                raise paramiko.SSHException(
                    str(MachineEndedError(self.name, self.machine.end))
                ) from error
            if self.watch is None:
                try:
                    self.machine.check_kernel(decided=True)
                except KernelPanicError as panic:
                    raise paramiko.SSHException(str(panic)) from panic
            raise
