"""Copies between the host and a machine, as `cp -rH` does: half runs here, half in the guest."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, cast

from pycloudlib._base.documents import escape_line, to_bytes
from pycloudlib.errors import GuestRefusedError, PycloudlibError
from pycloudlib.guest.access import commands, portstream, sessions
from pycloudlib.guest.access.portstream import PortStream
from pycloudlib.guest.programs import copy_in_guest
from pycloudlib.guest.programs.copy_in_guest import Problem, Send, StreamError
from pycloudlib.progress import Progress, ProgressCallback, ignore_progress
from pycloudlib.qemu.instance import QemuInstance

if TYPE_CHECKING:
    import paramiko

_REMOTE = re.compile(r"(?P<name>[a-z0-9-]+(?:/[a-z0-9-]+)?):(?P<path>.*)", re.DOTALL)
# Seconds that a failed command may take to say why.
LAST_WORDS_LIMIT = 10.0
_NO_SUCH_COMMAND = 127  # a shell's exit status


@dataclass(frozen=True, slots=True)
class Location:
    """The source or the target of a copy.

    Attributes:
        machine: The machine's name; empty for a path on the host.
        path: The path, unchanged.
    """

    machine: str
    path: str

    @classmethod
    def parse(cls, text: str) -> Location:
        """Parse `name:path`, or a path on the host; `./` makes `name:path` one of the latter."""
        match = None if text.startswith((".", "/", "~")) else _REMOTE.fullmatch(text)
        return cls(match["name"], match["path"] or ".") if match else cls("", text)


class CopyError(OSError):
    """Some files could not be copied; the others have been.

    Attributes:
        problems: Why, one line for each file.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def push(
    instance: QemuInstance,
    source: str,
    target: str,
    on_progress: ProgressCallback = ignore_progress,
) -> None:
    """Copy a file or directory to a machine, as its login user, like `cp -rH`.

    Args:
        instance: The machine.
        source: The path on the host, unchanged: a slash or a dot at its end has a meaning.
        target: The path in the machine.
        on_progress: Called with the bytes sent.

    Raises:
        FileNotFoundError: The source, or the directory of the target, does not exist.
        CopyError: Some files could not be copied; names them. The others have been.
        PycloudlibError: The guest cannot receive the files; says why.
        paramiko.SSHException: The machine cannot be reached.
    """
    path = os.fsencode(source)
    name = copy_in_guest.name_in_directory(path)
    size = _size_of(source)
    count = _Count(on_progress, Path(source).name or source, size)
    problems: list[Problem] = []

    def send(kind: bytes, payload: bytes) -> None:
        if kind == copy_in_guest.PROBLEM:
            problems.append(Problem.unpack(payload))
        else:
            put(kind, payload)

    with _by_port(instance, size, "write", target, os.fsdecode(name)) as by_port:
        if by_port is not None:
            put = _counting(by_port.records, count)
            copy_in_guest.Reader(send).read(path)
            put(copy_in_guest.END, b"")
            by_port.flush()
            with _refusing(instance.name):
                theirs = copy_in_guest.read_problems(by_port.answers)
    if by_port is not None:
        _raise_problems(instance.name, ours=problems, theirs=theirs)
        return
    with _Command(instance, "write", to_bytes(target), name) as running:
        try:
            with running.input(count) as stream:
                put = copy_in_guest.sender(stream)
                copy_in_guest.Reader(send).read(path)
                put(copy_in_guest.END, b"")
        except _HungUpError as error:
            # The guest's own message says more than that it hung up.
            running.explain()
            raise PycloudlibError(f"{source} could not be sent: {error}") from error
        running.channel.shutdown_write()
        with running.understood(), running.output() as answers:
            theirs = copy_in_guest.read_problems(answers)
        running.finish()
    _raise_problems(instance.name, ours=problems, theirs=theirs)


def pull(
    instance: QemuInstance,
    source: str,
    target: str,
    on_progress: ProgressCallback = ignore_progress,
    *,
    last_words_limit: float = LAST_WORDS_LIMIT,
) -> None:
    """Copy a file or directory from a machine, as its login user, like `cp -rH`.

    The machine is not trusted: nothing is written outside of the target, and no device is made.

    Args:
        instance: The machine.
        source: The path in the machine, unchanged: a slash or a dot at its end has a meaning.
        target: The path on the host.
        on_progress: Called with the bytes received.
        last_words_limit: Seconds that the guest's program may take to say why it has failed.

    Raises:
        FileNotFoundError: The source, or the directory of the target, does not exist.
        CopyError: Some files could not be copied; names them. The others have been.
        PycloudlibError: The guest cannot send the files, or sends what is refused; says why.
        paramiko.SSHException: The machine cannot be reached.
    """
    name = copy_in_guest.name_in_directory(to_bytes(source))
    pulled = _Pulled(target, name, _Count(on_progress, Path(source).name or source, None))
    port = instance._file_port()
    by_port = port is not None and port.is_ready
    with contextlib.closing(pulled):
        if not by_port:
            # How large it is, is known when it begins.
            is_enough = port.is_better if port is not None else _never
            by_port = not _pull_by_ssh(instance, source, pulled, last_words_limit, is_enough)
        if by_port and not _pull_by_port(instance, source, pulled):
            _pull_by_ssh(instance, source, pulled, last_words_limit, _never)
    _raise_problems(instance.name, ours=pulled.writer.problems, theirs=pulled.problems)


