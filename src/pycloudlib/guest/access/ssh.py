"""The SSH transport: connect with a pinned host key.

Every failure to connect is raised as `paramiko.SSHException`, the error that clients catch.
"""

from __future__ import annotations

import contextlib
import logging
import re
import select
import shlex
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.files import is_file, moved_socket
from pycloudlib.errors import InvalidKeyError
from pycloudlib.guest.access import loginkey

if TYPE_CHECKING:
    import paramiko

_log = logging.getLogger(__name__)

# Each failure reaches the caller as an exception; paramiko's own log would repeat it, with the
# traceback of an internal thread.
_TRANSPORT_LOG = f"{__name__}.transport"
logging.getLogger(_TRANSPORT_LOG).setLevel(logging.CRITICAL)

# A server that has sent its banner is there, but a busy guest in emulation may take long for its
# part of the key exchange; another try would make it start again.
ANSWER_LIMIT = 60.0
"""Seconds that a server may take for an answer, once it has sent its banner."""
LOGIN_LIMIT = 2 * ANSWER_LIMIT
"""Seconds that the whole way from the banner to being logged in may take."""
_BANNER_START = b"SSH-"
# RFC 4253, 4.2: with the carriage return and the line feed at its end.
_LONGEST_BANNER_LINE = 255
# Encrypts and authenticates in one step: half of this side's work per byte, which limits copies to
# and from a guest under KVM. The guest's work stays the same.
_FIRST_CIPHER = "aes128-gcm@openssh.com"
_SERVER_SAYS = "; the server says: "
_LONGEST_BANNER = 300
# During boot and shutdown, systemd allows only root to log in (systemd-user-sessions.service).
_NO_LOGIN_NOW = re.compile(r"pam_nologin|not permitted to log in")
# What paramiko says of a connection that ended before the server's answer.
_CUT_OFF = re.compile(r"transport shut down|saw EOF|timeout", re.IGNORECASE)


class HostKeys(Protocol):
    """Which host keys a machine may show."""

    def pinned(self) -> Sequence[str]:
        """Return the host keys that are known to be the machine's, as `type base64` lines."""

    def accepts(self, key_line: str, connection: socket.socket) -> bool:
        """Decide on a host key that is not among the pinned ones.

        Args:
            key_line: The key, as `type base64`.
            connection: The connection on which it was shown.
        """


class NoBannerError(TimeoutError):
    """Connections are accepted, and nothing answers on them in time."""


class NoServerError(ConnectionError):
    """Connections are closed at once: nothing in the guest listens."""


class NoCommandsError(Exception):
    """The login user runs no commands; the cause of the error that says so."""


class HostKeyRefusedError(Exception):
    """The host key is not the machine's; the cause of the `paramiko.SSHException` that says so."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and as whom to log in."""

    host: str
    port: int
    username: str
    private_key_path: str | None
    public_key_path: str | None = None

    def __str__(self) -> str:
        return f"{self.username}@{self.host} port {self.port}"


def login_command(endpoint: Endpoint, alias: str = "") -> str:
    """Return the command line by which people log in, for a shell.

    Args:
        endpoint: Where and as whom.
        alias: The name by which the host key is remembered: a port is used again by a machine
            that has another one.
    """
    command = ["ssh", *identity_options(endpoint)]
    if alias:
        command += ["-o", f"HostKeyAlias={alias}"]
    command += ["-p", str(endpoint.port), f"{endpoint.username}@{endpoint.host}"]
    return shlex.join(command)


def identity_options(endpoint: Endpoint) -> list[str]:
    """Return ssh's options for the key to log in with, and no other."""
    # ssh finds a matching key of an agent by the public half as well.
    identity = next(
        (path for path in (endpoint.private_key_path, endpoint.public_key_path) if _is_there(path)),
        endpoint.private_key_path,
    )
    if identity is None:
        return []
    # Otherwise an agent's keys would be tried before this one, and servers allow few tries.
    return [*_identity(identity), "-o", "IdentitiesOnly=yes"]


def _is_there(path: str | None) -> bool:
    return path is not None and is_file(Path(path))


def _identity(path: str) -> list[str]:
    """Return ssh's options for a key file; `%` begins a token there, and is escaped."""
    if "%" not in path:
        return ["-i", path]
    # The value of `-i` has to be there as it is written, too.
    escaped = path.replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
    return ["-o", f'IdentityFile="{escaped}"']


