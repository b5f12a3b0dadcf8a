"""Commands in the guest, over an open connection: input and outputs flow while they run."""

from __future__ import annotations

import contextlib
import io
import secrets
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pycloudlib._base.deadline import Deadline, capped
from pycloudlib._base.documents import safe_repr, to_bytes
from pycloudlib.errors import PycloudlibTimeoutError
from pycloudlib.guest.access.sessions import close_if_unanswered, ssh_errors

if TYPE_CHECKING:
    import paramiko

    from pycloudlib.guest.access.sessions import Connections, Session

Source = Callable[[int], bytes]
"""Returns the next bytes, at most as many as asked for; none at the end."""
Sink = Callable[[bytes], object]
"""Receives bytes as they come; what it raises ends the command."""

_CHUNK = 1 << 16
# Seconds between two checks of whether the guest can still answer.
_ON_WAIT_INTERVAL = 0.5
# Seconds that a guest may take to end a command, that a caller waits for that, and that the server
# may take to report the end.
_END_LIMIT = 120.0
_END_WAIT = 15.0
_END_REPORT_LIMIT = 2.0

# Prints the pid of the command in a line of its own, and becomes the command.
_ANNOUNCE = 'echo "$1 $$" && shift && exec "$@"'
# Ends all processes of a command, whose pid is given, by SIGHUP and then SIGKILL. They are those of
# its session (setsid(2)), if that is its own or its login shell's and not the SSH server's; other
# users' included, if this user may become root: `sudo` is one.
_END = """
pid=$0
read -r line </proc/$pid/stat && set -- ${line##*) } || set -- - - - $pid
session=$4
[ $session = $pid ] || [ $session = $2 ] || session=none
left() {
  for stat in /proc/[0-9]*/stat; do
    read -r line <$stat && set -- ${line%% *} ${line##*) } || continue
    if [ $2 != Z ] && { [ $5 = $session ] || [ $1 = $pid ]; }; then echo $1; fi
  done
}
end() { kill -s $1 $processes || sudo -n kill -s $1 $processes; }
for signal in HUP KILL; do
  for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    processes=$(left)
    [ "$processes" ] || exit 0
    [ $try != 1 ] || { end $signal; end CONT; }
    sleep 0.1
  done
done
exit 1
"""


# The hooks that clients override take no such argument, so a context variable passes it below them.
_secret: ContextVar[bool] = ContextVar("secret", default=False)


@contextlib.contextmanager
def hide_command() -> Iterator[None]:
    """Leave the commands that are run inside the block out of errors."""
    token = _secret.set(True)
    try:
        yield
    finally:
        _secret.reset(token)


_leaves_shell: ContextVar[bool] = ContextVar("leaves_shell", default=False)

LEAVE_SHELL = r"""
case ${SHELL-} in */bash | */sh | */dash) ;; *) exit 0 ;; esac
for file in ~/.bashrc /etc/bash.bashrc; do
  if [ "$file" -nt /proc/self/fd/9 ]; then exit 0; fi
done
exec 9>&-
export -n leave_mark
printf '\n%s\n' "$leave_mark"
if IFS= read -r -d '' -t 2 line && hash "${line%% *}"; then
  printf '%s\n' "$leave_mark $$"
  eval "_=${BASH_CMDS[${line%% *}]} exec $line"
fi
"""
"""What bash does last in a script that leaves its shell to the next command, where it is to
(`$leave_mark`): it says so, and becomes that command, whose line ends with a NUL. Where none comes
in time it ends, and where start-up files have changed since the shell began: descriptor 9, a pipe,
is as old as that. `_` is what a login shell makes of it."""
# What a shell that was left becomes. For others a login shell may have a builtin, or words of its
# own when there is no such program.
_BECOMES = ("sh ", "sudo ")


@contextlib.contextmanager
def leaving_shell() -> Iterator[None]:
    """Let a script that is run in the block leave its shell to the command that comes next.

    So that command does not wait for what takes longest: the server's process, and a login shell.
    """
    token = _leaves_shell.set(True)
    try:
        yield
    finally:
        _leaves_shell.reset(token)


@dataclass(frozen=True, slots=True)
class LeftShell:
    """A shell in the guest that waits for a command, for a moment.

    Attributes:
        held: Closes its session.
        session: The session.
        mark: What it prints before its pid when it has a command.
    """

    held: contextlib.ExitStack
    session: Session
    mark: str

    def end(self) -> None:
        """Have it end, if it has not already: so its place on the connection is free again."""
        with self.held, contextlib.suppress(OSError, EOFError):
            self.session.channel.shutdown_write()
            self.session.wait_for_end(_END_REPORT_LIMIT)


