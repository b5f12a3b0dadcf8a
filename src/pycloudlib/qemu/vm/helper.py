"""The helper in a machine's guest: the way to it, and what it fixes up in a copy."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pycloudlib._base.deadline import Deadline, capped, current_deadline
from pycloudlib._base.documents import to_bytes
from pycloudlib._base.files import write_private
from pycloudlib._base.locks import exclusive_lock, try_lock
from pycloudlib.errors import CloudError, PycloudlibTimeoutError
from pycloudlib.guest import helper
from pycloudlib.guest.access.commands import command_in_errors
from pycloudlib.guest.access.portstream import PortError, PortStream
from pycloudlib.guest.helper import (
    LARGEST_STDIN,
    FixUp,
    HelperConnection,
    HelperError,
    HelperRefusedError,
)
from pycloudlib.qemu.vm import sockets
from pycloudlib.qemu.vm.machine import Machine
from pycloudlib.qemu.vm.running import ANSWER_LIMIT, State
from pycloudlib.result import Result

_log = logging.getLogger(__name__)

_FIX_LIMIT = 60.0
_APPEAR_LIMIT = 60.0
_APPEAR_INTERVAL = 0.05
RESTORE_LIMIT = 2.0
"""Seconds in which a copy that was just restored sees its helper."""
_RESTORE_INTERVAL = 0.005
LEAVING_LIMIT = 0.5
"""Seconds in which QEMU notices that a client has left."""
# A copy that was cut off ends within a second of the guest's; then the helper answers at once.
_RECOVER_TRIES = 3
RECOVER_LIMIT = 2.0
"""Seconds in which a helper answers that has its port."""
RECOVER_PAUSE = 1.5
"""Seconds after which it is asked again."""
_SYNC_LIMIT = 60.0
# A file that is being copied; without the helper, each copy of the machine is ready later.
_SYNC_TURN = 10.0
# Seconds that a guest's clock may have lost to saves: it takes the guest longer to correct it than
# a save pauses it for.
_CLOCK_TOLERANCE = 0.1


class HelperLink:
    """Talks to the helper of one machine, if it runs there. Safe to use from several threads.

    Attributes:
        port_is_refused: Whether the login user could not have the port where no helper runs.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.port_is_refused = False

    @property
    def expected(self) -> bool:
        """Whether it should run: it was started, and the guest has not been rebooted."""
        return self.machine.rundir.helper_mark.exists()

    def is_up(self, timeout: float = ANSWER_LIMIT) -> bool:
        """Whether a program in the guest has the helper's port open.

        Args:
            timeout: Seconds that QEMU may take to answer.
        """
        return bool(self.chardev(timeout)["frontend-open"])

    def wait_until_up(self, user: str) -> bool:
        """Wait for a helper that was just started; return whether it came.

        Args:
            user: The login user, as which its commands run.
        """
        deadline = Deadline.after(_APPEAR_LIMIT)
        # Polled, since only the program that started the QEMU would receive an event.
        while not self.is_up():
            if deadline.expired:
                return False
            time.sleep(_APPEAR_INTERVAL)
        write_private(self.machine.rundir.helper_mark, user)
        return True

    def forget(self) -> None:
        """Record that it does not run any more."""
        self.machine.rundir.helper_mark.unlink(missing_ok=True)
        self.port_is_refused = False

    def fix(self, fix_up: FixUp, limit: float = _FIX_LIMIT) -> None:
        """Fix up a copy.

        Raises:
            HelperError: It could not be done.
            PycloudlibTimeoutError: The helper did not answer within `limit` seconds.
        """
        if not self.expected:
            raise HelperError(f"no helper runs in {self.machine.spec.name}")
        deadline = Deadline.after(min(limit, _FIX_LIMIT))
        with self._connection(wait=True, deadline=deadline) as connection:
            if connection is None:
                users = sockets.describe_clients(self.machine.rundir.helper_socket)
                raise HelperError(
                    f"no helper runs in {self.machine.spec.name}, or others use it{users}"
                )
            connection.fix(fix_up, deadline)

    def wait_for_ssh(self, limit: float) -> bool:
        """Wait until the guest's SSH server listens that was restarted by `fix`.

        Args:
            limit: Seconds that it may take.

        Returns:
            Whether it does; False also where the helper cannot tell.
        """
        deadline = Deadline.after(limit)
        with self._connection(wait=False, deadline=deadline) as connection:
            if connection is None:
                return False
            try:
                return connection.wait_for_ssh(deadline)
            except (HelperError, PycloudlibTimeoutError) as error:
                _log.debug("%s: %s", self.machine.spec.name, error)
                return False

    def execute(
        self,
        argv: Sequence[str],
        user: str,
        stdin: bytes,
        timeout: float | None,
        turn: Deadline | None = None,
    ) -> Result | None:
        """Run a command by the helper.

        Args:
            argv: The command.
            user: The login user.
            stdin: What it reads.
            timeout: Seconds that it may take; None for no limit.
            turn: Until when others that use the helper are waited for; by default not at all.

        Returns:
            Its result; None when SSH has to do it: the helper does not run, is busy, or runs
            commands as another user. The exit status is -1 when the guest ended meanwhile.

        Raises:
            PycloudlibTimeoutError: It did not end within `timeout` seconds; it is hung up on.
        """
        if len(stdin) > LARGEST_STDIN or not self._serves(user):
            return None
        deadline = None if timeout is None else Deadline.after(timeout)
        with self._connection(wait=False, deadline=deadline, turn=turn) as connection:
            if connection is None:
                return None
            try:
                command = connection.execute(argv, user, stdin, deadline)
            except PycloudlibTimeoutError:
                raise PycloudlibTimeoutError(
                    f"The command did not end within {timeout or 0:g} s and was hung up on: "
                    f"{command_in_errors(' '.join(argv))}"
                ) from None
            except HelperRefusedError as error:
                _log.debug("%s: %s", self.machine.spec.name, error)
                return None
            except HelperError as error:
                _log.debug("%s: %s", self.machine.spec.name, error)
                self.forget()
                return Result("", "", -1)
        return Result(_text(command.out), _text(command.err), command.status or 0)

    @contextlib.contextmanager
    def lend(
        self, program: str, argv: Sequence[str], user: str, turn: Deadline
    ) -> Iterator[PortStream | None]:
        """Have the helper lend its port to a program of ours during the block.

        The block gets None where it cannot be: it does not run, or for another user, or is busy.

        Args:
            program: Its text; see `HelperConnection.lend`.
            argv: Its arguments.
            user: The login user.
            turn: Until when others that use the helper are waited for.

        Raises:
            HelperError: In the block: it is gone.
            PortError: In the block: the program is gone.
        """
        with contextlib.ExitStack() as stack:
            stream = self._lend(program, argv, user, turn, stack) if self._serves(user) else None
            if stream is None:
                stack.close()
            else:
                # From the end of the connection on, it may take a moment to be noticed.
                stack.callback(self._note_lent)
            yield stream
            stack.close()
            if stream is not None:
                self.machine.rundir.lent_mark.unlink(missing_ok=True)

    def _lend(
        self,
        program: str,
        argv: Sequence[str],
        user: str,
        turn: Deadline,
        stack: contextlib.ExitStack,
    ) -> PortStream | None:
        try:
            connection = stack.enter_context(self._connection(wait=False, deadline=None, turn=turn))
            if connection is None:
                return None
            self._note_lent()
            return stack.enter_context(connection.lend(program, argv, user))
        except (HelperError, PortError, PycloudlibTimeoutError) as error:
            _log.debug("%s: %s", self.machine.spec.name, error)
            if isinstance(error, HelperRefusedError):
                self.machine.rundir.lent_mark.unlink(missing_ok=True)
            return None

    def _note_lent(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # the machine is deleted
            self.machine.rundir.lent_mark.touch(0o600)

    @contextlib.contextmanager
    def free_port(self, turn: Deadline) -> Iterator[bool]:
        """Keep others from the port during the block, which gets whether nothing has it open.

        Args:
            turn: Until when others are waited for.
        """
        with try_lock(self._lock, turn) as ours:
            yield ours and self._is_closed()

    def _is_closed(self) -> bool:
        """Whether nothing in the guest has the port open; what is about to end is waited for."""
        limit = Deadline.after(RESTORE_LIMIT)
        try:
            while self.is_up():
                if limit.expired:
                    return False
                time.sleep(_APPEAR_INTERVAL)
        except CloudError:
            return False
        return True

    @property
    def _lock(self) -> Path:
        return self.machine.rundir.path / "helper.lock"

    def _serves(self, user: str) -> bool:
        try:
            return self.machine.rundir.helper_mark.read_bytes() == to_bytes(user)
        except (FileNotFoundError, IsADirectoryError):
            return False

    def _is_ready(self, limit: Deadline, deadline: Deadline | None) -> bool:
        """Wait until it runs and is free; return whether it does.

        While another program has its socket, a connection would wait without an answer.

        Args:
            limit: Until when it has to be free.
            deadline: Until when QEMU has to have answered.
        """
        appearing = Deadline.after(RESTORE_LIMIT)
        try:
            while True:
                chardev = self.chardev(_answer_limit(deadline))
                if not chardev["frontend-open"]:
                    if appearing.expired:
                        _log.debug("The helper of %s is gone", self.machine.spec.name)
                        # In a copy that is not fixed up yet it is still expected: SSH may fail.
                        if not self.machine.rundir.fix_up.exists():
                            self.forget()
                        return False
                elif sockets.is_free(chardev):
                    return True
                elif limit.expired:
                    return False
                time.sleep(_RESTORE_INTERVAL)
        except CloudError:
            # SSH, which is used next, reports how the machine ended.
            return False

    def _has_port(self) -> bool:
        """Whether it has the port itself; a copy that was cut off may still have it.

        Such a copy reads what is sent, and ends when the connection does.
        """
        mark = self.machine.rundir.lent_mark
        if not mark.exists():
            return True
        since = time.time() - mark.stat().st_mtime
        if 0 <= since < RECOVER_PAUSE:
            time.sleep(RECOVER_PAUSE - since)
        for _ in range(_RECOVER_TRIES):
            if self._answers():
                mark.unlink(missing_ok=True)
                limit = Deadline.after(LEAVING_LIMIT)
                return self._is_ready(limit, limit)
            time.sleep(RECOVER_PAUSE)
        return False

    def _answers(self) -> bool:
        """Whether what has the port open is the helper, by its answer."""
        try:
            sock = self.connect(Deadline.after(LEAVING_LIMIT))
        except HelperError:
            return False
        with HelperConnection(sock) as connection:
            return connection.is_listening(Deadline.after(RECOVER_LIMIT))

    def adopt(self, user: str) -> bool:
        """Use a helper that runs though nobody knew of it; return whether there is one.

        Args:
            user: The login user.
        """
        with try_lock(self._lock) as ours:
            if not (ours and self._answers()):
                return False
            write_private(self.machine.rundir.helper_mark, user)
            return True

    def _still_there(self, deadline: Deadline | None) -> bool:
        self.machine.check_disk()
        self.machine.check_kernel()
        try:
            return self.is_up(_answer_limit(deadline))
        except CloudError:
            # Where QEMU had no time to answer, that is unknown.
            return deadline is not None and deadline.expired

    @contextlib.contextmanager
    def _connection(
        self, *, wait: bool, deadline: Deadline | None, turn: Deadline | None = None
    ) -> Iterator[HelperConnection | None]:
        """Connect; yield None when it does not run, or is busy and not waited for.

        Args:
            wait: Whether to wait while it is busy.
            deadline: Until when all has to be done.
            turn: Until when others that use it are waited for; by default as `wait` says.
        """
        limit = Deadline.after(_FIX_LIMIT if wait else LEAVING_LIMIT)
        if deadline is not None and (wait or deadline.remaining < limit.remaining):
            limit = deadline
        turn = turn or (limit if wait else Deadline.after(0))
        with try_lock(self._lock, turn) as ours:
            if not (ours and self._is_ready(limit, deadline) and self._has_port()):
                yield None
                return
            sock = self.connect(limit)
            with HelperConnection(sock, lambda: self._still_there(deadline)) as connection:
                yield connection

    def chardev(self, timeout: float) -> Mapping[str, Any]:
        """Ask QEMU who has the helper's port open.

        Args:
            timeout: Seconds that QEMU may take to answer.
        """
        chardevs = self.machine.execute("query-chardev", timeout=timeout)
        return next(dev for dev in chardevs if dev["label"] == "helper")

    def connect(self, deadline: Deadline) -> socket.socket:
        """Connect to the port, whatever is at its other end.

        Args:
            deadline: Until when others that are connected are waited for.

        Raises:
            HelperError: It cannot be reached.
        """
        try:
            return sockets.connect(self.machine.rundir.helper_socket, deadline)
        except OSError as error:
            raise HelperError(f"the helper cannot be reached: {error}") from error


def _answer_limit(deadline: Deadline | None) -> float:
    """Return the seconds that QEMU may take for an answer."""
    return max(capped(ANSWER_LIMIT, deadline), 0.1)


def _text(output: bytearray) -> str:
    return output.decode("utf-8", errors="replace").rstrip()


def cap_by_wait(seconds: float) -> float:
    """Return the time for a step: at most some seconds, never more than its wait has left."""
    return max(capped(seconds, current_deadline()), 0.1)


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
        if self._machine.state is not State.RUNNING:
            return False
        if self._link.expected and self._link.is_up():
            return True
        self._link.forget()
        # While a copy of a file has the port, no helper can.
        with self._link.free_port(Deadline.after(_APPEAR_LIMIT)) as is_free:
            if is_free:
                return self._start_helper(username)
        if self._link.adopt(username):
            return True
        _log.warning("%s is saved without a helper: something else has its port", self._name)
        return False

    def _start_helper(self, username: str) -> bool:
        import paramiko  # noqa: PLC0415 - heavy

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
        turn = Deadline.after(_SYNC_TURN)
        return self._link.execute(["sync"], username, b"", _SYNC_LIMIT, turn) is not None

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

    def fix_up_before_use(self) -> None:
        """Fix up a copy, also by SSH, for what is about to use SSH; a failure is logged.

        Raises:
            paramiko.SSHException: It cannot be reached, so not be used either.
        """
        try:
            self.fix_up()
        except (CloudError, PycloudlibTimeoutError) as error:
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
