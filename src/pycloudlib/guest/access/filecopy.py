"""Single files, copied to and from the guest over SFTP, as `cp` does it.

SFTP has a number for two errors: there is no such file, and it is not permitted. All others are a
"Failure"; then a command in the guest finds out the reason.

Where a port is faster, the data goes by it. SFTP opens the file all the same, which finds out what
it is and whether it may be used; not where a helper has the port and no SSH connection is open. All
that is not a regular file, and all that cannot be done by the port, is left to SFTP.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pycloudlib._base.documents import to_bytes
from pycloudlib._base.files import writing
from pycloudlib.errors import PycloudlibTimeoutError
from pycloudlib.guest.access import commands
from pycloudlib.guest.access.portstream import FilePort
from pycloudlib.guest.access.sessions import Connections
from pycloudlib.guest.programs import copy_in_guest
from pycloudlib.guest.programs.copy_in_guest import NUMBER, OpenFile, Place, Problem, StreamError
from pycloudlib.progress import Progress, ProgressCallback, ignore_progress

if TYPE_CHECKING:
    import paramiko

_CHUNK = 1 << 15
_REASON_LIMIT = 10.0
_NUMBERS = {os.strerror(number): number for number in errno.errorcode}
# Each prints what is wrong when the file is opened or read, or the disk is full.
_WHY_NOT_READ = 'head -c 1 <"$1" >/dev/null'
_WHY_NOT_WRITTEN = """
: >>"$1" || exit
[ ! -c "$1" ] || head -c 1 /dev/zero >>"$1" || exit
df -P -- "$1" | awk 'NR == 2 && $2 && $4 < 64 { print "df: No space left on device" }' >&2
"""


# The mode of a new file, less the umask in the guest.
_MODE = copy_in_guest.MODE.pack(0o666)


class _UnexplainedError(Exception):
    """The SFTP server has failed without a reason."""


class _LeftToSftpError(Exception):
    """The port is not for this; nothing is done."""


class _CallersError(BaseException):
    """An error of a function of the caller's, which is not taken for one of the copy."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


@contextlib.contextmanager
def _apart(on_progress: ProgressCallback) -> Iterator[ProgressCallback]:
    """Have errors of the caller's function leave the block as they are."""

    def report(progress: Progress) -> None:
        try:
            on_progress(progress)
        except Exception as error:
            raise _CallersError(error) from error

    try:
        yield report
    except _CallersError as passed:
        raise passed.error from None


def push(
    connections: Connections,
    local_path: str | os.PathLike[str],
    remote_path: str | os.PathLike[str],
    on_progress: ProgressCallback = ignore_progress,
    port: FilePort | None = None,
) -> None:
    """Copy a local file to the guest; an existing file, device or FIFO is written into.

    Args:
        connections: Those to the machine.
        local_path: The file.
        remote_path: Where it goes; relative to the home directory.
        on_progress: Called with the bytes that have been copied.
        port: What large files go by, where that is faster.

    Raises:
        FileNotFoundError: The local file, or the remote directory, does not exist.
        OSError: It cannot be read or written; of the kind that its reason has in Python.
        ValueError: A path has a NUL byte, or cannot be encoded.
        paramiko.SSHException: The machine cannot be reached.
    """
    source = check_path("local_path", local_path)
    target = check_path("remote_path", remote_path)
    with (
        _apart(on_progress) as report,
        _explaining(connections, _WHY_NOT_WRITTEN, target),
        Path(source).open("rb") as file,
    ):
        is_alone = port is not None and port.is_ready and not connections.any_open
        if port and is_alone and _size_of(file):
            with contextlib.suppress(_LeftToSftpError), _naming(target):
                _send_by(port, file, source, target, report)
                return
        with connections.files() as sftp, _naming(target, sftp):
            _send(file, source, sftp, target, report, port)


def pull(
    connections: Connections,
    remote_path: str | os.PathLike[str],
    local_path: str | os.PathLike[str],
    on_progress: ProgressCallback = ignore_progress,
    port: FilePort | None = None,
) -> None:
    """Copy a file from the guest; arguments and errors are those of `push`, see `files.writing`."""
    source = check_path("remote_path", remote_path)
    target = Path(check_path("local_path", local_path))
    with _apart(on_progress) as report, _explaining(connections, _WHY_NOT_READ, source):
        if port is not None and port.is_ready and not connections.any_open:
            with contextlib.suppress(_LeftToSftpError), _naming(source):
                with writing(target) as file:
                    _receive_by(port, source, file, target, 0, report)
                return
        with connections.files() as sftp, _naming(source, sftp):
            facts = sftp.stat(to_bytes(source))
            if not _is_stream(facts.st_mode or 0):
                _receive(sftp, facts, source, target, report, port)
                return
        _receive_stream(connections, source, target, report)


