"""How a machine's guest is reached: by SSH, and by the helper in a copy of a saved machine."""

from __future__ import annotations

import contextlib
import json
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.documents import to_bytes
from pycloudlib._base.locks import exclusive_lock
from pycloudlib.errors import (
    CloudError,
    InstanceNotFoundError,
    KernelPanicError,
    PycloudlibError,
    PycloudlibTimeoutError,
)
from pycloudlib.guest import helper
from pycloudlib.guest.access import ssh
from pycloudlib.guest.access.commands import command_in_errors
from pycloudlib.guest.access.hostkeys import MachineHostKeys
from pycloudlib.guest.boot.bootlines import Phase
from pycloudlib.guest.boot.readiness import BootWatch, command_limit, current_deadline, use_deadline
from pycloudlib.guest.data import runconfig
from pycloudlib.guest.data.seed import read_iso
from pycloudlib.guest.data.userdata import explain_logins
from pycloudlib.guest.helper import FixUp, HelperError
from pycloudlib.key import KeyPair
from pycloudlib.qemu.diagnosed import DiagnosedInstance
from pycloudlib.qemu.host import processes
from pycloudlib.qemu.host.resources import LOOPBACK
from pycloudlib.qemu.vm.helperlink import HelperLink
from pycloudlib.qemu.vm.machine import Machine, MachineEndedError, State
from pycloudlib.result import Result

if TYPE_CHECKING:
    import paramiko

# QEMU's end is told by the kernel at once; the connections it held end a moment earlier.
_END_GRACE = 0.5
_BANNER_LIMIT = 30.0
_BANNER_PAUSE = 0.05
_SYNC_LIMIT = 60.0
# Seconds that a guest's clock may have lost to saves: it takes the guest longer to set it right
# than it stands still for one.
_CLOCK_TOLERANCE = 0.1
_FIX_LIMIT = 60.0
_SHOWN_COMMAND = 100
# The first that is leased in QEMU's user-mode network (qemu(1), -netdev user, dhcpstart).
_GUEST_ADDRESS = "10.0.2.15"


def _capped(seconds: float) -> float:
    """Return the time for a step: at most some seconds, never more than its wait has left."""
    whole = current_deadline()
    return seconds if whole is None else max(whole.capped(seconds), 0.1)


class _GuestRebootedError(Exception):
    """The guest has begun to boot anew, and its end of the connection is no more."""