def connect(
    endpoint: Endpoint,
    host_keys: HostKeys | None,
    *,
    banner_timeout: float,
    deadline: Deadline | None = None,
) -> paramiko.SSHClient:
    """Log in.

    Args:
        endpoint: Where and as whom.
        host_keys: Which host keys are accepted; None accepts any.
        banner_timeout: Seconds until the server has to have sent its banner.
        deadline: Until when the login has to have ended, whatever the server sends meanwhile; it
            may take `banner_timeout` and `LOGIN_LIMIT` where that is sooner.

    Raises:
        paramiko.SSHException: No connection; says with what and why. Its cause is a
            `HostKeyRefusedError` if it is the host key, an `InvalidKeyError` if the key to log in
            with cannot be used, a `TimeoutError` if its time was over.
    """
    import paramiko  # noqa: PLC0415 - heavy

    whole = Deadline.after(banner_timeout + LOGIN_LIMIT)
    if deadline is not None and deadline.remaining < whole.remaining:
        whole = deadline
    key = _open_key(endpoint)
    client = _log_in(endpoint, key, host_keys, banner_timeout, whole)
    if client is None:
        # A host key that was not known has been accepted.
        client = _log_in(endpoint, key, host_keys, banner_timeout, whole)
    if client is None:
        # They may be the machine's own, but there need not be an end of them.
        raise paramiko.SSHException(f"{endpoint}: another host key is shown on each connection")
    return client


def _log_in(
    endpoint: Endpoint,
    key: paramiko.PKey | None,
    host_keys: HostKeys | None,
    banner_timeout: float,
    deadline: Deadline,
) -> paramiko.SSHClient | None:
    """Log in once; None if a new host key was accepted, so that another try is needed."""
    import paramiko  # noqa: PLC0415 - heavy

    client = _make_client(endpoint, host_keys)
    with contextlib.ExitStack() as stack:
        stack.callback(client.close)
        try:
            limit = max(deadline.capped(banner_timeout), 0.001)
            connection = open_with_banner(endpoint.host, endpoint.port, limit)
            client.set_missing_host_key_policy(_policy(host_keys, connection))
            with _shut_at(deadline, connection):
                client.connect(
                    endpoint.host,
                    endpoint.port,
                    endpoint.username,
                    # Only this key: others, in files or an agent, would use up the tries that a
                    # server allows.
                    pkey=key,
                    look_for_keys=False,
                    allow_agent=False,
                    sock=connection,
                    transport_factory=_open_transport,
                    timeout=ANSWER_LIMIT,
                    banner_timeout=ANSWER_LIMIT,
                    auth_timeout=ANSWER_LIMIT,
                )
        except paramiko.BadHostKeyException as error:
            if host_keys is not None and host_keys.accepts(_line(error.key), connection):
                return None
            raise paramiko.SSHException(
                f"{endpoint}: host key changed: {_line(error.key)} was shown, and not by the "
                f"machine, whose key is {_line(error.expected_key)}"
            ) from HostKeyRefusedError(str(error))
        except Exception as error:
            raise _as_ssh_error(endpoint, error, client) from error
        stack.pop_all()
    return client


def _make_client(endpoint: Endpoint, host_keys: HostKeys | None) -> paramiko.SSHClient:
    import paramiko  # noqa: PLC0415 - heavy

    client = paramiko.SSHClient()
    client.set_log_channel(_TRANSPORT_LOG)
    name = endpoint.host if endpoint.port == 22 else f"[{endpoint.host}]:{endpoint.port}"
    for line in host_keys.pinned() if host_keys else ():
        key = read_pinned_key(name, line)
        if key is not None:
            client.get_host_keys().add(name, key.get_name(), key)
    return client


def _as_ssh_error(
    endpoint: Endpoint, error: Exception, client: paramiko.SSHClient
) -> paramiko.SSHException:
    """Return the error of SSH for whatever a login has failed with."""
    import paramiko  # noqa: PLC0415 - heavy

    if isinstance(error, paramiko.AuthenticationException):
        # Errors of its subclasses are not all made of a text.
        locked = isinstance(error, paramiko.PasswordRequiredException)
        kind = paramiko.PasswordRequiredException if locked else paramiko.AuthenticationException
        answer = _find_banner(client)
        return kind(f"{endpoint}: key {endpoint.private_key_path} refused: {error}{answer}")
    if isinstance(error, (OSError, EOFError, paramiko.SSHException, HostKeyRefusedError)):
        return paramiko.SSHException(f"{endpoint}: {error or type(error).__name__}")
    # paramiko raises what its parsing does, for a message that is not one: ValueError, IndexError.
    return paramiko.SSHException(f"{endpoint}: {not_ssh(error)}")


def not_ssh(error: Exception) -> str:
    """Describe an answer that is not SSH, by the error that parsing it has raised."""
    return f"what the server sent is not SSH ({type(error).__name__}: {error})"


class _LateError(TimeoutError):
    """The time for the whole of a login was over."""


