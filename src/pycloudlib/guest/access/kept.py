"""One SSH connection to a machine that programs which run one after another use.

A handshake takes a guest in emulation a second. OpenSSH's `ssh` keeps the connection (ControlMaster
in ssh_config(5)) until nobody has used it for a minute, and opens sessions on it for whoever may
connect to its socket: this user alone. It ends with the connection, so with the machine.

What a login has once and for all (groups, environment, limits) is that of the connection. So each
command is preceded by a look at the files behind these, by the login shell itself: where one is
newer than the login, nothing is run, and another connection is made.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pycloudlib._base.deadline import Deadline, capped, current_deadline
from pycloudlib._base.files import (
    create_private_directory,
    opened,
    replace_atomically,
    write_private,
)
from pycloudlib._base.locks import try_lock
from pycloudlib._base.tools import environment, find_tool
from pycloudlib.errors import MissingPrerequisiteError
from pycloudlib.guest.access.mux import Channel, Master, MasterError, RefusedError, Terminal
from pycloudlib.guest.access.sessions import open_session
from pycloudlib.guest.access.ssh import ANSWER_LIMIT, Endpoint, HostKeys, identity_options

if TYPE_CHECKING:
    import paramiko

_log = logging.getLogger(__name__)

DIRECTORY = "ssh"
"""The name of its directory, in that of the machine."""
IDLE_LIMIT = 60
"""Seconds without a session after which the connection ends."""

OPEN_LIMIT = 3.0
"""Seconds that a guest may take to open a session: after a reset, nobody in it answers."""

_SOCKET = "socket"
_HOSTS = "hosts"
_LOCK = "lock"
_UNSUITED = "unsuited"
_CHUNK = 1 << 16
# Bytes that a login shell's start-up files may print.
_LONGEST_BEGINNING = 1 << 20
# Seconds for which a machine counts as one to which no connection can be kept.
_UNSUITED_LIMIT = 300.0
# Seconds that the process on this host may take to answer; it has little to do.
_MASTER_LIMIT = 2.0
# Seconds until the server has to have sent its banner; where it has not, the usual way is tried.
_BANNER_LIMIT = 5

# A name that every machine has: the port may have been another machine's.
_ALIAS = "machine"
_OPTIONS = {
    "BatchMode": "yes",
    "CheckHostIP": "no",
    "Ciphers": "^aes128-gcm@openssh.com",
    "ClearAllForwardings": "yes",
    "ConnectTimeout": str(_BANNER_LIMIT),
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "GSSAPIAuthentication": "no",
    "GlobalKnownHostsFile": "/dev/null",
    "HostKeyAlias": _ALIAS,
    "IdentitiesOnly": "yes",
    # What newer versions prefer takes a guest in emulation longer.
    "KexAlgorithms": "^curve25519-sha256,curve25519-sha256@libssh.org",
    "LogLevel": "ERROR",
    "PermitLocalCommand": "no",
    "PreferredAuthentications": "publickey",
    "StrictHostKeyChecking": "yes",
    "UpdateHostKeys": "no",
    "UserKnownHostsFile": _HOSTS,
    "VerifyHostKeyDNS": "no",
}

# Written when the login was made, by pam_systemd(8).
LOGIN = '"/run/systemd/sessions/$XDG_SESSION_ID"'
BEHIND_LOGINS = (
    "/etc/group",
    "/etc/passwd",
    "/etc/environment",
    "/etc/default/locale",
    "/etc/locale.conf",
    "/etc/login.defs",
    "/etc/nologin",
    "/run/nologin",
    "/etc/pam.d",
    "/etc/security",
    "/etc/security/limits.conf",
    "/etc/security/limits.d",
    "/etc/security/pam_env.conf",
    "/etc/ssh/sshd_config",
    "/etc/ssh/sshd_config.d",
    "~/.ssh/authorized_keys",
    "~/.ssh/environment",
)
_OLD, _CURRENT = b"old", b"current"
# A session that is not opened in time may be opened later, when its command has been run elsewhere.
# So the command is run after a line of input, which is sent once the session is open.
_WHEN_TOLD = b"; read -r pycloudlib && unset pycloudlib || exit; "
# The first version of bash that becomes the last command of a list as it becomes a command that is
# alone: earlier ones stay its parent, and have an exit status where a signal has ended it. Others
# treat both alike.
_OLDEST_BASH = (5, 1)
_BASH = b'"${BASH_VERSION:-9.9}"'


@dataclass(frozen=True, slots=True)
class Keeper:
    """The connection that is kept to one machine, and whoever keeps it.

    Attributes:
        directory: Where its files are; made when missing, this user's alone.
        login: A file in the guest that was written when the login was made, for a shell.
        behind: The files behind what a login has once and for all.
        idle_limit: Seconds without a session after which the connection ends.
        open_limit: Seconds that the guest may take to open a session.
    """

    directory: Path
    login: str = LOGIN
    behind: tuple[str, ...] = BEHIND_LOGINS
    idle_limit: int = IDLE_LIMIT
    open_limit: float = OPEN_LIMIT

    def find(self) -> Master | None:
        """Find the process that keeps the connection, for one request; None if there is none."""
        try:
            # A unix socket's address has 107 bytes at most, which a path may exceed.
            with opened(self.directory, os.O_PATH | os.O_DIRECTORY) as descriptor:
                path = f"/proc/self/fd/{descriptor}/{_SOCKET}"
                return Master(path, Deadline.after(_MASTER_LIMIT))
        except (MasterError, OSError):
            return None

    def connect(
        self,
        endpoint: Endpoint,
        host_keys: HostKeys | None,
        usual: Callable[[], paramiko.SSHClient],
        renew: Callable[[], paramiko.SSHClient],
        *,
        may_start: bool,
    ) -> paramiko.SSHClient:
        """Return a client on the connection that is kept; make one, where that is possible.

        Args:
            endpoint: Where and as whom.
            host_keys: The host keys that the machine may have; only pinned ones are accepted.
            usual: Makes a connection that is not kept.
            renew: Makes another one of either kind, once this one is no good any more.
            may_start: Whether a connection may be made that is kept.

        Raises:
            paramiko.SSHException: No connection, as `usual` raises it.
        """
        if self.is_there():
            return client(self, renew)
        starts = may_start and self._can_start(endpoint, host_keys)
        if starts and self._start(endpoint, host_keys):
            return client(self, renew, is_new=True)
        connection = usual()
        if starts:
            self.give_up()
        return connection

    def is_there(self) -> bool:
        """Whether a connection is kept now."""
        master = self.find()
        if master is not None:
            master.close()
        return master is not None

    def _can_start(self, endpoint: Endpoint, host_keys: HostKeys | None) -> bool:
        known = bool(host_keys and host_keys.pinned()) and endpoint.private_key_path is not None
        return known and not self._is_unsuited()

    def _start(self, endpoint: Endpoint, host_keys: HostKeys | None) -> bool:
        """Connect, unless another program has done so meanwhile; return whether it is connected."""
        deadline = Deadline.after(capped(ANSWER_LIMIT, current_deadline()))
        try:
            create_private_directory(self.directory, parents=False)
        except OSError as error:
            _log.debug("No connection is kept: %s", error)
            return False
        with try_lock(self.directory / _LOCK, deadline) as ours:
            if self.is_there():
                return True
            pinned = host_keys.pinned() if host_keys else ()
            return ours and self._run_master(endpoint, pinned, deadline)

    def end(self) -> None:
        """End the connection, if there is one, with all that runs on it."""
        with contextlib.suppress(OSError):
            (self.directory / _UNSUITED).unlink()
        self._ask(Master.end)

    def stop(self) -> None:
        """Let the connection open no further session; it ends when those that it has have ended."""
        self._ask(Master.stop)

    def give_up(self) -> None:
        """Keep no connection for some time: with this machine that is not possible."""
        with contextlib.suppress(OSError):
            (self.directory / _UNSUITED).touch(mode=0o600)

    def open(
        self,
        line: bytes | None,
        terminal: Terminal | None,
        deadline: Deadline,
        *,
        is_new: bool = False,
    ) -> Channel | None:
        """Run a command, or the login shell, as it would run after a new login.

        Args:
            line: The command line; None for the login shell.
            terminal: The type, columns and lines of its terminal; None for none.
            deadline: Until when it has to have begun.
            is_new: Whether it is not known yet that commands run as on a connection of their own.

        Returns:
            None if nothing has begun: nobody keeps a connection, the guest does not answer, it
            opens no further session, what a login has was changed, or commands do not run so.

        Raises:
            TimeoutError: Whether it has begun is not known.
        """
        mark = secrets.token_hex(8).encode()
        # A login shell takes no command, and a terminal has to show no mark.
        at_once = line is not None and terminal is None
        channel = self._open_told(mark, line if line and at_once else b"true", deadline)
        if channel is None:
            return None
        if not is_new:
            _tell(channel)
        if not _has_begun(channel, mark, deadline, is_new=is_new):
            return None
        if at_once:
            return channel
        channel.close()
        return self._open_untold(line or b"", terminal, deadline)

    def _open_told(self, mark: bytes, line: bytes, deadline: Deadline) -> Channel | None:
        """Prepare a command after a look, unless the guest does not open the session soon."""
        master = self.find()
        if master is None:
            return None
        try:
            limit = Deadline.after(deadline.capped(self.open_limit))
            return Channel(master, self._look(mark) + _WHEN_TOLD + line, limit, None)
        except MasterError as error:
            _log.debug("The connection that is kept opens no session: %s", error)
            return None

    def _open_untold(
        self, request: bytes, terminal: Terminal | None, deadline: Deadline
    ) -> Channel | None:
        """Run what no input can come before, in a guest that has just answered."""
        master = self.find()
        if master is None:
            return None
        try:
            return Channel(master, request, deadline, terminal)
        except RefusedError as error:
            _log.debug("The connection that is kept opens no session: %s", error)
            return None
        except MasterError as error:
            raise TimeoutError(f"the session was not opened in time: {error}") from error

    def _run_master(self, endpoint: Endpoint, pinned: Sequence[str], deadline: Deadline) -> bool:
        options = [f"-o{name}={value}" for name, value in _OPTIONS.items()]
        options.append(f"-oControlPersist={self.idle_limit}")
        try:
            with replace_atomically(self.directory / _HOSTS, synced=False) as temporary:
                write_private(temporary, "".join(f"{_ALIAS} {key}\n" for key in pinned))
            # Of one that was killed. Names alone, so that a path's length does not matter, and the
            # end of this one removes nothing of a later machine with the same name.
            (self.directory / _SOCKET).unlink(missing_ok=True)
            done = subprocess.run(
                [
                    *(str(find_tool("ssh")), "-F", "none", "-M", "-N", "-f", "-S", _SOCKET),
                    *(*options, *identity_options(endpoint)),
                    *("-p", str(endpoint.port), "-l", endpoint.username, "--", endpoint.host),
                ],
                cwd=self.directory,
                env=environment(agent=True),
                # It outlives this program: whoever waits for the end of these must not wait for it.
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                timeout=max(deadline.remaining, 0.1),
                check=False,
            )
        except (MissingPrerequisiteError, OSError, subprocess.TimeoutExpired) as error:
            _log.debug("No connection is kept: %s", error)
            return False
        return done.returncode == 0

    def _is_unsuited(self) -> bool:
        try:
            since = (self.directory / _UNSUITED).stat().st_mtime
        except OSError:
            return False
        return 0 <= time.time() - since < _UNSUITED_LIMIT

    def _look(self, mark: bytes) -> bytes:
        """Return what runs before a command: it prints whether that follows.

        Only what shells have built in, and no variable stays: the command is run as if it was
        alone.
        """
        tests = [f"[ ! -f {self.login} ]", *(f"[ {one} -nt {self.login} ]" for one in self.behind)]
        is_old = " || ".join(tests).encode()
        words = (is_old, mark, _OLD, mark, _CURRENT, _BASH)
        return b"%s && echo %s %s && exit; echo %s %s %s" % words

    def _ask(self, request: Callable[[Master, Deadline], None]) -> None:
        master = self.find()
        if master is not None:
            with contextlib.suppress(MasterError):  # it has ended meanwhile
                request(master, Deadline.after(_MASTER_LIMIT))


def _tell(channel: Channel) -> None:
    """Let the command of a session begin that is open."""
    with contextlib.suppress(OSError):  # it has ended already
        channel.sendall(b"\n")


def _has_begun(channel: Channel, mark: bytes, deadline: Deadline, *, is_new: bool) -> bool:
    """Take the line of a mark out of the output; return whether the command has begun.

    Where it has not, and after an error, the channel is closed.

    Args:
        channel: The channel.
        mark: The mark.
        deadline: Until when it has to come.
        is_new: Whether it decides if the command, which has not been told to yet, is to begin.

    Raises:
        TimeoutError: It did not come in time, or too much came before it.
    """
    try:
        before, told, after = _read_mark(channel, mark, deadline)
    except TimeoutError:
        channel.close()
        if is_new:
            return False
        raise
    if told[:1] == [_OLD] or (is_new and not _suits(told)):
        channel.close()
        return False
    # A shell's start-up files may have printed something before.
    channel.unread(before + after)
    if is_new:
        _tell(channel)
    return True


def _read_mark(
    channel: Channel, mark: bytes, deadline: Deadline
) -> tuple[bytes, list[bytes], bytes]:
    """Read output up to the line of a mark; return that before, its words, and that behind.

    Raises:
        TimeoutError: It did not come in time, or too much came before it.
    """
    output = b""
    while (start := output.find(mark)) < 0 or b"\n" not in output[start:]:
        if deadline.expired or len(output) > _LONGEST_BEGINNING:
            raise TimeoutError("the login shell prints other things and does not begin")
        channel.settimeout(max(deadline.remaining, 0.1))
        chunk = channel.recv(_CHUNK)
        if not chunk:
            break
        output += chunk
    channel.settimeout(None)
    before, _, rest = output.partition(mark)
    line, _, after = rest.partition(b"\n")
    return before, line.split(), after


def _suits(told: list[bytes]) -> bool:
    """Whether commands run in a login shell as they do on a connection of their own."""
    found = re.fullmatch(rb"%s (\d+)\.(\d+).*" % _CURRENT, b" ".join(told))
    return found is not None and (int(found[1]), int(found[2])) >= _OLDEST_BASH


class KeptClient:
    """What this package uses of a `paramiko.SSHClient`, on the connection that is kept.

    Args:
        keeper: The connection.
        renew: Makes a connection, in the usual way where none can be kept; raises as
            `ssh.connect` does.
        is_new: Whether this one was made just now.
    """

    def __init__(
        self,
        keeper: Keeper,
        renew: Callable[[], paramiko.SSHClient],
        *,
        is_new: bool = False,
    ) -> None:
        self._keeper = keeper
        self._renew = renew
        self._is_new = is_new
        self._closers: list[Callable[[], object]] = []
        self._closed = False

    def get_transport(self) -> KeptClient:
        """Return what opens sessions."""
        return self

    def is_active(self) -> bool:
        """Whether it may open sessions."""
        return not self._closed

    def open_session(self, timeout: float | None = None) -> PendingChannel:
        """Return a channel, which is opened with what is asked for on it.

        Args:
            timeout: Seconds until it has to be open.
        """
        limit = ANSWER_LIMIT if timeout is None else timeout
        return PendingChannel(self, Deadline.after(limit))

    def close(self) -> None:
        """Close its sessions."""
        self._closed = True
        for close in self._closers:
            close()

    def begin(
        self, line: bytes | None, terminal: Terminal | None, deadline: Deadline
    ) -> Channel | None:
        """Run a command on a new channel of the kept connection; None where nothing has begun."""
        channel = self._keeper.open(line, terminal, deadline, is_new=self._is_new)
        if channel is not None:
            self._is_new = False
            self._closers.append(channel.close)
        return channel

    def open_elsewhere(self) -> paramiko.Channel:
        """Return a channel of another connection, and have the kept one used no further."""
        self._keeper.stop()
        if self._is_new:
            self._keeper.give_up()
        another = self._renew()
        self._closers.append(another.close)
        return open_session(another)


_NOTHING_RUNS = threading.Event()
_NOTHING_RUNS.set()


class PendingChannel:
    """A channel that is opened with the first request on it, as OpenSSH's masters open them.

    All else is that channel's: what this package uses of a `paramiko.Channel`.
    """

    def __init__(self, client: KeptClient, deadline: Deadline) -> None:
        self._client = client
        self._deadline = deadline
        self._terminal: Terminal | None = None
        self._channel: Any = None
        self._closed = False

    def __enter__(self) -> PendingChannel:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    @property
    def closed(self) -> bool:
        """Whether it is closed on this side."""
        return self._closed or (self._channel is not None and bool(self._channel.closed))

    @property
    def status_event(self) -> threading.Event:
        """Set when nothing runs on it any more, or yet."""
        if self._channel is None:
            return _NOTHING_RUNS
        event: threading.Event = self._channel.status_event
        return event

    def get_pty(self, term: str = "vt100", width: int = 80, height: int = 24) -> None:
        """Ask for a terminal."""
        self._terminal = Terminal(term, width, height)

    def exec_command(self, command: bytes) -> None:
        """Run a command line."""
        self._begin(command)

    def invoke_shell(self) -> None:
        """Run the login shell."""
        self._begin(None)

    def _begin(self, line: bytes | None) -> None:
        terminal = self._terminal
        channel = self._client.begin(line, terminal, self._deadline)
        if channel is not None:
            self._use(channel)
            return
        # What waits for its answers is closed with this.
        another = self._client.open_elsewhere()
        self._use(another)
        if terminal is not None:
            another.get_pty(terminal.kind, terminal.columns, terminal.lines)
        if line is None:
            another.invoke_shell()
        else:
            another.exec_command(line)

    def _use(self, channel: Any) -> None:
        self._channel = channel
        if self._closed:
            channel.close()

    def close(self) -> None:
        """Close it; in any thread."""
        self._closed = True
        if self._channel is not None:
            self._channel.close()


def client(
    keeper: Keeper, renew: Callable[[], paramiko.SSHClient], *, is_new: bool = False
) -> paramiko.SSHClient:
    """Return a client on the connection that is kept; see `KeptClient`."""
    return cast("paramiko.SSHClient", KeptClient(keeper, renew, is_new=is_new))
