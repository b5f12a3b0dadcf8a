"""`exec`, `shell`, `console` and `copy`: the commands that reach into a machine."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shlex
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from pycloudlib._base.deadline import Deadline
from pycloudlib.cli import terminal
from pycloudlib.cli.common import ExitCode, Session, command
from pycloudlib.cli.names import MachineName, MachinePath, find_keeper
from pycloudlib.cli.terminal import SerialConsole, SshTerminal
from pycloudlib.diagnosis import Cause
from pycloudlib.errors import CloudError
from pycloudlib.guest.access import commands, kept, sessions
from pycloudlib.progress import showing_progress

if TYPE_CHECKING:
    import paramiko

    from pycloudlib.qemu.instance import QemuInstance

_log = logging.getLogger(__name__)

_CONSOLE_ESCAPE = b"\x1d"
_STDIN, _STDOUT, _STDERR = 0, 1, 2
# Seconds: a console that was just left is free in a moment.
CONSOLE_LIMIT = 3.0
_CONSOLE_INTERVAL = 0.1


@command(
    "exec",
    short_help="Run a command in a machine.",
    context_settings={"allow_interspersed_args": False},
)
@click.option("-t/-T", "--tty/--no-tty", default=None, help="Whether COMMAND gets a terminal.")
@click.argument("name", type=MachineName())
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND...")
def execute(session: Session, name: str, tty: bool | None, argv: tuple[str, ...]) -> int:
    """Run COMMAND in a machine, as its login user.

    COMMAND has the standard input, output and error of this command, which ends with its exit
    status. It gets a terminal if this command has one. No shell interprets it: for that, run
    `sh -c '…'`. Its connection is kept for a minute, for the next command.
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


def open_running(session: Session, name: str) -> QemuInstance:
    """Return the instance of a machine that is about to be used; see `machines.open_running`."""
    from pycloudlib.cli import machines  # noqa: PLC0415 - not with a connection that is kept

    return machines.open_running(session, name)


def _run(session: Session, name: str, command_line: str | None, tty: bool | None) -> int:
    on_terminal = terminal.is_terminal(_STDIN, _STDOUT) if tty is None else tty
    reached = _Reached(session, name)
    with (
        _connected(reached) as client,
        reached.explaining(f"the end of what runs in {name}"),
    ):
        if on_terminal:
            with commands.interrupt_when(reached.check_answers, client.close):
                remote = SshTerminal(
                    sessions.open_session(client), command_line, terminal.terminal_size()
                )
                terminal.relay(remote, stdin=_STDIN, stdout=_STDOUT)
                status = remote.wait()
        else:
            # Typed input is another program's, unless a shell is to read it.
            reads = command_line is None or not terminal.is_terminal(_STDIN)
            status = commands.stream(
                sessions.open_session(client),
                command_line,
                stdin=functools.partial(os.read, _STDIN) if reads else None,
                stdout=functools.partial(terminal.write_all, _STDOUT),
                stderr=functools.partial(terminal.write_all, _STDERR),
                on_wait=reached.check_answers,
            )
    return status if status >= 0 else ExitCode.CONNECTION_LOST


class _Reached:
    """A machine that is reached over SSH: its instance is made when that is needed.

    With a connection that is kept, that is once a command takes long, or something has failed.

    Args:
        session: The run of the command line.
        name: The machine's name.
    """

    def __init__(self, session: Session, name: str) -> None:
        self._session = session
        self._name = name
        self._opening = threading.Lock()
        self._opened: QemuInstance | None = None

    @property
    def instance(self) -> QemuInstance:
        """Its instance; raises as `open_running` does."""
        with self._opening:
            if self._opened is None:
                self._opened = open_running(self._session, self._name)
            return self._opened

    def connect(self) -> paramiko.SSHClient:
        """Return an SSH connection, in the first place the one that is kept.

        While the machine boots, an error comes with a note. Errors are those of `open_running`,
        and those of a login.
        """
        keeper = find_keeper(self._name)
        return self._connect() if keeper is None else kept.client(keeper, self._connect)

    def _connect(self) -> paramiko.SSHClient:
        instance = self.instance
        try:
            with instance.explaining(f"an SSH connection to {instance.name}"):
                instance.fix_up_before_use()
                return instance._ssh_connect()
        except Exception as error:
            diagnosis = getattr(error, "diagnosis", None)
            if diagnosis is not None and diagnosis.cause is Cause.STILL_BOOTING:
                self._session.note(f"'pycloudlib wait {instance.name}' waits until it is ready")
            raise

    @contextlib.contextmanager
    def explaining(self, waiting_for: str) -> Iterator[None]:
        """Have an error that leaves a block say what was going on; see `Explainer.explaining`."""
        try:
            yield
        except OSError:
            raise  # the streams', not the machine's
        except Exception:
            with self.instance.explaining(waiting_for):
                raise

    def check_answers(self) -> None:
        """Raise when the guest cannot answer; see `Guest.check_alive`."""
        self.instance.check_answers()


