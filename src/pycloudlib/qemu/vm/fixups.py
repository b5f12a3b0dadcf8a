"""A copy of a saved machine is fixed up before it is used: its clock, its identity, its keys."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable

from pycloudlib._base.deadline import current_deadline
from pycloudlib._base.locks import exclusive_lock
from pycloudlib.errors import CloudError, PycloudlibTimeoutError
from pycloudlib.guest import helper
from pycloudlib.guest.helper import FixUp, HelperError
from pycloudlib.qemu.vm.helperlink import HelperLink
from pycloudlib.qemu.vm.running import State
from pycloudlib.result import Result

_log = logging.getLogger(__name__)

_SYNC_LIMIT = 60.0
_FIX_LIMIT = 60.0
# Seconds that a guest's clock may have lost to saves: it takes the guest longer to correct it than
# a save pauses it for.
_CLOCK_TOLERANCE = 0.1


def cap_by_wait(seconds: float) -> float:
    """Return the time for a step: at most some seconds, never more than its wait has left."""
    whole = current_deadline()
    return seconds if whole is None else max(whole.capped(seconds), 0.1)


class FixUps:
    """Fixes up one machine's guest, by the helper where it runs, else by SSH.

    Args:
        link: The connection to the helper.
        execute: Runs a command in the guest as the login user, as `BaseInstance.execute` does.
        disconnect: Closes the SSH connections.

    Attributes:
        ssh_restarts: Whether the guest's SSH server was restarted, and has not answered since.
    """

    def __init__(
        self, link: HelperLink, execute: Callable[..., Result], disconnect: Callable[[], None]
    ) -> None:
        self._link = link
        self._machine = link.machine
        self._name = link.machine.spec.name
        self._execute = execute
        self._disconnect = disconnect
        self.ssh_restarts = False

    def start_helper(self, username: str) -> bool:
        """Start the helper in the guest, unless it runs already; return whether it runs.

        It is a program that answers on a virtio-serial port, in memory alone: a reboot ends it.

        Args:
            username: The login user.
        """
        import paramiko  # noqa: PLC0415 - heavy

        if self._machine.state is not State.RUNNING:
            return False
        if self._link.expected and self._link.is_up():
            return True
        try:
            result = self._execute(
                helper.install_script(), stdin=helper.program(), description="starting the helper"
            )
        except (paramiko.SSHException, PycloudlibTimeoutError) as error:
            _log.warning("%s is saved without a helper: %s", self._name, error)
            return False
        if result.failed or not self._link.wait_until_up(username):
            _log.warning("%s is saved without a helper: %s", self._name, result.stderr)
            return False
        return True

    def sync(self, username: str) -> bool:
        """Have the helper sync the guest's disks; return whether it did.

        The first command of a copy then has what it needs in memory, and a copy that cannot be
        restored boots from that disk.
        """
        return self._link.execute(["sync"], username, b"", _SYNC_LIMIT) is not None

    def correct_clock(self) -> None:
        """Correct the guest's clock once it has lost a tenth of a second to saves."""
        if self._link.expected and self._machine.paused_by_saves >= _CLOCK_TOLERANCE:
            with contextlib.suppress(CloudError, PycloudlibTimeoutError):
                self._link.fix(FixUp())
                self._machine.paused_by_saves = 0.0

    def fix_up_soon(self) -> None:
        """Fix up a copy at once if its helper answers; else the next wait does it."""
        import paramiko  # noqa: PLC0415 - heavy

        try:
            if self._link.expected:
                self.fix_up()
        except (CloudError, PycloudlibTimeoutError, paramiko.SSHException) as error:
            _log.warning("%s will be fixed up by wait(): %s", self._name, error)

    def fix_up(self) -> None:
        """Fix up a copy if that is not done yet: its clock, random numbers, and identity."""
        rundir = self._machine.rundir
        if not rundir.fix_up.exists():
            return
        with exclusive_lock(rundir.path / "fix-up.lock"):
            try:
                fix_up = FixUp.from_json(rundir.fix_up.read_text(encoding="utf-8"))
            except FileNotFoundError:
                return  # another thread was first
            except (OSError, ValueError) as error:
                raise CloudError(
                    f"{rundir.fix_up} is damaged, so that {self._name} cannot be fixed up: {error}"
                ) from error
            try:
                self._link.fix(fix_up, cap_by_wait(_FIX_LIMIT))
            except HelperError as error:
                _log.info("%s is fixed up by SSH: %s", self._name, error)
                self._fix_up_by_ssh(fix_up)
            rundir.fix_up.replace(rundir.fixed_up)
        if fix_up.identity is not None:
            # Its SSH server restarts with the new key, and does not answer for a moment.
            self._disconnect()
            self.ssh_restarts = True

    def _fix_up_by_ssh(self, fix_up: FixUp) -> None:
        """Do what the helper would, where none runs: by the same program."""
        ahead = helper.measure_clock(lambda: float(self._execute("date +%s.%N")))
        result = self._execute(
            helper.once_command(),
            stdin=json.dumps({**fix_up.request(), "ahead": ahead}) + "\n",
            use_sudo=True,
            description="fixing up a copy",
        )
        if result.failed or '"error"' in result:
            problem = f"{self._name} could not be fixed up: {result}{result.stderr}"
            if fix_up.identity is not None or fix_up.new_key is not None:
                raise CloudError(problem)
            # A guest without Python or sudo: only its clock and random numbers are the old ones.
            _log.warning("%s", problem)

    def check_first_boot(self) -> None:
        """Make sure that a machine whose first boot began in the middle has been fixed up."""
        import paramiko  # noqa: PLC0415 - heavy

        program = self._machine.rundir.first_boot
        try:
            text = program.read_text(encoding="utf-8")
        except FileNotFoundError:
            return
        try:
            result = self._execute(
                helper.first_boot_check(), stdin=text, description="checking the first boot"
            )
        except (paramiko.SSHException, PycloudlibTimeoutError) as error:
            # Its user-data may reboot it; then the next wait checks it.
            _log.info("The first boot of %s is not checked yet: %s", self._name, error)
            return
        if result.return_code < 0:
            _log.info("The connection to %s ended while its first boot was checked", self._name)
            return
        program.unlink(missing_ok=True)
        if result.failed or result.stdout:
            _log.warning(
                "%s began its first boot where another machine was stopped, and was not fixed up "
                "in time: %s%s",
                self._name,
                result.stdout,
                result.stderr,
            )
