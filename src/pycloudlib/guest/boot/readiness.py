"""Waiting until a machine is ready: SSH executes commands, cloud-init has finished."""

from __future__ import annotations

import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pycloudlib._base.deadline import Deadline, current_deadline, positive, use_deadline
from pycloudlib.errors import InvalidKeyError, PycloudlibError, PycloudlibTimeoutError
from pycloudlib.guest.access import commands, ssh
from pycloudlib.guest.boot import cloudinit
from pycloudlib.guest.boot.bootlines import Phase, PhaseStart
from pycloudlib.guest.boot.console import Console, DeadEnd
from pycloudlib.result import Result

_log = logging.getLogger(__name__)

DEFAULT_READY_MINUTES = 20.0
"""Minutes that a machine may take until it is ready: a cold boot in emulation on a busy host."""

# Seconds after which an attempt to connect is replaced by another: user-mode networking repeats its
# own attempt to reach the guest at growing intervals, so a new attempt finds a new sshd sooner.
_ATTEMPT_LIMIT = 2.0
_ATTEMPT_PAUSE = 0.2
SERVER_GRACE = 120.0
"""Seconds without any visible event in which an SSH server may still come at cloud-init's end."""
# The console's file is read this often; only the bytes that are new.
_LOOK_SECONDS = 0.25


def ready_limit(minutes: float | None, default: float = DEFAULT_READY_MINUTES) -> Deadline:
    """Return the deadline of a wait for readiness.

    Args:
        minutes: How long it may take; None for the default.
        default: The default, in minutes.

    Raises:
        ValueError: It is not a positive number of minutes.
    """
    if minutes is None:
        return Deadline.after(default * 60)
    return Deadline.after(positive("ready_timeout", minutes, "minutes") * 60)


@dataclass(frozen=True, slots=True)
class _Obstacle:
    """Why commands cannot be executed yet.

    Attributes:
        text: The reason.
        lasts: Seconds after which it is permanent, once cloud-init has ended and nothing else
            happens.
        error: The error that showed it.
    """

    text: str
    lasts: float = math.inf
    error: Exception | None = None

    @property
    def is_timeout(self) -> bool:
        """Whether it is only that no answer came in time."""
        kinds = (TimeoutError, PycloudlibTimeoutError)
        return isinstance(self.error, kinds) or isinstance(
            getattr(self.error, "__cause__", None), kinds
        )


