"""Commands in the guest, over an open connection: input and outputs flow while they run."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pycloudlib.deadline import Deadline
from pycloudlib.errors import PycloudlibTimeoutError
from pycloudlib.guest.ssh import ANSWER_LIMIT
from pycloudlib.rawtext import to_bytes

if TYPE_CHECKING:
    import paramiko

Source = Callable[[int], bytes]
"""Gives the next bytes, as many as asked for at most; none at the end."""
Sink = Callable[[bytes], object]
"""Takes bytes as they come; what it raises ends the command."""

_CHUNK = 1 << 16
# Seconds between two looks at whether waiting for a command is of any use still.
_ON_WAIT_INTERVAL = 0.5


def open_session(client: paramiko.SSHClient, deadline: Deadline | None = None) -> paramiko.Channel:
    """Open a channel for a command or a shell.

    Raises:
        paramiko.SSHException: The connection is gone.
    """
    import paramiko  # noqa: PLC0415 - heavy

    transport = client.get_transport()
    if transport is None:
        raise paramiko.SSHException("the connection is closed")
    try:
        return transport.open_session(timeout=max(_limit(ANSWER_LIMIT, deadline), 0.1))
    except (OSError, EOFError) as error:
        raise paramiko.SSHException(f"the connection is gone: {error}") from error


def run(
    client: paramiko.SSHClient,
    command: str,
    *,
    stdin: bytes = b"",
    get_pty: bool = False,
    timeout: float | None = None,
    on_wait: Callable[[], None] = lambda: None,
) -> tuple[bytes, bytes, int]:
    """Execute a command to its end, keeping both outputs whatever their size.

    Args:
        client: A connected client.
        command: The command line, as the login shell reads it.
        stdin: What the command reads.
        get_pty: Whether it gets a terminal.
        timeout: Seconds it may take; no limit when None.
        on_wait: Called every so often while it runs; what it raises ends the wait.

    Returns:
        Standard output, standard error, exit status (-1 when the connection ended first).

    Raises:
        paramiko.SSHException: The connection is gone.
        PycloudlibTimeoutError: The command went on past `timeout`; it is hung up on.
    """
    deadline = None if timeout is None else Deadline.after(timeout)
    out: list[bytes] = []
    err: list[bytes] = []
    status = stream(
        open_session(client, deadline),
        command,
        stdin=io.BytesIO(stdin).read,
        stdout=out.append,
        stderr=err.append,
        get_pty=get_pty,
        deadline=deadline,
        on_wait=on_wait,
    )
    return b"".join(out), b"".join(err), status


def stream(
    channel: paramiko.Channel,
    command: str | None,
    *,
    stdin: Source | None = None,
    stdout: Sink,
    stderr: Sink,
    get_pty: bool = False,
    deadline: Deadline | None = None,
    on_wait: Callable[[], None] = lambda: None,
) -> int:
    """Run a command to its end, handing on its outputs as they come.

    Args:
        channel: What `open_session` gave; it is closed.
        command: The command line, as the login shell reads it; None for the login shell itself.
        stdin: What the command reads; nothing by default.
        stdout: Takes its output.
        stderr: Takes its error output.
        get_pty: Whether it gets a terminal.
        deadline: Until when it may run; no limit when None.
        on_wait: Called every so often while it runs; what it raises ends the wait.

    Returns:
        Its exit status; -1 when a signal ended it, or the connection ended first.

    Raises:
        paramiko.SSHException: The connection is gone.
        PycloudlibTimeoutError: The command went on past its deadline; it is hung up on.
    """
    with channel:
        with _hung_up_on(channel, deadline):
            if get_pty:
                channel.get_pty()
            if command is None:
                channel.invoke_shell()
            else:
                channel.exec_command(to_bytes(command))
        pumps = (_Pump(channel.recv, stdout), _Pump(channel.recv_stderr, stderr))
        threading.Thread(target=_feed, args=(channel, stdin), daemon=True).start()
        if _have_ended(pumps, deadline, on_wait) and channel.status_event.wait(
            None if deadline is None else deadline.remaining
        ):
            return channel.exit_status
        limit = 0.0 if deadline is None else deadline.limit
        raise PycloudlibTimeoutError(
            f"The command did not end within {limit:g} s and was hung up on: {command}"
        )


class _Pump(threading.Thread):
    """Hands one output of a channel on, to its end."""

    def __init__(self, receive: Source, sink: Sink) -> None:
        super().__init__(daemon=True)
        self._receive = receive
        self._sink = sink
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        while True:
            try:
                chunk = self._receive(_CHUNK)
            except OSError:  # the connection is gone, which the exit status tells
                return
            if not chunk:
                return
            try:
                self._sink(chunk)
            except Exception as error:  # noqa: BLE001 - raised in the thread that waits
                self.error = error
                return


def _limit(seconds: float, deadline: Deadline | None) -> float:
    return seconds if deadline is None else deadline.capped(seconds)


@contextlib.contextmanager
def _hung_up_on(channel: paramiko.Channel, deadline: Deadline | None) -> Iterator[None]:
    """Close a channel whose requests are not answered in time: they know no limit of their own."""
    watchdog = threading.Timer(_limit(ANSWER_LIMIT, deadline), channel.close)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()


def _have_ended(
    pumps: tuple[_Pump, ...], deadline: Deadline | None, on_wait: Callable[[], None]
) -> bool:
    """Wait until both outputs have ended; say whether they did in time."""
    while waiting := [pump for pump in pumps if pump.is_alive()]:
        waiting[0].join(_limit(_ON_WAIT_INTERVAL, deadline))
        _raise_first(pumps)
        if waiting[0].is_alive():
            if deadline is not None and deadline.expired:
                return False
            on_wait()
    _raise_first(pumps)
    return True


def _raise_first(pumps: tuple[_Pump, ...]) -> None:
    for pump in pumps:
        if pump.error is not None:
            raise pump.error


def _feed(channel: paramiko.Channel, source: Source | None) -> None:
    # A command may end without reading its input; that is no error. And a source that cannot be
    # read has ended.
    with contextlib.suppress(OSError, EOFError):
        while source is not None and (chunk := source(_CHUNK)):
            channel.sendall(chunk)
    with contextlib.suppress(OSError, EOFError):
        channel.shutdown_write()
