"""Files that appear complete or not at all, private to their owner; descriptors above 0 to 2."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import secrets
import shutil
import socket
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pycloudlib._base.documents import to_bytes
from pycloudlib.errors import CloudSetupError

_BLOCK = 1 << 18  # bytes that are read at once
_FIRST = 3  # the first descriptor above standard input and outputs

# Of this process, not of the children that it forks. No WeakSet: a Ctrl-C that comes when it drops
# a socket would be lost.
_sockets: set[weakref.ref[socket.socket]] = set()


@contextlib.contextmanager
def replace_atomically(target: Path, *, synced: bool = True) -> Iterator[Path]:
    """Yield a temporary name in the target's directory; it becomes the target on success.

    The final name is never half a file: the content is synced before it is renamed, and nothing is
    left on any error, interruption included.

    Args:
        target: The file.
        synced: Whether it has to survive a crash of the host.
    """
    temporary = temporary_name(target)
    try:
        yield temporary
        if synced:
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(target: Path) -> Path:
    """Return a hidden name beside a file; it is short enough however long the file's name is."""
    # The limit is in bytes, of which a character may have four.
    start = target.name.encode("utf-8", "surrogateescape")[:80].decode("utf-8", "ignore")
    return target.with_name(f".{start}.{secrets.token_hex(4)}.tmp")


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a small regular file, whatever is in its place.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is no regular file, such as a FIFO that never ends, or longer than `limit`
            bytes.
    """
    # A FIFO is opened without waiting for a writer.
    with open(path, "rb", opener=_open_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path} is not a regular file")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} is longer than the {limit} bytes expected at most")
    return content


def hash_file(file: IO[bytes]) -> hashlib._Hash:
    """Read a file from its position to its end, and return its SHA-256."""
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest


def _open_without_waiting(path: str, flags: int) -> int:
    return opener(path, flags | os.O_NONBLOCK)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[io.FileIO]:
    """Open a file, without a buffer, for what is copied to it, as `cp` does.

    A regular file is replaced when all is written, and a new one appears then: half a file is never
    seen, and the file before stays on any error. Everything else is written into: a device, a FIFO,
    a file with other names, another owner or an access control list, one that a process has open as
    /dev/stdout. Links are followed.

    Raises:
        FileNotFoundError: The directory is not there, or a link leads nowhere.
        OSError: It is a directory, or must not be written to.
    """
    try:
        found = target.stat()
    except FileNotFoundError:
        if target.is_symlink():
            raise FileNotFoundError(
                errno.ENOENT, "a link that leads nowhere", str(target)
            ) from None
        found = None
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if found is not None and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    with contextlib.ExitStack() as stack:
        temporary = _create_beside(target, found)
        if temporary is None:
            with open(target, "wb", buffering=0, opener=opener) as file:
                yield file
            return
        stack.callback(temporary.unlink, missing_ok=True)
        with open(temporary, "wb", buffering=0, opener=opener) as file:
            yield file
        try:
            temporary.replace(os.path.realpath(target))
        except OSError as error:
            # A mount point cannot be replaced.
            if error.errno != errno.EBUSY:
                raise
            with temporary.open("rb") as written, open(target, "wb", opener=opener) as file:
                shutil.copyfileobj(written, file)


def _create_beside(target: Path, found: os.stat_result | None) -> Path | None:
    """Create what may replace a file, like it; None if only the file itself can be written to."""
    place = Path(os.path.realpath(target))
    if found is not None:
        replaceable = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
        # A link below /proc may lead to a file that has no name any more.
        if not replaceable or not _is_file(found, place):
            return None
        if _is_open_file(target) or _has_attributes(place):
            return None
    temporary = temporary_name(place)
    try:
        temporary.touch(exist_ok=False)
    except OSError as error:
        if found is None:
            raise OSError(error.errno, error.strerror, str(target)) from error
        return None
    if found is not None:
        made = temporary.stat()
        if (made.st_uid, made.st_gid) != (found.st_uid, found.st_gid):
            temporary.unlink()
            return None
        temporary.chmod(found.st_mode & 0o777)
    return temporary


def _is_open_file(path: Path) -> bool:
    """Whether a path names a file by a process that has it open, as /dev/stdout does."""
    processes = Path("/proc").stat().st_dev
    while path.is_symlink():
        if path.lstat().st_dev == processes:
            return True
        path = path.parent / path.readlink()
    return False


def _has_attributes(path: Path) -> bool:
    """Whether a file has extended attributes of its own: an access control list is one."""
    try:
        names = os.listxattr(path)
    except OSError:  # its file system has none
        return False
    # The system sets those.
    return any(not name.startswith("security.") for name in names)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, from its first byte on; never through a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    descriptor = moved(os.open(path, flags, 0o600))
    with os.fdopen(descriptor, "wb") as file:
        file.write(to_bytes(text))


def private_opener(path: str, flags: int) -> int:
    """Open a file for `open()`; only its owner can read a new one, from its first byte on."""
    return moved(os.open(path, flags, 0o600))


def owner_opener(path: str, flags: int) -> int:
    """Open a file for `open()`; only its owner can write to a new one, whatever the umask is."""
    return moved(os.open(path, flags | os.O_CLOEXEC, 0o644))


def copy_private(source: Path, target: Path) -> None:
    """Copy a file; only its owner can read the copy, from its first byte on."""
    with source.open("rb") as original, open(target, "wb", opener=private_opener) as copy:
        shutil.copyfileobj(original, copy)


def expand_user(path: str | os.PathLike[str]) -> Path:
    """Expand a leading `~`; it is left alone if that user does not exist."""
    try:
        return Path(path).expanduser()
    except (RuntimeError, ValueError):
        return Path(path)


def is_not_found(error: OSError) -> bool:
    """Whether the error means that no such file exists, or can exist."""
    return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def is_file(path: Path) -> bool:
    """Whether a path is a regular file; False also for a path that cannot exist."""
    try:
        return path.is_file()
    except OSError as error:
        if not is_not_found(error):
            raise
        return False


def is_directory(path: Path) -> bool:
    """Whether a path is a directory; False also for a path that cannot exist."""
    try:
        return path.is_dir()
    except OSError as error:
        if not is_not_found(error):
            raise
        return False


def remove_file(path: Path) -> None:
    """Remove a file; a missing one is no error."""
    try:
        path.unlink()
    except OSError as error:
        if not is_not_found(error):
            raise


def allocated_size(*files: Path) -> int:
    """Return the bytes that files occupy on disk; holes of sparse files occupy none.

    Raises:
        OSError: One does not exist, or is hidden.
    """
    return sum(file.stat().st_blocks * 512 for file in files)


def is_private_directory(path: Path) -> bool:
    """Whether something is a directory of this user's, to which no other user can write.

    Raises:
        FileNotFoundError: There is nothing.
    """
    found = path.lstat()
    is_own = found.st_uid == os.geteuid() and not found.st_mode & 0o022
    return stat.S_ISDIR(found.st_mode) and is_own


def create_directories(path: Path, mode: int = 0o700) -> None:
    """Make a directory and its parents, where they are missing; only their owner can write there.

    Whatever the umask is: with 002, as on many systems, others could replace what is in them.

    Args:
        path: The directory.
        mode: Who can enter it, as far as the umask allows; by default its owner alone.

    Raises:
        FileExistsError: There is something else of that name.
    """
    try:
        path.mkdir(mode=mode & 0o755)
    except FileNotFoundError:
        create_directories(path.parent, mode)
        create_directories(path, mode)
    except FileExistsError:
        if not path.is_dir():
            raise


def is_shared_with_group(directory: Path) -> bool:
    """Whether a directory is shared with a group on purpose: new files belong to the group."""
    mode = directory.stat().st_mode
    return mode & (stat.S_ISGID | stat.S_IWGRP | stat.S_IWOTH) == stat.S_ISGID | stat.S_IWGRP


def create_private_directory(path: Path, *, parents: bool = True) -> Path:
    """Make a directory that only its owner can enter, unless it is there.

    Args:
        path: The directory.
        parents: Whether missing parents are made, too.

    Raises:
        FileNotFoundError: Its parent is missing, and is not to be made.
        CloudSetupError: There is something else of that name, or a directory that others own or
            can write to.
    """
    if parents:
        create_directories(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    try:
        private = is_private_directory(path)
    except FileNotFoundError:  # removed again by another process
        return create_private_directory(path, parents=parents)
    if not private:
        raise CloudSetupError(
            f"{path} is not a directory that belongs to this user alone; remove it, or use another "
            "working_dir"
        )
    return path


def _is_file(facts: os.stat_result, path: Path) -> bool:
    try:
        return os.path.samestat(facts, path.stat())
    except FileNotFoundError:
        return False


def moved(descriptor: int) -> int:
    """Move a new descriptor out of the way of standard input and outputs, if it is there."""
    if descriptor >= _FIRST:
        return descriptor
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FIRST)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def opened(path: Path | str, flags: int) -> Iterator[int]:
    """Yield a file's descriptor in the block; only its owner can read a new file."""
    descriptor = moved(os.open(path, flags | os.O_CLOEXEC, 0o600))
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def opener(path: str, flags: int) -> int:
    """Open a file for `open()`, with a descriptor above those of standard input and outputs."""
    return moved(os.open(path, flags | os.O_CLOEXEC, 0o666))