def command_in_errors(command: str | None) -> str:
    """Return how a command is named in errors."""
    return "a command that is not to be shown" if _secret.get() else str(command)


def build_argv(command: str | Sequence[str], *, use_sudo: bool = False) -> list[str]:
    """Return a command's argument vector: a text is for `sh -c`, a list is used as it is.

    Raises:
        TypeError: It is neither a text nor a sequence of texts.
        ValueError: It has a NUL byte, or what is not Unicode.
    """
    if isinstance(command, str):
        argv = ["sh", "-c", command]
    elif isinstance(command, Sequence) and command and all(isinstance(w, str) for w in command):
        argv = list(command)
    else:
        raise TypeError(f"command must be a text or a list of texts, not {command!r}")
    for word in argv:
        if "\0" in word:
            raise ValueError(
                f"command has a NUL byte in {safe_repr(word)}, which no argument can have"
            )
        _encode("command", word)
    return ["sudo", "--", *argv] if use_sudo else argv


def encode_stdin(stdin: str | bytes | None) -> bytes:
    """Return the bytes of what a command is to read.

    Raises:
        TypeError: It is neither a text nor bytes.
        ValueError: It is a text that is not Unicode.
    """
    if isinstance(stdin, str):
        return _encode("stdin", stdin)
    if stdin is not None and not isinstance(stdin, (bytes, bytearray, memoryview)):
        raise TypeError(f"stdin must be a text or bytes, not {type(stdin).__name__}")
    return bytes(stdin or b"")


def _encode(what: str, text: str) -> bytes:
    try:
        return to_bytes(text)
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} has {safe_repr(text)}, which is not Unicode") from error


def run(
    connections: Connections,
    command: str,
    *,
    stdin: bytes = b"",
    get_pty: bool = False,
    timeout: float | None = None,
    on_wait: Callable[[], None] = lambda: None,
) -> tuple[bytes, bytes, int]:
    """Execute a command to its end, keeping both outputs whatever their size.

    Args:
        connections: Those to the machine.
        command: The command line, as the login shell reads it: one program with its arguments.
        stdin: What the command reads.
        timeout: Seconds it may take; no limit when None.
        get_pty: As in `stream`.
        on_wait: As in `stream`.

    Returns:
        Standard output, standard error, exit status (-1 when the connection ended first).

    Raises:
        paramiko.SSHException: The connection is gone.
        PycloudlibTimeoutError: The command did not end within `timeout`; it is ended.
    """
    deadline = None if timeout is None else Deadline.after(timeout)
    if _leaves_shell.get():
        return _run_leaving(connections, command, deadline, on_wait)
    request = _Request(command, stdin, get_pty, deadline, on_wait)
    can_become = not get_pty and command.startswith(_BECOMES)
    shell = connections.take_shell() if can_become else None
    result = None if shell is None else _run(connections, request, shell)
    if result is None:
        result = _run(connections, request)
    assert result is not None  # only a shell that was left may be gone
    return result


@dataclass(frozen=True, slots=True)
class _Request:
    """What `run` was asked for."""

    command: str
    stdin: bytes
    get_pty: bool
    deadline: Deadline | None
    on_wait: Callable[[], None]


def _run(
    connections: Connections, request: _Request, shell: LeftShell | None = None
) -> tuple[bytes, bytes, int] | None:
    """Run a command in a session of its own, or in a shell that was left; None if that was gone."""
    deadline, line, stdin = request.deadline, request.command, request.stdin
    out, err = list[bytes](), list[bytes]()
    announced = None
    if shell is not None:
        announced = Announcement(out.append, shell.mark)
        stdin = to_bytes(line) + b"\0" + stdin
    elif deadline is not None:
        announced = Announcement(out.append)
        line = announced.ask_for(line)
    with contextlib.ExitStack() as held:
        if shell is None:
            session = held.enter_context(connections.session(deadline))
        else:
            held.enter_context(shell.held)
            session = shell.session
        try:
            if shell is None:
                _begin(session.channel, line, deadline, get_pty=request.get_pty)
            status = _follow(
                session.channel,
                line,
                stdin=io.BytesIO(stdin).read,
                stdout=out.append if announced is None else announced.take,
                stderr=err.append,
                deadline=deadline,
                on_wait=request.on_wait,
            )
        except PycloudlibTimeoutError:
            if deadline is None or announced is None or not deadline.expired:
                raise  # by on_wait
            _end(connections, session, announced, held.pop_all())
            raise _is_late(line, deadline, " and was hung up on") from None
    if shell is not None and announced is not None and not announced.known.is_set() and status >= 0:
        return None  # it ended by itself; where the connection is lost, the command may have begun
    if announced is not None:
        announced.finish()
    return b"".join(out), b"".join(err), status