@contextlib.contextmanager
def _connected(reached: _Reached) -> Iterator[paramiko.SSHClient]:
    client = reached.connect()
    try:
        yield client
    finally:
        client.close()


@command("console", short_help="Open a machine's serial console.")
@click.argument("name", type=MachineName())
def console(session: Session, name: str) -> None:
    """Open the serial console of a machine, in this terminal. Ctrl-] leaves it.

    It works when SSH does not. Only one program at a time can have it open.
    """
    if not terminal.is_terminal(_STDIN):
        raise click.UsageError("console needs a terminal; 'pycloudlib logs' prints what was shown")
    from pycloudlib.cli.machines import open_machine  # noqa: PLC0415 - as above

    instance = open_machine(session.cloud, name)
    instance.machine.check_on()
    wait_for_console(instance)
    session.note(f"The serial console of {name}; Ctrl-] leaves it")
    remote = SerialConsole(instance.ip, int(instance.telnet_port))
    with contextlib.closing(remote):
        left = terminal.relay(remote, stdin=_STDIN, stdout=_STDOUT, escape=_CONSOLE_ESCAPE)
    session.note("" if left else f"\r\n{name} has ended, or another program took its console")


def wait_for_console(instance: QemuInstance, limit: float = CONSOLE_LIMIT) -> None:
    """Wait until no other program has the console open.

    Args:
        instance: The machine.
        limit: Seconds to wait.

    Raises:
        CloudError: One has, for longer than the limit; says which.
    """
    from pycloudlib.qemu.vm import sockets  # noqa: PLC0415 - as above

    deadline = Deadline.after(limit)
    while True:
        chardevs = instance.machine.execute("query-chardev")
        console = next(dev for dev in chardevs if dev["label"] == "console")
        if sockets.is_free(console):
            return
        if deadline.expired:
            server = (instance.ip, int(instance.telnet_port))
            raise CloudError(
                f"The serial console of {instance.name} is open elsewhere, where only one can have "
                f"it{sockets.describe_tcp_client(console, server)}"
            )
        time.sleep(_CONSOLE_INTERVAL)


def _expand_user(path: str) -> str:
    """Replace a leading `~` by a home directory, and keep a slash at the end."""
    return os.path.expanduser(path)  # noqa: PTH111 - a Path has no slash at its end


@command("copy", short_help="Copy files and directories to or from a machine.")
@click.argument("source", type=MachinePath(), metavar="SRC")
@click.argument("target", type=MachinePath(), metavar="DST")
def copy(session: Session, source: str, target: str) -> None:
    """Copy a file or a directory: either SRC or DST is in a machine, as NAME:PATH.

    A path in a machine is relative to the home directory of the login user, whose permissions
    apply. It copies as `cp -r` does, but follows a link that is SRC itself. It names what it cannot
    copy, and copies the rest.
    """
    from pycloudlib.cli import transfer  # noqa: PLC0415 - seldom

    origin, goal = transfer.Location.parse(source), transfer.Location.parse(target)
    if bool(origin.machine) is bool(goal.machine):
        which = "Neither is" if not origin.machine else "Both are"
        raise click.UsageError(f"{which} in a machine: one of SRC and DST is NAME:PATH")
    instance = open_running(session, origin.machine or goal.machine)
    with (
        instance.explaining(f"a copy from {source} to {target}"),
        showing_progress(session.progress, _log) as show,
    ):
        instance.fix_up_before_use()
        if origin.machine:
            transfer.pull(instance, origin.path, _expand_user(goal.path), show)
        else:
            transfer.push(instance, _expand_user(origin.path), goal.path, show)