@contextlib.contextmanager
def _shut_at(deadline: Deadline, connection: socket.socket) -> Iterator[None]:
    """Shut a connection down at a deadline, if the block has not ended by then.

    paramiko limits the time between two answers only: a server that sends a little now and then
    would keep it waiting for ever.

    Raises:
        _LateError: The deadline came first.
    """
    late = threading.Event()

    def shut() -> None:
        late.set()
        with contextlib.suppress(OSError):  # closed meanwhile
            connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(deadline.remaining, shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        if late.is_set():
            # This is paramiko's reaction, not the server's answer.
            raise _LateError(
                f"the login did not end within {deadline.limit:.0f} s: {error}"
            ) from None
        raise
    finally:
        timer.cancel()


def read_pinned_key(name: str, line: str) -> paramiko.PKey | None:
    """Read a pinned host key; None for a line that is damaged, such as one that was cut off."""
    import paramiko  # noqa: PLC0415 - heavy

    try:
        entry = paramiko.hostkeys.HostKeyEntry.from_line(f"{name} {line}")
        key = None if entry is None else entry.key
        # A number that is cut off is read as another number.
        if key is not None and _line(key) != line:
            key = None
    except Exception as error:  # noqa: BLE001 - whatever is behind it parses what it is given
        _log.debug("%s", error)
        key = None
    if key is None:
        _log.warning("A pinned host key of %s is damaged and is not used: %s", name, line[:60])
    return key


def is_refusal(error: Exception) -> bool:
    """Whether an error of `connect` means that the server refused the key."""
    import paramiko  # noqa: PLC0415 - heavy

    text = str(error)
    if not isinstance(error, paramiko.AuthenticationException) or _NO_LOGIN_NOW.search(text):
        return False
    return _SERVER_SAYS in text or not _CUT_OFF.search(text)


def _find_banner(client: paramiko.SSHClient) -> str:
    """Return the server's banner, such as why an account may not be used."""
    transport = client.get_transport()
    banner = None if transport is None else transport.get_banner()
    text = " ".join((banner or b"").decode(errors="replace").split())
    return f"{_SERVER_SAYS}{text[:_LONGEST_BANNER]}" if text else ""


def _open_transport(sock: Any, /, **options: Any) -> paramiko.Transport:
    """Make the transport of a connection, which prefers a cipher that both sides do quickly."""
    import paramiko  # noqa: PLC0415 - heavy

    transport = paramiko.Transport(sock, **options)
    transport.get_security_options().ciphers = order_ciphers(
        transport.get_security_options().ciphers
    )
    return transport


def order_ciphers(known: Sequence[str]) -> tuple[str, ...]:
    """Sort the preferred cipher first, if it is among those known; older paramikos lack it."""
    return tuple(sorted(known, key=lambda cipher: cipher != _FIRST_CIPHER))


def _open_key(endpoint: Endpoint) -> paramiko.PKey | None:
    import paramiko  # noqa: PLC0415 - heavy

    if endpoint.private_key_path is None:
        return None
    try:
        return loginkey.open_key(endpoint.public_key_path, endpoint.private_key_path)
    except InvalidKeyError as error:
        raise paramiko.AuthenticationException(f"{endpoint}: {error}") from error


def open_with_banner(host: str, port: int, timeout: float) -> socket.socket:
    """Connect and wait for the line in which an SSH server names itself, leaving it unread.

    A connection alone proves nothing: user-mode networking accepts it long before the guest's
    sshd is up.

    Raises:
        OSError: No connection, or no such line within `timeout` seconds.
    """
    deadline = Deadline.after(timeout)
    sock = moved_socket(socket.create_connection((host, port), timeout))
    # SSH's requests are small. Otherwise one that follows another without an answer between them is
    # held back until the other kernel acknowledges the one before, some 40 ms later.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        _await_banner(sock, deadline)
    except BaseException:
        sock.close()
        raise
    return sock


def _await_banner(sock: socket.socket, deadline: Deadline) -> None:
    poller = select.poll()
    poller.register(sock, select.POLLIN | select.POLLRDHUP)
    line = b""
    while True:
        # poll() returns only when there is more than before.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, len(line) + 1)
        events = poller.poll(deadline.remaining * 1000)
        begun = f", but {line!r} alone" if line else ""
        if not events:
            raise NoBannerError(f"no SSH banner within {deadline.limit:.0f} s{begun}")
        sock.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            line = sock.recv(_LONGEST_BANNER_LINE, socket.MSG_PEEK)
        if line[: len(_BANNER_START)] != _BANNER_START[: len(line)]:
            raise ConnectionError(f"not an SSH server: it began with {line[:20]!r}")
        if b"\n" in line:
            break
        if events[0][1] & ~select.POLLIN:
            raise NoServerError(f"the connection was closed before SSH's banner{begun}")
        if len(line) == _LONGEST_BANNER_LINE:
            raise ConnectionError(f"not an SSH server: a line that began with {line[:20]!r}")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    sock.settimeout(max(deadline.remaining, 0.001))


def _policy(host_keys: HostKeys | None, connection: socket.socket) -> paramiko.MissingHostKeyPolicy:
    import paramiko  # noqa: PLC0415 - heavy

    class Policy(paramiko.MissingHostKeyPolicy):
        def missing_host_key(
            self, _client: paramiko.SSHClient, hostname: str, key: paramiko.PKey
        ) -> None:
            if host_keys is not None and not host_keys.accepts(_line(key), connection):
                raise HostKeyRefusedError(
                    f"unknown host key: {_line(key)} was shown, and not by the machine"
                )

    return Policy()


def _line(key: paramiko.PKey) -> str:
    return f"{key.get_name()} {key.get_base64()}"
