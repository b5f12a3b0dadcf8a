"""Single files, copied to and from the guest over SFTP, as `cp` does it.

SFTP has a number for two errors: there is no such file, and it is not permitted. All others are a
"Failure"; then a command in the guest finds out the reason.
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
from pycloudlib.guest.access.sessions import Connections
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


class _UnexplainedError(Exception):
    """The SFTP server has failed without a reason."""


def push(
    connections: Connections,
    local_path: str | os.PathLike[str],
    remote_path: str | os.PathLike[str],
    on_progress: ProgressCallback = ignore_progress,
) -> None:
    """Copy a local file to the guest; an existing file, device or FIFO is written into.

    Raises:
        FileNotFoundError: The local file, or the remote directory, does not exist.
        OSError: It cannot be read or written; of the kind that its reason has in Python.
        ValueError: A path has a NUL byte, or cannot be encoded.
        paramiko.SSHException: The machine cannot be reached.
    """
    source = check_path("local_path", local_path)
    target = check_path("remote_path", remote_path)
    with (
        _explaining(connections, _WHY_NOT_WRITTEN, target),
        Path(source).open("rb") as file,
        connections.files() as sftp,
        _naming(target, sftp),
    ):
        _send(file, source, sftp, target, on_progress)


def pull(
    connections: Connections,
    remote_path: str | os.PathLike[str],
    local_path: str | os.PathLike[str],
    on_progress: ProgressCallback = ignore_progress,
) -> None:
    """Copy a file from the guest; errors are those of `push`, see also `files.writing`."""
    source = check_path("remote_path", remote_path)
    target = Path(check_path("local_path", local_path))
    with _explaining(connections, _WHY_NOT_READ, source):
        with connections.files() as sftp, _naming(source, sftp):
            facts = sftp.stat(to_bytes(source))
            if not _is_stream(facts.st_mode or 0):
                _receive(sftp, facts, source, target, on_progress)
                return
        _receive_stream(connections, source, target, on_progress)


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
) -> None:
    facts = os.fstat(file.fileno())
    total = facts.st_size if stat.S_ISREG(facts.st_mode) else None
    # sshd seeks before it writes, but not when it appends; a stream cannot be sought in.
    how = "ab" if _is_stream(_find_mode(sftp, target)) else "wb"
    with sftp.open(to_bytes(target), how) as remote:
        # Each answer is waited for if the size cannot show whether all has arrived.
        is_regular = stat.S_ISREG(remote.stat().st_mode or 0)
        remote.set_pipelined(is_regular)
        done = 0
        while chunk := _read(file, source):
            remote.write(chunk)
            done += len(chunk)
            on_progress(Progress("copying", Path(source).name, done, total, "B"))
        arrived = remote.stat().st_size if is_regular else done
        if arrived != done:
            raise _UnexplainedError(f"{arrived} of {done} bytes have arrived")


def _receive(
    sftp: paramiko.SFTPClient,
    facts: paramiko.SFTPAttributes,
    source: str,
    target: Path,
    on_progress: ProgressCallback,
) -> None:
    mode, size = facts.st_mode or 0, facts.st_size or 0
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), source)
    with (
        sftp.open(to_bytes(source), "rb") as remote,
        writing(target) as file,
    ):
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
def _naming(path: str, sftp: paramiko.SFTPClient) -> Iterator[None]:
    """Add the remote file's name to SFTP's errors, which lack one."""
    import paramiko  # noqa: PLC0415 - heavy

    channel = sftp.get_channel()
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