def _run_leaving(
    connections: Connections,
    command: str,
    deadline: Deadline | None,
    on_wait: Callable[[], None],
) -> tuple[bytes, bytes, int]:
    """Run a script up to where it leaves its shell, or to its end."""
    mark = secrets.token_hex(8)
    ending = f"\n{mark}\n".encode()
    out = bytearray()
    announced = Announcement(out.extend)
    line = announced.ask_for(f"env leave_mark={mark} {command}")
    with contextlib.ExitStack() as held:
        session = held.enter_context(connections.session(deadline))
        channel = session.channel
        _begin(channel, line, deadline)
        while not out.endswith(ending):
            channel.settimeout(max(capped(_ON_WAIT_INTERVAL, deadline), 0.001))
            try:
                chunk = channel.recv(_CHUNK)
            except TimeoutError:
                if deadline is not None and deadline.expired:
                    _end(connections, session, announced, held.pop_all())
                    raise _is_late(command, deadline, " and was hung up on") from None
                on_wait()
                continue
            announced.take(chunk)
            if not chunk:
                announced.finish()
                if not _has_status(channel, deadline, on_wait):
                    assert deadline is not None  # without one, the wait ends with the command
                    raise _is_late(command, deadline)
                return bytes(out), channel.makefile_stderr("rb").read(), channel.exit_status
        channel.settimeout(None)
        connections.leave_shell(LeftShell(held.pop_all(), session, mark))
    return bytes(out.removesuffix(ending)), b"", 0


def _end(
    connections: Connections,
    session: Session,
    announced: Announcement,
    held: contextlib.ExitStack,
) -> None:
    """End a command whose time is over; its place on the connection is free again if that works.

    A busy guest may take longer for that than the caller is to wait: then this continues in the
    background.

    Args:
        connections: Those to the machine.
        session: The command's.
        announced: The process it runs as.
        held: Closes the session.
    """
    import paramiko  # noqa: PLC0415 - heavy

    def end() -> None:
        with held, contextlib.suppress(paramiko.SSHException, PycloudlibTimeoutError):
            deadline = Deadline.after(_END_LIMIT)
            # One that has not begun may still do so.
            while not announced.known.wait(deadline.capped(_ON_WAIT_INTERVAL)):
                if deadline.expired or session.channel.closed:
                    return
            if not announced.pid:
                return  # something else was printed where its pid should be
            with connections.session(deadline) as another:
                stream(
                    another.channel,
                    shlex.join(["sh", "-c", _END, str(announced.pid)]),
                    stdout=len,
                    stderr=len,
                    deadline=deadline,
                )
            session.wait_for_end(_END_REPORT_LIMIT)

    ending = threading.Thread(target=end, name="command-end", daemon=True)
    ending.start()
    ending.join(_END_WAIT)


class Announcement:
    """The line in which a command prints its pid, taken out of its output.

    The command itself is the same as without it.

    Args:
        sink: Receives the rest of the output.
        mark: What the line begins with; by default something that nothing else prints.

    Attributes:
        pid: The process; 0 if the line was not a pid, None until it has come.
        known: Set when it has come.
    """

    def __init__(self, sink: Sink, mark: str = "") -> None:
        self.pid: int | None = None
        self.known = threading.Event()
        self._sink = sink
        self._mark = mark or secrets.token_hex(8)
        self._held = b""

    def ask_for(self, command: str) -> str:
        """Return a command line whose command announces itself."""
        return f"{shlex.join(['sh', '-c', _ANNOUNCE, 'sh', self._mark])} {command}"

    def take(self, chunk: bytes) -> None:
        """Receive output as it comes."""
        if self.pid is not None:
            self._sink(chunk)
            return
        self._held += chunk
        # A shell's start-up files may have printed something before.
        start = self._held.find(self._mark.encode())
        if start < 0:
            self._pass_on(max(0, len(self._held) - len(self._mark)))
            return
        self._pass_on(start)
        line, ended, rest = self._held.partition(b"\n")
        if ended:
            pid = line[len(self._mark) :].strip()
            self.pid = int(pid) if pid.isdigit() else 0
            self.known.set()
            self._held = rest
            self.finish()

    def finish(self) -> None:
        """Pass on the rest that is held."""
        self._pass_on(len(self._held))

    def _pass_on(self, count: int) -> None:
        done, self._held = self._held[:count], self._held[count:]
        if done:
            self._sink(done)


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
    """Run a command to its end, passing on its outputs as they come.

    Args:
        channel: From `open_session`; its opener closes it.
        command: The command line, as the login shell reads it; None for the login shell itself.
        stdin: What the command reads; nothing by default.
        stdout: Receives its output.
        stderr: Receives its error output.
        get_pty: Whether it gets a terminal.
        deadline: Until when it may run; no limit when None.
        on_wait: Called regularly while it runs; what it raises ends the wait.

    Returns:
        Its exit status; -1 when a signal ended it, or the connection ended first.

    Raises:
        paramiko.SSHException: The connection is gone.
        PycloudlibTimeoutError: The command did not end, or did not begin, in time.
    """
    _begin(channel, command, deadline, get_pty=get_pty)
    return _follow(
        channel,
        command,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        deadline=deadline,
        on_wait=on_wait,
    )