class _Pulled:
    """What is pulled, as far as it has come.

    Attributes:
        writer: The half that writes.
        problems: Those of the half that reads.
        count: Counts the bytes.
    """

    def __init__(self, target: str, name: bytes, count: _Count) -> None:
        self.writer = copy_in_guest.Writer(os.fsencode(target), name, trusting=False)
        self.problems: list[Problem] = []
        self.count = count

    def take(self, stream: BinaryIO, is_enough: Callable[[int], bool]) -> bool:
        """Write a whole stream; return whether it was, and is not one file of a size to refuse."""
        for kind, payload in copy_in_guest.read_records(stream):
            if kind == copy_in_guest.FILE and not self.writer.begun:
                self.count.total = copy_in_guest.size_told(payload)
                if is_enough(self.count.total):
                    return False
            if kind != copy_in_guest.PROBLEM:
                self.writer.take(kind, payload)
            elif len(self.problems) < copy_in_guest.MOST_PROBLEMS:
                self.problems.append(Problem.unpack(payload))
        return True

    def close(self) -> None:
        self.writer.close()


def _never(_size: int) -> bool:
    return False


def _pull_by_ssh(
    instance: QemuInstance,
    source: str,
    pulled: _Pulled,
    last_words_limit: float,
    is_enough: Callable[[int], bool],
) -> bool:
    """Pull by SSH, unless it is one file that is better pulled by the port; return whether."""
    with _Command(
        instance, "read", to_bytes(source), b"", last_words_limit=last_words_limit
    ) as running:
        running.channel.shutdown_write()
        with running.understood(), running.output(pulled.count) as stream:
            if not pulled.take(stream, is_enough):
                return False
        running.finish()
    return True


def _pull_by_port(instance: QemuInstance, source: str, pulled: _Pulled) -> bool:
    """Pull by the port; return whether that was possible."""
    size = pulled.count.total
    with _by_port(instance, size or 0, "read", source) as stream:
        if stream is None:
            return False
        with _refusing(instance.name):
            answers = _Counted(stream.answers, pulled.count)
            pulled.take(cast("BinaryIO", answers), _never)
    return True


@contextlib.contextmanager
def _by_port(
    instance: QemuInstance, size: int, role: str, path: str, name: str = ""
) -> Iterator[PortStream | None]:
    """Run the half in the guest on the helper's port, where that is faster than SSH."""
    port = instance._file_port()
    if port is None or not (port.is_ready or port.is_better(size)):
        yield None
        return
    with (
        commands.interrupt_when(instance.check_answers, instance._forget_client),
        port.copying(role, path, name, size=size) as stream,
    ):
        yield stream


@contextlib.contextmanager
def _refusing(name: str) -> Iterator[None]:
    try:
        yield
    except StreamError as error:
        raise GuestRefusedError(f"What {name} sends is refused: {error}") from error


class _Counted:
    """A stream whose bytes are counted as they are read."""

    def __init__(self, stream: BinaryIO, count: _Count) -> None:
        self._stream = stream
        self._count = count

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._count.add(len(data))
        return data


def _counting(send: Send, count: _Count) -> Send:
    """Return a function that sends records and counts their bytes."""

    def put(kind: bytes, payload: bytes) -> None:
        send(kind, payload)
        count.add(copy_in_guest.HEAD.size + len(payload))

    return put


def _raise_problems(name: str, *, ours: Sequence[Problem], theirs: Sequence[Problem]) -> None:
    """Raise the problems as one error, if there are any."""
    named = [*(("", problem) for problem in ours), *((f"{name}:", problem) for problem in theirs)]
    if len(named) == 1 and named[0][1].number == errno.ENOENT:
        place, problem = named[0]
        path = place + os.fsdecode(problem.path)
        raise FileNotFoundError(problem.number, os.strerror(problem.number), path)
    if named:
        raise CopyError([_describe(place, problem) for place, problem in named])


def _describe(place: str, problem: Problem) -> str:
    path = escape_line(f"{place}{os.fsdecode(problem.path)}")
    return f"cannot {problem.attempt} '{path}': {escape_line(problem.why)}"


