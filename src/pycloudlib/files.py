"""Files that appear whole or not at all, that only their owner reads, and that lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from pycloudlib.errors import CloudSetupError
from pycloudlib.rawtext import to_bytes


@contextlib.contextmanager
def replace_atomically(target: Path, *, synced: bool = True) -> Iterator[Path]:
    """Yield a temporary name in the target's directory; it becomes the target on success.

    The final name never shows half a file: the content is synced before it is renamed, and on
    any error, interruption included, nothing is left.

    Args:
        target: The file.
        synced: Whether it has to survive a crash of the host.
    """
    temporary = temporary_name(target, "tmp")
    try:
        yield temporary
        if synced:
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(target: Path, suffix: str) -> Path:
    """Choose a hidden name beside a file; it is not too long, however long the file's name is."""
    # The limit is in bytes, of which a character may have four.
    start = target.name.encode("utf-8", "surrogateescape")[:80].decode("utf-8", "ignore")
    return target.with_name(f".{start}.{secrets.token_hex(4)}.{suffix}")


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, from its first byte on; never through a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(to_bytes(text))


def private_opener(path: str, flags: int) -> int:
    """Let `open()` make a file that only its owner can read, from its first byte on."""
    return os.open(path, flags, 0o600)


def copy_private(source: Path, target: Path) -> None:
    """Copy a file; only its owner can read the copy, from its first byte on."""
    with source.open("rb") as original, open(target, "wb", opener=private_opener) as copy:
        shutil.copyfileobj(original, copy)


def expand_user(path: str | os.PathLike[str]) -> Path:
    """Put a home directory in place of a leading `~`; one of nobody's stays as it is written."""
    try:
        return Path(path).expanduser()
    except (RuntimeError, ValueError):
        return Path(path)


def tells_of_no_file(error: OSError) -> bool:
    """Say whether an error tells that there is nothing of a name, or that nothing can have it."""
    return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def is_file(path: Path) -> bool:
    """Say whether there is a file of a name; False, too, when none can have it."""
    try:
        return path.is_file()
    except OSError as error:
        if not tells_of_no_file(error):
            raise
        return False


def is_directory(path: Path) -> bool:
    """Say whether there is a directory of a name; False, too, when none can have it."""
    try:
        return path.is_dir()
    except OSError as error:
        if not tells_of_no_file(error):
            raise
        return False


def remove_file(path: Path) -> None:
    """Remove a file; that there is none of its name, or that none can have it, is no error."""
    try:
        path.unlink()
    except OSError as error:
        if not tells_of_no_file(error):
            raise


def create_private_directory(path: Path) -> Path:
    """Make a directory that only its owner can enter; parents are made as the umask has it.

    Raises:
        CloudSetupError: There is something else of that name, or a directory that others own or
            can write to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    try:
        found = path.lstat()
    except FileNotFoundError:  # removed again by another process
        return create_private_directory(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise CloudSetupError(
            f"{path} is not a directory that belongs to this user alone; remove it, or use another "
            "working_dir"
        )
    return path


@contextlib.contextmanager
def exclusive_lock(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lock that other threads and processes wait for; it ends with this process, too.

    The file may be removed by whoever holds the lock.

    Args:
        path: The lock's file; made when missing.
        on_wait: Called when somebody else holds it.

    Raises:
        FileNotFoundError: The file's directory does not exist.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait is not None:
                    on_wait()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_at(descriptor, path):
                continue  # removed while this one waited: the lock is another file now
            yield
            return
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def trying_lock(path: Path) -> Iterator[bool]:
    """Hold a lock of `exclusive_lock` if nobody holds it now; yield whether it is held.

    Raises:
        FileNotFoundError: The file's directory does not exist.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield _is_at(descriptor, path)
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