class Readiness(ABC):
    """The hooks of waiting, which clients of an instance override and call."""

    _log: logging.Logger
    _server_grace = SERVER_GRACE

    @property
    @abstractmethod
    def name(self) -> str:
        """What the instance is called."""

    @property
    @abstractmethod
    def ready_timeout(self) -> float:
        """Minutes that a wait for readiness may take in all."""

    @abstractmethod
    def get_boot_id(self) -> str:
        """Return the id of the current boot."""

    @abstractmethod
    def _ssh(self, command: list[str]) -> Result:
        """Run an argument vector in the guest."""

    @abstractmethod
    def _endpoint(self) -> ssh.Endpoint:
        """Return where and as whom to log in."""

    @abstractmethod
    def _is_connected(self) -> bool:
        """Whether there is a connection, which may be lost."""

    @abstractmethod
    def _forget_client(self) -> None:
        """Close the connections that are kept."""

    def _check_alive(self) -> None:  # noqa: B027 - optional to override
        """Raise if the machine can never be reached again; overridden by clouds that know."""

    def _has_settled(self) -> object:
        """Return a mark if cloud-init has ended in the guest's present boot; None otherwise.

        Returns:
            Something that stays the same as long as nothing happens in the guest; None when
            cloud-init has not ended, or that cannot be seen.
        """
        return None

    def _explain_refusal(self) -> str:
        """Explain who can log in, after cloud-init's end, and what to do about it."""
        return "does username= name a user who has the key?"

    def _was_followed(self) -> bool:
        """Whether the guest's present boot was waited for before."""
        return False

    def _seen_warnings(self) -> Sequence[str]:
        """Return the warnings of cloud-init that were seen while it was waited for."""
        return ()

    def _lookout(self) -> Callable[[], None]:
        """Return what is called regularly while a command runs; it raises to end the wait."""
        return self._check_alive

    def _wait_for_instance_start(self, **kwargs: Any) -> None:  # noqa: B027 - optional
        """Wait until the machine is powered on; clouds where that takes time override this."""

    def _wait_for_execute(
        self, old_boot_id: str | None = None, timeout: float | None = None
    ) -> None:
        """Wait until commands can be executed over SSH.

        Args:
            old_boot_id: When given, wait for a boot with another id than this.
            timeout: Seconds it may take.
        """
        deadline = self._deadline(timeout)
        self._log.info("Waiting for SSH on %s, for at most %.0f s", self.name, deadline.limit)
        last_seen = _Obstacle("nothing was tried")
        settled: object = None
        since: float | None = None
        while not deadline.expired:
            self._check_alive()
            hurried = deadline.remaining < min(_ATTEMPT_LIMIT, deadline.limit / 2)
            obstacle = self._try_execute(old_boot_id, deadline)
            if obstacle is None:
                return
            # A last try with less time shows less than the one before.
            if not (hurried and obstacle.is_timeout):
                last_seen = obstacle
            latest = None if math.isinf(obstacle.lasts) else self._has_settled()
            if latest is None:
                since = None
            elif since is None or (obstacle.lasts and latest != settled):
                settled, since = latest, time.monotonic()
            elif time.monotonic() - since >= obstacle.lasts:
                raise PycloudlibTimeoutError(
                    f"{self.name} cannot be used, and that will not change, since its cloud-init "
                    f"has ended: {obstacle.text}; {self._explain_refusal()}"
                ) from obstacle.error
            time.sleep(deadline.capped(_ATTEMPT_PAUSE))
        self._check_alive()
        raise PycloudlibTimeoutError(
            f"{self.name} could not be reached by SSH within {deadline.limit:.0f} s; "
            f"last seen: {last_seen.text}"
        ) from last_seen.error

    def _try_execute(self, old_boot_id: str | None, deadline: Deadline) -> _Obstacle | None:
        """Try once; return the obstacle, or None when commands run."""
        import paramiko  # noqa: PLC0415 - heavy

        try:
            if not self._is_connected():
                # A cheap look first: a whole connection is worth its time only with a banner.
                endpoint = self._endpoint()
                limit = max(deadline.capped(_ATTEMPT_LIMIT), 0.1)
                ssh.open_with_banner(endpoint.host, endpoint.port, limit).close()
            with use_deadline(deadline):
                boot_id = self.get_boot_id()
        except (OSError, paramiko.SSHException, PycloudlibTimeoutError) as error:
            self._forget_client()
            if isinstance(error.__cause__, ssh.HostKeyRefusedError):
                # Another program answers: because the machine is gone, or permanently.
                self._check_alive()
                raise PycloudlibTimeoutError(str(error)) from error
            if isinstance(error.__cause__, InvalidKeyError):
                raise  # no later attempt would go better
            lasts = math.inf
            if ssh.is_refusal(error):
                lasts = 0.0
            elif isinstance(error, ConnectionError):
                lasts = self._server_grace
            return _Obstacle(str(error) or type(error).__name__, lasts, error)
        if not boot_id or " " in boot_id:
            # A login shell that runs nothing, or a key that only prints whom to log in as.
            output = f"; it said {boot_id!r}" if boot_id else ""
            self._forget_client()
            text = f"commands do not run, the boot id could not be read{output}"
            return _Obstacle(text, 0.0, ssh.NoCommandsError(text))
        if boot_id == old_boot_id:
            # The old boot ends soon, and the connection with it.
            self._forget_client()
            return _Obstacle("the machine has not rebooted yet")
        return None

    def _wait_for_cloudinit(self, *, raise_on_failure: bool = False) -> None:
        """Wait until cloud-init has finished in this boot, and log what failed in it.

        Args:
            raise_on_failure: Whether a failure of cloud-init raises instead.
        """
        self._log.info("Waiting for cloud-init on %s", self.name)
        status = self._follow_cloudinit()
        if status is None:
            return
        if status.failed:
            message = f"cloud-init failed on {self.name}: {status.failure}"
            self._log.warning("%s", message)
            if raise_on_failure:
                raise PycloudlibError(message)
        for warning in cloudinit.merge_warnings(status.warnings, self._seen_warnings()):
            self._log.warning("cloud-init on %s: %s", self.name, warning)

    def _follow_cloudinit(self) -> cloudinit.CloudInitStatus | None:
        """Wait for cloud-init over reboots; return its status, None if that is unreadable."""
        with use_deadline(self._deadline(None)) as deadline:
            return self._ask_cloudinit(deadline)

    def _ask_cloudinit(self, deadline: Deadline) -> cloudinit.CloudInitStatus | None:
        import paramiko  # noqa: PLC0415 - heavy

        while True:
            self._check_alive()
            try:
                if self._was_followed():
                    result = self._ssh(list(cloudinit.BRIEF_WAIT_COMMAND))
                else:
                    with commands.leaving_shell():
                        result = self._ssh(list(cloudinit.WAIT_COMMAND))
            except paramiko.SSHException as error:
                problem = str(error)
            except PycloudlibTimeoutError as error:
                raise PycloudlibTimeoutError(
                    f"cloud-init on {self.name} did not finish within {deadline.limit:.0f} s"
                ) from error
            else:
                # The guest may reboot under the script: then there is no exit status.
                if result.ok:
                    status = self._read_status(result.stdout)
                    if status is None or not self._goes_down(status.shutdown, deadline):
                        return status
                    problem = self._follow_shutdown(deadline)
                else:
                    problem = f"exit status {result.return_code}: {result.stderr}"
            self._check_alive()
            self._log.debug("Asking for cloud-init's status again: %s", problem)
            self._forget_client()
            time.sleep(deadline.capped(_ATTEMPT_PAUSE))
            self._wait_for_execute()

    def _read_status(self, output: str) -> cloudinit.CloudInitStatus | None:
        try:
            return cloudinit.parse_status(output)
        except ValueError as error:
            self._log.warning("cloud-init's status on %s cannot be read: %s", self.name, error)
            return None

    def _goes_down(self, shutdown: cloudinit.Shutdown | None, deadline: Deadline) -> bool:
        """Whether the guest is shutting down, or reboots soon, so that it is not ready yet."""
        if shutdown is None:
            return False
        if shutdown.under_way:
            self._log.info("%s goes down by itself (%s); waiting", self.name, shutdown.mode)
            return True
        plan = f"{self.name} is announced to go down ({shutdown.mode}) in {shutdown.seconds:.0f} s"
        if shutdown.boots_again and shutdown.seconds < deadline.remaining:
            self._log.info("%s; waiting for that", plan)
            return True
        self._log.warning("%s; until then it is ready", plan)
        return False

    def _follow_shutdown(self, deadline: Deadline) -> str:
        """Wait until a guest's shutdown has ended it, or was cancelled; return which."""
        import paramiko  # noqa: PLC0415 - heavy

        try:
            result = self._ssh(list(cloudinit.GOING_DOWN_COMMAND))
        except paramiko.SSHException as error:
            return str(error)
        except PycloudlibTimeoutError as error:
            raise PycloudlibTimeoutError(
                f"{self.name} did not go down within {deadline.limit:.0f} s"
            ) from error
        return "it goes down no more" if result.ok else "it is gone"

    def _deadline(self, timeout: float | None) -> Deadline:
        if timeout is not None:
            return Deadline.after(timeout)
        return current_deadline() or ready_limit(None, self.ready_timeout)