def check_path(what: str, path: str | os.PathLike[str]) -> str:
    """Check a path that was given, and return it as text.

    Raises:
        FileNotFoundError: It is empty.
        ValueError: It has a NUL byte, or cannot be encoded.
        TypeError: It is no path.
    """
    text = os.fsdecode(path)
    if not text:
        raise FileNotFoundError(errno.ENOENT, f"{what} is empty", text)
    if "\0" in text:
        raise ValueError(f"{what} is {text!r}, expected a path without NUL bytes")
    try:
        to_bytes(text)
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is {text!r}, which is not Unicode: {error.reason}") from error
    return text


def _send(
    file: IO[bytes],
    source: str,
    sftp: paramiko.SFTPClient,
    target: str,
    on_progress: ProgressCallback,
    port: FilePort | None,
) -> None:
    total = _size_of(file)
    # sshd seeks before it writes, but not when it appends; a stream cannot be sought in.
    how = "ab" if _is_stream(_find_mode(sftp, target)) else "wb"
    with sftp.open(to_bytes(target), how) as remote:
        # Each answer is waited for if the size cannot show whether all has arrived.
        is_regular = stat.S_ISREG(remote.stat().st_mode or 0)
        if is_regular and total and port is not None and port.is_better(total):
            with contextlib.suppress(_LeftToSftpError):
                there = _absolute(target, sftp)
                done = _send_by(port, file, source, there, on_progress)
                _check_arrived(remote, done)
                return
        remote.set_pipelined(is_regular)
        done = 0
        while chunk := _read(file, source):
            remote.write(chunk)
            done += len(chunk)
            on_progress(Progress("copying", Path(source).name, done, total, "B"))
        if is_regular:
            _check_arrived(remote, done)


def _check_arrived(remote: paramiko.SFTPFile, done: int) -> None:
    arrived = remote.stat().st_size
    if arrived != done:
        raise _UnexplainedError(f"{arrived} of {done} bytes have arrived")


def _size_of(file: IO[bytes]) -> int | None:
    """Return the size of a local file; None if it is not a regular one."""
    facts = os.fstat(file.fileno())
    return facts.st_size if stat.S_ISREG(facts.st_mode) else None


def _absolute(path: str, sftp: paramiko.SFTPClient) -> str:
    """Return a path in the guest for a program there, whatever directory that begins in."""
    if path.startswith("/"):
        return path
    return f"{sftp.normalize('.')}/{path}"


def _send_by(
    port: FilePort, file: IO[bytes], source: str, target: str, on_progress: ProgressCallback
) -> int:
    """Send a file by the port; return its size."""
    size = _size_of(file) or 0
    with port.copying("write-regular", target, size=size) as stream, _understood():
        if stream is None:
            raise _LeftToSftpError
        stream.records(copy_in_guest.FILE, _MODE + NUMBER.pack(size))
        done = 0
        pieces = copy_in_guest.pieces(file.fileno())
        while piece := _next(pieces, source):
            offset, data = piece
            stream.records(copy_in_guest.DATA, NUMBER.pack(offset) + data)
            done = offset + len(data)
            on_progress(Progress("copying", Path(source).name, done, max(size, done), "B"))
        hole = copy_in_guest.hole_at_end(file.fileno())
        if hole > done:
            done = hole
            on_progress(Progress("copying", Path(source).name, done, done, "B"))
        stream.records(copy_in_guest.CLOSE, NUMBER.pack(done))
        stream.records(copy_in_guest.END, b"")
        stream.flush()
        # SFTP tries it again, and finds out the reason.
        failed = copy_in_guest.read_problems(stream.answers)
    if failed:
        raise _LeftToSftpError
    return done


def _next(pieces: Iterator[tuple[int, bytes]], path: str) -> tuple[int, bytes] | None:
    with _here(path):
        return next(pieces, None)


def _receive_by(
    port: FilePort,
    source: str,
    file: io.FileIO,
    target: Path,
    size: int,
    on_progress: ProgressCallback,
) -> None:
    """Receive a file by the port."""
    place = Place(None, b"", b"")
    with (
        port.copying("read", source, size=size) as stream,
        _understood(),
        contextlib.closing(OpenFile(place, os.dup(file.fileno()))) as copy,
    ):
        if stream is None:
            raise _LeftToSftpError
        for kind, payload in copy_in_guest.read_records(stream.answers):
            number = NUMBER.unpack(payload[: NUMBER.size])[0] if len(payload) >= NUMBER.size else 0
            if kind == copy_in_guest.PROBLEM and copy.end:
                problem = Problem.unpack(payload)
                raise OSError(problem.number or errno.EIO, problem.why, source)
            if kind == copy_in_guest.FILE:
                size = copy_in_guest.size_told(payload)
            elif kind == copy_in_guest.DATA:
                with _here(str(target)):
                    copy.write(place, number, payload[NUMBER.size :])
                total = max(size, copy.end)
                on_progress(Progress("copying", target.name, copy.end, total, "B"))
            elif kind == copy_in_guest.CLOSE:
                with _here(str(target)):
                    copy.finish(place, number)
            elif copy.end:
                raise StreamError(f"a record of kind {kind!r}")
            else:
                raise _LeftToSftpError