def moved_socket(new: socket.socket) -> socket.socket:
    """Move a new socket out of the way of standard input and outputs, if it is there."""
    if new.fileno() >= _FIRST:
        return new
    timeout = new.gettimeout()
    sock = socket.socket(fileno=moved(new.detach()))
    sock.settimeout(timeout)
    return sock


def make_socket(family: socket.AddressFamily) -> socket.socket:
    """Make a stream socket, which is closed in forked children."""
    return _not_for_children(moved_socket(socket.socket(family, socket.SOCK_STREAM)))


def make_socket_pair() -> tuple[socket.socket, socket.socket]:
    """Make two sockets that are connected to each other; they are closed in forked children."""
    ours, theirs = (_not_for_children(moved_socket(end)) for end in socket.socketpair())
    return ours, theirs


def _not_for_children(sock: socket.socket) -> socket.socket:
    for gone in [known for known in list(_sockets) if known() is None]:
        _sockets.discard(gone)
    _sockets.add(weakref.ref(sock))
    return sock


def _close_parents_sockets() -> None:
    for known in list(_sockets):
        sock = known()
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.close()


def make_pipe() -> tuple[int, int]:
    """Make a pipe; return the end to read from and the end to write to."""
    reader, writer = os.pipe()
    return moved(reader), moved(writer)


@contextlib.contextmanager
def keep_standard_streams_free() -> Iterator[None]:
    """Keep descriptors 0 to 2 out of reach of what a library opens in the block."""
    with contextlib.ExitStack() as placeholders:
        while (descriptor := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) < _FIRST:
            placeholders.callback(os.close, descriptor)
        os.close(descriptor)
        yield


os.register_at_fork(after_in_child=_close_parents_sockets)
