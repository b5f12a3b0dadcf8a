"""Commands in the guest whose input and outputs flow while they run, whatever their size."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from pycloudlib.guest import ssh

if TYPE_CHECKING:
    import paramiko

Source = Callable[[int], bytes]
"""Gives the next bytes, as many as asked for at most; none at the end."""
Sink = Callable[[bytes], object]
"""Takes bytes as they come; what it raises ends the command."""

_CHUNK = 1 << 16


def open_session(client: paramiko.SSHClient) -> paramiko.Channel:
    """Open a channel for a command or a shell.

    Raises:
        paramiko.SSHException: The connection is gone.
    """
    import paramiko  # noqa: PLC0415 - heavy

    transport = client.get_transport()
    if transport is None:
        raise paramiko.SSHException("the connection is closed")
    return ssh.open_channel(transport, None)


def stream(
    channel: paramiko.Channel,
    command: str | None,
    *,
    stdin: Source | None = None,
    stdout: Sink,
    stderr: Sink,
    on_wait: Callable[[], None] = lambda: None,
) -> int:
    """Run a command to its end, handing on its outputs as they come.

    Args:
        channel: What `open_session` gave; it is closed.
        command: The command line, as the login shell reads it; None for the login shell itself.
        stdin: What the command reads; nothing by default.
        stdout: Takes its output.
        stderr: Takes its error output.
        on_wait: Called every so often while it runs; what it raises ends the wait.

    Returns:
        Its exit status; -1 when a signal ended it, or the connection ended first.

    Raises:
        paramiko.SSHException: The connection is gone.
    """
    with channel:
        with ssh.hung_up_on(channel, None):
            if command is None:
                channel.invoke_shell()
            else:
                channel.exec_command(command)
        pumps = (_Pump(channel.recv, stdout), _Pump(channel.recv_stderr, stderr))
        threading.Thread(target=_feed, args=(channel, stdin), daemon=True).start()
        while waiting := [pump for pump in pumps if pump.is_alive()]:
            waiting[0].join(ssh.ON_WAIT_INTERVAL)
            _raise_first(pumps)
            on_wait()
        _raise_first(pumps)
        channel.status_event.wait()
        return channel.exit_status


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
