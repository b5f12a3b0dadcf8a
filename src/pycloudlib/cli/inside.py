"""`exec`, `shell`, `console` and `copy`: what goes on inside a machine."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import shlex
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.documents import to_bytes
from pycloudlib.cli import terminal
from pycloudlib.cli.lifecycle import open_running
from pycloudlib.cli.machines import MachineName, open_machine
from pycloudlib.cli.machines import Place as PlaceType
from pycloudlib.cli.output import ExitCode
from pycloudlib.cli.session import Session, command
from pycloudlib.diagnosis import Cause
from pycloudlib.errors import CloudError
from pycloudlib.guest.access import commands, sessions
from pycloudlib.progress import showing_progress
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.vm import sockets

if TYPE_CHECKING:
    import paramiko

_log = logging.getLogger(__name__)

_LEAVE = b"\x1d"
_STDIN, _STDOUT, _STDERR = 0, 1, 2
# Seconds: one that was just left is free in a moment.
_CONSOLE_LIMIT = 3.0
_CONSOLE_LOOK = 0.1


@command(
    "exec",
    short_help="Run a command in a machine.",
    context_settings={"allow_interspersed_args": False},
)
@click.option("-t/-T", "--tty/--no-tty", default=None, help="Whether it gets a terminal.")
@click.argument("name", type=MachineName())
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND...")
def execute(session: Session, name: str, tty: bool | None, argv: tuple[str, ...]) -> int:
    """Run COMMAND in a machine, as its login user.

    Its standard input, output and error are those of this command, and so is its exit status. It
    gets a terminal where this command has one. No shell reads it: for that, run `sh -c '…'`.
    """
    words = argv[1:] if argv[0] == "--" else argv
    if not words:
        raise click.UsageError("Missing argument 'COMMAND...'.")
    return _run(session, name, shlex.join(words), tty)


@command("shell", short_help="Log in to a machine.")
@click.argument("name", type=MachineName())
def shell(session: Session, name: str) -> int:
    """Log in to a machine, in this terminal.

    Without a terminal, the login shell reads commands from standard input.
    """
    return _run(session, name, None, None)


def _run(session: Session, name: str, command_line: str | None, tty: bool | None) -> int:
    instance = open_running(session, name)
    on_terminal = terminal.is_terminal(_STDIN, _STDOUT) if tty is None else tty
    with (
        _connected(session, instance) as client,
        instance.explaining(f"the end of what runs in {instance.name}"),
    ):
        if on_terminal:
            with commands.interrupt_when(instance.check_answers, client.close):
                remote = SshTerminal(
                    sessions.open_session(client), command_line, terminal.terminal_size()
                )
                terminal.relay(remote, stdin=_STDIN, stdout=_STDOUT)
                status = remote.wait()
        else:
            # What is typed is another program's, unless a shell is to read it.
            reads = command_line is None or not terminal.is_terminal(_STDIN)
            status = commands.stream(
                sessions.open_session(client),
                command_line,
                stdin=functools.partial(os.read, _STDIN) if reads else None,
                stdout=functools.partial(_write, _STDOUT),
                stderr=functools.partial(_write, _STDERR),
                on_wait=instance.check_answers,
            )
    return status if status >= 0 else ExitCode.CONNECTION_LOST


@contextlib.contextmanager
def _connected(session: Session, instance: QemuInstance) -> Iterator[paramiko.SSHClient]:
    try:
        with instance.explaining(f"an SSH connection to {instance.name}"):
            client = instance._ssh_connect()
    except Exception as error:
        diagnosis = getattr(error, "diagnosis", None)
        if diagnosis is not None and diagnosis.cause is Cause.STILL_BOOTING:
            session.note(f"'pycloudlib wait {instance.name}' waits until it is ready")
        raise
    try:
        yield client
    finally:
        client.close()


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


@command("console", short_help="Open a machine's serial console.")
@click.argument("name", type=MachineName())
def console(session: Session, name: str) -> None:
    """Open the serial console of a machine, in this terminal. Ctrl-] leaves it.

    It works when SSH does not. One at a time can have it open.
    """
    if not terminal.is_terminal(_STDIN):
        raise click.UsageError("console needs a terminal; 'pycloudlib logs' prints what was shown")
    instance = open_machine(session.cloud, name)
    instance.machine.check_on()
    wait_until_free(instance)
    session.note(f"The serial console of {name}; Ctrl-] leaves it")
    remote = SerialConsole(instance.ip, int(instance.telnet_port))
    with contextlib.closing(remote):
        left = terminal.relay(remote, stdin=_STDIN, stdout=_STDOUT, escape=_LEAVE)
    session.note("" if left else f"\r\n{name} has ended, or somebody else took its console")


def wait_until_free(instance: QemuInstance) -> None:
    """Wait until nobody else has a console open.

    Raises:
        CloudError: Somebody has it, for longer than it is waited for; says who.
    """
    deadline = Deadline.after(_CONSOLE_LIMIT)
    while True:
        chardevs = instance.machine.execute("query-chardev")
        console = next(dev for dev in chardevs if dev["label"] == "console")
        if sockets.is_free(console):
            return
        if deadline.expired:
            server = (instance.ip, int(instance.telnet_port))
            raise CloudError(
                f"The serial console of {instance.name} is open elsewhere, where only one can have "
                f"it{sockets.tell_tcp_client(console, server)}"
            )
        time.sleep(_CONSOLE_LOOK)


def _expand_user(path: str) -> str:
    """Put a home directory in place of a leading `~`, and leave how a path ends as it is."""
    return os.path.expanduser(path)  # noqa: PTH111 - a Path has no slash at its end


@command("copy", short_help="Copy files and directories to or from a machine.")
@click.argument("source", type=PlaceType(), metavar="SRC")
@click.argument("target", type=PlaceType(), metavar="DST")
def copy(session: Session, source: str, target: str) -> None:
    """Copy a file or a directory: SRC or DST is in a machine, as NAME:PATH.

    A path in a machine is relative to the home directory of the login user, with whose rights it is
    read and written. All is as `cp -r` does it, but a link that is SRC itself is followed. What
    cannot be copied is named, and the rest is copied.
    """
    from pycloudlib.cli import transfer  # noqa: PLC0415 - seldom

    here, there = transfer.Place.parse(source), transfer.Place.parse(target)
    if bool(here.machine) is bool(there.machine):
        which = "Neither is" if not here.machine else "Both are"
        raise click.UsageError(f"{which} in a machine: one of SRC and DST is NAME:PATH")
    instance = open_running(session, here.machine or there.machine)
    with (
        instance.explaining(f"a copy from {source} to {target}"),
        showing_progress(session.progress, _log) as show,
    ):
        if here.machine:
            transfer.pull(instance, here.path, _expand_user(there.path), show)
        else:
            transfer.push(instance, _expand_user(here.path), there.path, show)


_CHUNK = 1 << 16
_CONNECT_LIMIT = 10.0
# What QEMU says when somebody connects (chardev/char-socket.c): four times IAC, WILL or DO, and an
# option (RFC 854). All that comes after is the guest's, as it is: QEMU doubles no 0xff.
_WORD_LENGTH = 3
_GREETING_WORDS = 4
_WORD_START = re.compile(rb"(?:\xff(?:[\xfb-\xfe].?)?)?", re.DOTALL)


class SshTerminal:
    """A pseudo-terminal in the guest with a command, or the login shell, on it.

    Args:
        channel: An open channel.
        command: The command line; None for the login shell.
        size: Columns and lines of the local terminal.
    """

    def __init__(
        self, channel: paramiko.Channel, command: str | None, size: tuple[int, int]
    ) -> None:
        self._channel = channel
        channel.get_pty(os.environ.get("TERM", "xterm"), *size)
        if command is None:
            channel.invoke_shell()
        else:
            channel.exec_command(to_bytes(command))

    def fileno(self) -> int:
        """Give what becomes readable when there is something to receive."""
        return self._channel.fileno()

    def receive(self) -> bytes | None:
        """Give what has come; None at the end."""
        return self._channel.recv(_CHUNK) or None

    def send(self, data: bytes) -> None:
        """Send what was typed."""
        try:
            self._channel.sendall(data)
        except OSError:
            if not self._channel.closed:
                raise  # what it has to say at its end comes still

    def resize(self, columns: int, lines: int) -> None:
        """Take note of the terminal's size."""
        self._channel.resize_pty(columns, lines)

    def wait(self) -> int:
        """Give the exit status; -1 when there is none."""
        with self._channel:
            self._channel.status_event.wait()
            return self._channel.exit_status