def _begin(
    channel: paramiko.Channel,
    command: str | None,
    deadline: Deadline | None,
    *,
    get_pty: bool = False,
) -> None:
    line = None if command is None else to_bytes(command)
    with ssh_errors(deadline), close_if_unanswered(channel, deadline):
        if get_pty:
            channel.get_pty()
        if line is None:
            channel.invoke_shell()
        else:
            channel.exec_command(line)


def _follow(
    channel: paramiko.Channel,
    command: str | None,
    *,
    stdin: Source | None,
    stdout: Sink,
    stderr: Sink,
    deadline: Deadline | None,
    on_wait: Callable[[], None],
) -> int:
    pumps = (_Pump(channel.recv, stdout), _Pump(channel.recv_stderr, stderr))
    threading.Thread(target=_feed, args=(channel, stdin), daemon=True).start()
    if _have_ended(pumps, deadline, on_wait) and _has_status(channel, deadline, on_wait):
        return channel.exit_status
    assert deadline is not None  # without one, the waits above end with the command
    raise _is_late(command, deadline)


def _is_late(command: str | None, deadline: Deadline, how: str = "") -> PycloudlibTimeoutError:
    words = f"The command did not end within {deadline.limit:g} s{how}"
    return PycloudlibTimeoutError(f"{words}: {command_in_errors(command)}")


class _Pump(threading.Thread):
    """Passes one output of a channel on, to its end."""

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
            except OSError:  # the connection is gone: there will be no exit status
                return
            if not chunk:
                return
            try:
                self._sink(chunk)
            except Exception as error:  # noqa: BLE001 - raised in the thread that waits
                self.error = error
                return


def _have_ended(
    pumps: tuple[_Pump, ...], deadline: Deadline | None, on_wait: Callable[[], None]
) -> bool:
    """Wait until both outputs have ended; return whether they did in time."""
    while waiting := [pump for pump in pumps if pump.is_alive()]:
        waiting[0].join(capped(_ON_WAIT_INTERVAL, deadline))
        _raise_first(pumps)
        if waiting[0].is_alive():
            if deadline is not None and deadline.expired:
                return False
            on_wait()
    _raise_first(pumps)
    return True


def _has_status(
    channel: paramiko.Channel, deadline: Deadline | None, on_wait: Callable[[], None]
) -> bool:
    """Wait for the exit status, or the end of the connection; return whether that came in time."""
    while not channel.status_event.wait(capped(_ON_WAIT_INTERVAL, deadline)):
        if deadline is not None and deadline.expired:
            return False
        on_wait()
    return True


@contextlib.contextmanager
def interrupt_when(check: Callable[[], None], hang_up: Callable[[], object]) -> Iterator[None]:
    """End a block that waits for the guest as soon as a check fails.

    Args:
        check: Called regularly; raises if the guest cannot answer any more. Its error leaves the
            block.
        hang_up: Closes what is waited on in the block; called in another thread.
    """
    over = threading.Event()
    errors: list[Exception] = []

    def watch() -> None:
        while not over.wait(_ON_WAIT_INTERVAL):
            try:
                check()
            except Exception as error:  # noqa: BLE001 - raised in the thread that waits
                errors.append(error)
                with contextlib.suppress(OSError, EOFError):
                    hang_up()
                return

    watcher = threading.Thread(target=watch, name="lookout", daemon=True)
    watcher.start()
    try:
        yield
    except Exception as error:
        if errors:
            raise errors[0] from error
        raise
    finally:
        over.set()
    if errors:
        raise errors[0]


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