@contextlib.contextmanager
def _understood() -> Iterator[None]:
    """Turn nonsense of the half in the guest, which is not believed, into an error of SSH's."""
    import paramiko  # noqa: PLC0415 - heavy

    try:
        yield
    except StreamError as error:
        raise paramiko.SSHException(f"what the guest sends is no copy: {error}") from error


def _receive(
    sftp: paramiko.SFTPClient,
    facts: paramiko.SFTPAttributes,
    source: str,
    target: Path,
    on_progress: ProgressCallback,
    port: FilePort | None,
) -> None:
    mode, size = facts.st_mode or 0, facts.st_size or 0
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), source)
    with (
        sftp.open(to_bytes(source), "rb") as remote,
        writing(target) as file,
    ):
        if stat.S_ISREG(mode) and port is not None and port.is_better(size):
            with contextlib.suppress(_LeftToSftpError):
                there = _absolute(source, sftp)
                _receive_by(port, there, file, target, size, on_progress)
                return
        # The kernel's files have size 0, whatever their content.
        if stat.S_ISREG(mode) and size:
            remote.prefetch(size)
        done = 0
        while chunk := remote.read(_CHUNK):
            _write(file, chunk, target)
            done += len(chunk)
            on_progress(Progress("copying", target.name, done, max(size, done), "B"))


def _receive_stream(
    connections: Connections, source: str, target: Path, on_progress: ProgressCallback
) -> None:
    """Receive what SFTP cannot read, since sshd seeks before it reads."""
    import paramiko  # noqa: PLC0415 - heavy

    done = 0
    with writing(target) as file, connections.session() as session:

        def take(chunk: bytes) -> None:
            nonlocal done
            _write(file, chunk, target)
            done += len(chunk)
            on_progress(Progress("copying", target.name, done, None, "B"))

        status = commands.stream(
            session.channel,
            shlex.join(["sh", "-c", 'exec cat <"$1"', "sh", source]),
            stdout=take,
            stderr=len,
        )
        if status < 0:
            raise paramiko.SSHException(f"{source}: the connection is gone")
        if status:
            raise _UnexplainedError(f"cat ended with exit status {status}")


def _read(file: IO[bytes], path: str) -> bytes:
    with _here(path):
        return file.read(_CHUNK)


def _write(file: io.FileIO, chunk: bytes, path: Path) -> None:
    with _here(str(path)):
        while chunk:
            chunk = chunk[file.write(chunk) :]


@contextlib.contextmanager
def _here(path: str) -> Iterator[None]:
    """Add the local file's name to errors that lack one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, path) from error


def _find_mode(sftp: paramiko.SFTPClient, path: str) -> int:
    """Return the mode of what is there; 0 where nothing is.

    A link that leads nowhere is an error, as for `cp`: it may not be meant as a file.
    """
    name = to_bytes(path)
    try:
        mode = sftp.lstat(name).st_mode or 0
    except FileNotFoundError:
        return 0
    if not stat.S_ISLNK(mode):
        return mode
    try:
        return sftp.stat(name).st_mode or 0
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "a link that leads nowhere", path) from None


def _is_stream(mode: int) -> bool:
    """Whether a file of a mode, such as a FIFO or a terminal, cannot be sought in."""
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


@contextlib.contextmanager
def _naming(path: str, sftp: paramiko.SFTPClient | None = None) -> Iterator[None]:
    """Add the remote file's name to SFTP's errors, which lack one."""
    import paramiko  # noqa: PLC0415 - heavy

    channel = None if sftp is None else sftp.get_channel()
    try:
        yield
    except (EOFError, TimeoutError, paramiko.SFTPError, paramiko.SSHException) as error:
        raise paramiko.SSHException(f"{path}: {error or 'the connection is gone'}") from error
    except OSError as error:
        if error.filename is not None:
            raise
        if error.errno is not None:
            raise OSError(error.errno, _words(error.errno, path), path) from error
        if channel is None or channel.closed:
            raise paramiko.SSHException(f"{path}: the connection is gone") from error
        raise _UnexplainedError(f"the guest answered: {error}") from error


def _words(number: int, path: str) -> str:
    words = os.strerror(number)
    if number == errno.ENOENT and path.startswith("~"):
        words += " (~ is a name as any other here; a path without / begins at the home directory)"
    return words


@contextlib.contextmanager
def _explaining(connections: Connections, script: str, path: str) -> Iterator[None]:
    """Find out in the guest why SFTP has failed, and raise the error of that reason."""
    import paramiko  # noqa: PLC0415 - heavy

    try:
        yield
    except _UnexplainedError as error:
        answer = b""
        with contextlib.suppress(paramiko.SSHException, PycloudlibTimeoutError):
            command = shlex.join(["env", "LC_ALL=C", "sh", "-c", script, "sh", path])
            _, answer, _ = commands.run(connections, command, timeout=_REASON_LIMIT)
        for words in re.split(r": |\n", answer.decode(errors="replace")):
            if words in _NUMBERS:
                raise OSError(_NUMBERS[words], words, path) from error
        raise OSError(errno.EIO, str(error), path) from error