class SerialConsole:
    """A machine's serial console, which it offers by telnet.

    Args:
        host: Its address.
        port: Its port.

    Raises:
        OSError: Nobody listens there.
    """

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port), _CONNECT_LIMIT)
        self._socket.settimeout(None)
        self._greeting = Greeting()

    def close(self) -> None:
        """Leave it."""
        self._socket.close()

    def fileno(self) -> int:
        """Give what becomes readable when there is something to receive."""
        return self._socket.fileno()

    def receive(self) -> bytes | None:
        """Give what has come, without QEMU's greeting; None at the end."""
        try:
            chunk = self._socket.recv(_CHUNK)
        except ConnectionResetError:
            return None
        if not chunk:
            return None
        return self._greeting.take_out(chunk)

    def send(self, data: bytes) -> None:
        """Send what was typed."""
        self._socket.sendall(data.replace(b"\xff", b"\xff\xff"))

    def resize(self, columns: int, lines: int) -> None:
        """Do nothing: a serial line knows no size."""


class Greeting:
    """The telnet words by which QEMU greets whoever connects.

    Nothing later is taken for telnet's: a guest could hide what it prints from people, or let an
    endless word be kept here.
    """

    def __init__(self) -> None:
        self._words_left = _GREETING_WORDS
        self._pending = b""

    def take_out(self, data: bytes) -> bytes:
        """Return what has come without the greeting, which may come in pieces."""
        data = self._pending + data
        self._pending = b""
        while self._words_left:
            word = data[:_WORD_LENGTH]
            if not _WORD_START.fullmatch(word):
                self._words_left = 0
            elif len(word) < _WORD_LENGTH:
                self._pending = word
                return b""
            else:
                data = data[_WORD_LENGTH:]
                self._words_left -= 1
        return data