class BootWatch:
    """Follows a console and notes when each phase of the latest boot begins.

    A context manager: a thread follows the console inside its block.

    Args:
        console: The console.
        offset: Where in its log this boot begins, in bytes.
        powered_on: When the power was switched on, in `time.monotonic` seconds.
        on_line: Called with the latest phase and line after each look at the log, new or not.

    Attributes:
        offset: Where in the log this boot begins.
    """

    def __init__(
        self,
        console: Console,
        offset: int,
        powered_on: float,
        on_line: Callable[[Phase | None, str], None] | None = None,
    ) -> None:
        self._console = console
        self.offset = offset
        self._powered_on = powered_on
        self._on_line = on_line
        self._seen = console.look()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="boot-watch", daemon=True)

    def __enter__(self) -> BootWatch:
        # What is there already is known at once.
        self.look()
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self.look()

    @property
    def timeline(self) -> tuple[PhaseStart, ...]:
        """The phases that were seen in the latest boot, in the order of their beginning."""
        rebooted = self._seen.rebooted
        begun = self._powered_on if rebooted is None else rebooted
        return tuple(
            PhaseStart(seen.phase, seen.seen - begun)
            for seen in self._seen.phases
            if seen.offset >= self.offset
        )

    @property
    def phase(self) -> Phase | None:
        """The latest phase; None before the first sign of life."""
        timeline = self.timeline
        return timeline[-1].phase if timeline else None

    @property
    def dead_end(self) -> DeadEnd | None:
        """Where the boot goes no further, as the console has it; None while it may."""
        return self._seen.find_dead_end(self.offset)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings of cloud-init, as "WARNING: the first line of what is wrong"."""
        return self._seen.warnings(self.offset)

    @property
    def lines(self) -> tuple[str, ...]:
        """The latest lines, as text, and significant ones before them."""
        return tuple(self._console.lines)

    @property
    def position(self) -> int:
        """How much is on the console, in bytes: the same as long as nothing is printed."""
        return self._seen.position

    @property
    def last_line(self) -> str:
        """The latest line with anything in it."""
        last = self._seen.last_line
        return last.text if last.offset >= self.offset else ""

    def _follow(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            self.look()
            if self._on_line is not None:
                try:
                    self._on_line(self.phase, self.last_line)
                except Exception:  # noqa: BLE001 - a callback's error must not end the wait
                    _log.exception("The callback for progress failed and is not called any more")
                    self._on_line = None

    def look(self) -> None:
        """Read what has come on the console."""
        self._seen = self._console.look()
        if self._seen.position < self.offset:
            self.offset = 0  # the log was truncated