class _Command:
    """The half of a copy that runs in the guest.

    Args:
        instance: The machine.
        *arguments: Those of the program, see `copy_in_guest`.
        last_words_limit: Seconds that it may take to say why it has failed.
    """

    def __init__(
        self,
        instance: QemuInstance,
        *arguments: str | bytes,
        last_words_limit: float = LAST_WORDS_LIMIT,
    ) -> None:
        self._name = instance.name
        self._last_words_limit = last_words_limit
        self._client = instance._ssh_connect()
        # A guest whose kernel is no more closes no connection.
        self._lookout = commands.interrupt_when(instance.check_answers, self._client.close)
        words = [os.fsdecode(argument) for argument in arguments]
        try:
            self.channel = sessions.open_session(self._client)
            with sessions.close_if_unanswered(self.channel, None):
                self.channel.exec_command(os.fsencode(f"exec {_program()} {shlex.join(words)}"))
        except BaseException:
            self._client.close()
            raise

    def __enter__(self) -> _Command:
        self._lookout.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._lookout.__exit__(kind, error, traceback)
        finally:
            self._client.close()

    def input(self, count: _Count) -> contextlib.AbstractContextManager[BinaryIO]:
        """Return the stream of its standard input."""
        stream = io.BufferedWriter(_Writer(self.channel, count), 1 << 16)
        return cast("contextlib.AbstractContextManager[BinaryIO]", stream)

    def output(self, count: _Count | None = None) -> contextlib.AbstractContextManager[BinaryIO]:
        """Return the stream of its standard output."""
        stream = io.BufferedReader(_Reader(self.channel, count), 1 << 16)
        return cast("contextlib.AbstractContextManager[BinaryIO]", stream)

    @contextlib.contextmanager
    def understood(self) -> Iterator[None]:
        """Translate the errors of what it writes.

        Raises:
            GuestRefusedError: Its output is malformed; with its own message if it has failed.
        """
        with _refusing(self._name):
            try:
                yield
            except StreamError:
                self.explain()
                raise

    def explain(self) -> None:
        """Raise the command's own error, if it has failed.

        If it does not end, because nobody reads what it writes, nothing is raised.

        Raises:
            GuestRefusedError: It failed; with its own message.
        """
        self.channel.settimeout(self._last_words_limit)
        with contextlib.suppress(TimeoutError):
            self.finish()

    def finish(self) -> None:
        """Wait for its end.

        Raises:
            GuestRefusedError: It failed; with its own message.
        """
        message = self.channel.makefile_stderr("rb").read()
        if not self.channel.status_event.wait(self.channel.gettimeout()):
            raise TimeoutError
        status = self.channel.recv_exit_status()
        if status == _NO_SUCH_COMMAND:
            raise GuestRefusedError(f"{self._name} has no python3, which copies need")
        if status != 0:
            words = message.decode(errors="replace").strip()
            raise GuestRefusedError(
                f"{self._name}: {words or f'the copy ended with exit status {status}'}"
            )


@functools.cache
def _program() -> str:
    """Return the command that runs the half in the guest, without its arguments."""
    return f"python3 -IS -c {shlex.quote(portstream.program())}"


def _size_of(source: str) -> int:
    """Return the bytes of all files in a directory, or of a file; its stream has a few more."""
    total = _size_of_file(Path(source), follow=True)
    # os.walk skips directories that cannot be read.
    for directory, _, names in os.walk(source):
        total += sum(_size_of_file(Path(directory, name)) for name in names)
    return total


def _size_of_file(path: Path, *, follow: bool = False) -> int:
    try:
        facts = path.stat(follow_symlinks=follow)
    except OSError:
        return 0
    return facts.st_size if stat.S_ISREG(facts.st_mode) else 0


class _HungUpError(OSError):
    """The other side has closed the connection."""


class _Count:
    """Counts the bytes of a stream, and reports them.

    Attributes:
        total: How many there will be; None while that is unknown.
    """

    def __init__(self, on_progress: ProgressCallback, name: str, total: int | None) -> None:
        self._on_progress = on_progress
        self._name = name
        self.total = total
        self._done = 0

    def add(self, count: int) -> None:
        """Count more bytes."""
        self._done += count
        done = self._done if self.total is None else min(self._done, self.total)
        self._on_progress(Progress("copying", self._name, done, self.total, "B"))


class _Writer(io.RawIOBase):
    """The writable end of a channel."""

    def __init__(self, channel: paramiko.Channel, count: _Count) -> None:
        super().__init__()
        self._channel = channel
        self._count = count

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        try:
            sent = self._channel.send(bytes(memoryview(data)))  # type: ignore[arg-type]
        except OSError as error:
            raise _HungUpError(str(error)) from error
        self._count.add(sent)
        return sent


class _Reader(io.RawIOBase):
    """The readable end of a channel."""

    def __init__(self, channel: paramiko.Channel, count: _Count | None) -> None:
        super().__init__()
        self._channel = channel
        self._count = count

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        data = self._channel.recv(len(view))
        view[: len(data)] = data
        if self._count is not None:
            self._count.add(len(data))
        return len(data)