class GuestAccess(DiagnosedInstance):
    """A machine whose guest is reached by SSH, or by a helper that runs in it."""

    def __init__(self, key_pair: KeyPair, machine: Machine, username: str | None) -> None:
        super().__init__(key_pair, machine, username)
        self.port = str(machine.spec.ssh_port)
        self._helper = HelperLink(machine)
        self._ssh_begins_anew = False
        self._may_go_down = False
        self._watch: BootWatch | None = None

    @property
    def name(self) -> str:
        """The instance's name, and the guest's host name unless meta-data said otherwise."""
        return self.machine.spec.name

    @property
    def ip(self) -> str:
        """The address of its ports: this host's loopback."""
        return LOOPBACK

    @property
    def private_ip(self) -> str:
        """The address that QEMU's DHCP server gives its first network card.

        A `network_config` of the caller's may give it another one.
        """
        return _GUEST_ADDRESS

    def login_command(self) -> str:
        """Give the command line by which people log in by `ssh`, for a shell."""
        return ssh.login_command(self._endpoint(), self.name)

    def check_exists(self) -> None:
        """Raise when the instance is deleted.

        Raises:
            InstanceNotFoundError: It is.
        """
        if not self.machine.rundir.path.is_dir():
            raise InstanceNotFoundError(self.id, message=f"{self.name} is deleted")

    def wait_until_well(self) -> None:
        """Wait until the machine is ready, and cloud-init has ended without an error.

        Raises:
            PycloudlibTimeoutError: It could not be reached in time.
            PycloudlibError: cloud-init failed; in its own words.
        """
        self.wait()
        status = self._follow_cloudinit()
        if status is not None and status.failed:
            raise PycloudlibError(f"cloud-init failed on {self.name}: {status.failure}")

    def start_helper(self) -> bool:
        """Start the helper in the guest, unless it runs already; say whether it runs.

        It is a program that answers on a virtio-serial port, in memory alone: a reboot ends it.
        """
        import paramiko  # noqa: PLC0415 - heavy

        if self.machine.state is not State.RUNNING:
            return False
        if self._helper.expected and self._helper.appears():
            return True
        try:
            result = self.execute(
                helper.install_script(), stdin=helper.program(), description="starting the helper"
            )
        except (paramiko.SSHException, PycloudlibTimeoutError) as error:
            self._log.warning("%s is saved without a helper: %s", self.name, error)
            return False
        if result.failed or not self._helper.expect(self.username):
            self._log.warning("%s is saved without a helper: %s", self.name, result.stderr)
            return False
        return True

    def sync_by_helper(self) -> bool:
        """Have the guest write to its disk what it has not yet; say whether the helper saw to it.

        What the first command of a copy needs is in the guest's memory then, too, and a copy that
        cannot go on boots from that disk.
        """
        return self._by_helper(["sync"], b"", _SYNC_LIMIT) is not None

    def _can_be_asked(self) -> bool:
        return super()._can_be_asked() or self._helper.expected

    def correct_clock(self) -> None:
        """Give the guest's clock what it has lost to saves, once that is a tenth of a second."""
        if self._helper.expected and self.machine.stood_still >= _CLOCK_TOLERANCE:
            with contextlib.suppress(CloudError, PycloudlibTimeoutError):
                self._helper.fix(FixUp())
                self.machine.stood_still = 0.0

    def put_right_soon(self) -> None:
        """Put a copy right at once if its helper answers; `wait()` sees to it otherwise."""
        import paramiko  # noqa: PLC0415 - heavy

        try:
            if self._helper.expected:
                self._put_right()
        except (CloudError, PycloudlibTimeoutError, paramiko.SSHException) as error:
            self._log.warning("%s will be put right by wait(): %s", self.name, error)

    def _put_right(self) -> None:
        """Put a copy right that is not yet: its clock, its random numbers, who it is."""
        rundir = self.machine.rundir
        if not rundir.fix_up.exists():
            return
        with exclusive_lock(rundir.path / "fix-up.lock"):
            try:
                fix_up = FixUp.from_json(rundir.fix_up.read_text(encoding="utf-8"))
            except FileNotFoundError:
                return  # another thread was first
            except (OSError, ValueError) as error:
                raise CloudError(
                    f"{rundir.fix_up} is damaged, so that {self.name} cannot be put right: {error}"
                ) from error
            try:
                self._helper.fix(fix_up, _capped(_FIX_LIMIT))
            except HelperError as error:
                self._log.info("%s is put right by SSH: %s", self.name, error)
                self._put_right_by_ssh(fix_up)
            rundir.fix_up.replace(rundir.fixed_up)
        if fix_up.identity is not None:
            # Its SSH server begins anew with the new key, and is not there for a moment.
            self._forget_client()
            self._ssh_begins_anew = True

    def _put_right_by_ssh(self, fix_up: FixUp) -> None:
        """Do what the helper would, where none runs: by the same program."""
        ahead = helper.measure_clock(lambda: float(self.execute("date +%s.%N")))
        result = self.execute(
            helper.once_command(),
            stdin=json.dumps({**fix_up.request(), "ahead": ahead}) + "\n",
            use_sudo=True,
            description="putting a copy right",
        )
        if result.failed or '"error"' in result:
            problem = f"{self.name} could not be put right: {result}{result.stderr}"
            if fix_up.identity is not None or fix_up.new_key is not None:
                raise CloudError(problem)
            # A guest without Python or sudo: only its clock and random numbers are the old ones.
            self._log.warning("%s", problem)

    def _check_first_boot(self) -> None:
        """Make sure that a machine whose first boot began in the middle has been put right."""
        import paramiko  # noqa: PLC0415 - heavy

        program = self.machine.rundir.first_boot
        try:
            text = program.read_text(encoding="utf-8")
        except FileNotFoundError:
            return
        try:
            result = self.execute(
                helper.first_boot_check(), stdin=text, description="checking the first boot"
            )
        except (paramiko.SSHException, PycloudlibTimeoutError) as error:
            # Its user-data may have it boot again; then it is looked at by the next wait.
            self._log.info("The first boot of %s is not checked yet: %s", self.name, error)
            return
        if result.return_code < 0:
            self._log.info("The connection to %s ended while its first boot was checked", self.name)
            return
        program.unlink(missing_ok=True)
        if result.failed or result.stdout:
            self._log.warning(
                "%s began its first boot where another machine was stopped, and was not put right "
                "in time: %s%s",
                self.name,
                result.stdout,
                result.stderr,
            )

    def _run_first(self) -> None:
        """Run what a copy was given as user-data; a failure is told as one of cloud-init is."""
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
            self._log.info("The connection to %s ended while its user-data ran", self.name)
        elif result.failed:
            self._log.warning(
                "The user-data failed on %s with exit status %d: %s",
                self.name,
                result.return_code,
                result.stderr,
            )
        # It may have the guest boot again, as in a boot.
        self._may_go_down = True
        try:
            self._follow_cloudinit()
        finally:
            self._may_go_down = False

    def _forget_guest(self) -> None:
        """Close the connection and forget the helper: the guest they were with is no more."""
        self._forget_client()
        self._helper.forget()

    def _wait_for_execute(
        self, old_boot_id: str | None = None, timeout: float | None = None
    ) -> None:
        """Wait until commands can be executed: by the helper, where one runs, or else over SSH."""
        import paramiko  # noqa: PLC0415 - heavy

        with use_deadline(self._deadline(timeout)):
            if old_boot_id is None and self._helper.expected:
                with contextlib.suppress(CloudError, PycloudlibTimeoutError, paramiko.SSHException):
                    self._put_right()
                    if self._by_helper(["true"], b"", _capped(_BANNER_LIMIT)) is not None:
                        self._wait_for_banner()
                        return
            super()._wait_for_execute(old_boot_id)
            self._check_first_boot()
            self._put_right()

    def _by_helper(
        self, command: Sequence[str], stdin: bytes, timeout: float | None
    ) -> Result | None:
        """Run a command by the helper; None where SSH has to do it."""
        return self._helper.execute(command, self.username, stdin, timeout)

    def _wait_for_banner(self) -> None:
        """Wait for an SSH server that was told to begin anew."""
        if not self._ssh_begins_anew:
            return
        deadline = Deadline.after(_capped(_BANNER_LIMIT))
        while True:
            try:
                ssh.open_with_banner(self.ip, int(self.port), max(deadline.remaining, 0.1)).close()
                self._ssh_begins_anew = False
                return
            except OSError as error:
                self._check_alive()
                if deadline.expired:
                    raise PycloudlibTimeoutError(
                        f"SSH did not come back in {self.name}: {error}"
                    ) from error
                time.sleep(deadline.capped(_BANNER_PAUSE))

    def _check_alive(self) -> None:
        """Raise when it is decided that the machine will not be ready.

        Raises:
            MachineEndedError: It is off.
            HostDiskFullError: It stands still, since the host has no room for its disk.
            MachinePausedError: It is waited for, and paused for long.
            BootFailedError: Its boot goes no further.
            KernelPanicError: Nothing in it goes on.
        """
        self.machine.check_on()
        self.machine.check_disk()
        if self._watch is not None:
            # A command may be running while its caller pauses the machine, and resumes it.
            self.machine.check_pause()
        if self._watch is None:
            self.machine.check_kernel()
        else:
            self.machine.check_boot(self._watch.offset)

    def _has_settled(self) -> object:
        watch = self._watch
        return watch.position if watch and watch.phase is Phase.CLOUD_INIT_DONE else None

    def _was_followed(self) -> bool:
        # The helper came with what was saved, or will be: a machine that was ready.
        return self._helper.expected and not self._may_go_down

    def _seen_warnings(self) -> Sequence[str]:
        return self._watch.warnings if self._watch else ()

    def _explain_refusal(self) -> str:
        try:
            user_data = read_iso(self.machine.rundir.seed).user_data
        except (OSError, ValueError) as error:
            self._log.debug("The seed of %s tells of no users: %s", self.name, error)
            user_data = b""
        return explain_logins(user_data, self._watch.lines if self._watch else (), self.username)

    def _lookout(self) -> Callable[[], None]:
        """Give what ends the wait for a command when nobody will answer: its guest boots anew."""
        machine = self.machine
        # Others may type on the console. Who waits for a boot connects anew, which does no harm.
        believed = self._watch is not None
        last_reset, boots = machine.last_reset, machine.boots if believed else 0

        def look() -> None:
            self._check_alive()
            if machine.last_reset > last_reset or (believed and machine.boots > boots):
                raise _GuestRebootedError

        return look

    def _host_keys(self) -> ssh.HostKeys:
        return MachineHostKeys(self.machine.rundir.known_hosts, self._ends_in_machine)

    def _ends_in_machine(self, connection: socket.socket) -> bool:
        """Whether QEMU has the other end of a connection: it hands that on to the guest's sshd."""
        rundir = self.machine.rundir
        process = rundir.find_process()
        return process is not None and processes.ends_in(connection, process)

    def _ssh_connect(self) -> paramiko.SSHClient:
        with self._naming_end():
            self._check_alive()
            self._wait_for_banner()
            return super()._ssh_connect()

    @contextlib.contextmanager
    def _ended_early(self) -> Iterator[None]:
        with self._naming_end(), super()._ended_early():
            yield

    def check_answers(self) -> None:
        """Raise when nobody in the guest will answer any more.

        Raises:
            MachineEndedError: It is off.
            HostDiskFullError: It stands still, since the host has no room for its disk.
            KernelPanicError: Nothing in it goes on.
        """
        self._check_alive()

    def _ssh(
        self,
        command: Sequence[str],
        stdin: str | bytes | None = None,
        get_pty: bool = False,
        timeout: float | None = None,
    ) -> Result:
        waiting_for = f"the end of: {command_in_errors(shlex.join(command)[:_SHOWN_COMMAND])}"
        with self.explaining(waiting_for), self._naming_end():
            # Nobody answers on a connection that is kept then, for as long as it is waited.
            self.machine.check_kernel()
            data = to_bytes(stdin) if isinstance(stdin, str) else bytes(stdin or b"")
            limit = command_limit(timeout)
            result = None if get_pty else self._by_helper(command, data, limit)
            if result is None:
                try:
                    result = super()._ssh(command, stdin, get_pty, timeout)
                except _GuestRebootedError:
                    self._forget_guest()
                    result = Result("", "", -1)
            # The connection ended before the command did: because the guest closed it, which
            # the caller may have wanted, or because the machine is gone.
            if result.return_code < 0 and self.machine.wait_for_end(Deadline.after(_END_GRACE)):
                self.machine.check_on()
        return result

    @contextlib.contextmanager
    def _naming_end(self) -> Iterator[None]:
        """Name the cause where SSH failed because QEMU is gone, or the guest's kernel is."""
        import paramiko  # noqa: PLC0415 - heavy

        try:
            yield
        except (MachineEndedError, KernelPanicError) as error:
            raise paramiko.SSHException(str(error)) from error
        except _GuestRebootedError as error:
            raise paramiko.SSHException(f"{self.name} has begun to boot anew") from error
        except paramiko.SSHException as error:
            if self.machine.wait_for_end(Deadline.after(_END_GRACE)):
                raise paramiko.SSHException(
                    str(MachineEndedError(self.name, self.machine.end))
                ) from error
            if self._watch is None:
                try:
                    self.machine.check_kernel(decided=True)
                except KernelPanicError as panic:
                    raise paramiko.SSHException(str(panic)) from panic
            raise
