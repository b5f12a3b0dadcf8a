"""The users of an image: recorded beside it, so that it is not deleted or replaced while in use.

The path by which an image is named, a cloud's working directory and the user do not matter: all
information is at the file itself.

- Beside it is a record for each disk that is built on it, `.NAME.TOKEN.used`. That is a hard link
  of a file kept with the disk: when the disk's directory is removed, in any way, the record has one
  name left and does not count any more. Where hard links are not possible, as between file systems,
  it is `.NAME.TOKEN.used-elsewhere`, and counts as long as the disk that it names exists.
- A launch holds a lock on the file from the choice of the image until its own record is there.
- A running QEMU locks every file that its disk consists of.

A directory that this user must not write to gets no records; the locks need only read permission.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import os
import pwd
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.documents import decode, parse_json, to_bytes
from pycloudlib._base.files import create_private_directory, moved, write_private
from pycloudlib._base.locks import find_byte_lock, lock_bytes
from pycloudlib.errors import ImageInUseError, ImageNotFoundError
from pycloudlib.images import store

_log = logging.getLogger(__name__)

_BESIDE = ".uses"
_LINKED = "used"
_ELSEWHERE = "used-elsewhere"
_TOKEN = re.compile("[0-9a-f]{16}")
_ENDING = re.compile(rf"{_TOKEN.pattern}\.(?P<kind>{_LINKED}|{_ELSEWHERE})")
_LONGEST_NAME = 200
# Seconds for which a record counts that cannot be checked: another user's, or another container's.
_UNKNOWN_AGE = 30 * 86400

# QEMU locks bytes from 100 on (block/file-posix.c). These are far from them, and from any data.
_FIRST_BYTE = 1 << 40
_TO_THE_END = 0
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)

# Seconds to wait for another process that removes a file, and between two looks.
REMOVAL_LIMIT = 10.0
_LOOK_SECONDS = 0.01

LAUNCHING = "a machine that is being launched"
REMOVING = "a program that is deleting or replacing it"
RUNNING = "a machine that runs"


@dataclass(frozen=True, slots=True)
class _Record:
    """The content of a record.

    Attributes:
        disk: The disk that is built on the image, or that needs the kernel.
        record: Where the record is.
        host: The host whose paths these are.
    """

    disk: str
    record: str
    host: str

    @classmethod
    def read(cls, file: Path) -> _Record:
        """Read one.

        Raises:
            OSError: It cannot be read.
            ValueError: It is damaged.
        """
        return decode(cls, parse_json(file.read_bytes()))

    def write(self, file: Path) -> None:
        """Write it to a new file."""
        write_private(file, json.dumps(dataclasses.asdict(self)) + "\n")


@contextlib.contextmanager
def holding(*files: Path) -> Iterator[None]:
    """Keep files from being deleted or replaced in the block.

    Raises:
        FileNotFoundError: One of them is not there (any more).
    """
    with contextlib.ExitStack() as stack:
        for file in files:
            stack.enter_context(_holding(file))
        yield


@contextlib.contextmanager
def holding_image(image_id: str, image_dir: Path) -> Iterator[Path]:
    """Find the image file that an id names, and keep it from being deleted in the block.

    Raises:
        ImageNotFoundError: There is no such file (any more); says where it was looked for.
    """
    image = store.resolve(image_id, image_dir)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(holding(image))
        except FileNotFoundError:
            raise ImageNotFoundError(
                image_id, message=f"No image {image_id!r}: {image} was deleted just now"
            ) from None
        yield image


@contextlib.contextmanager
def removing(
    *files: Path,
    by_name: bool = False,
    find_more: Callable[[], Sequence[str]] = list,
    limit: float = REMOVAL_LIMIT,
) -> Iterator[None]:
    """Lock files to delete or replace them in the block; nothing begins to use them meanwhile.

    Other processes that remove them are waited for.

    Args:
        *files: An image and what belongs to it; missing ones are ignored.
        by_name: Whether the files may have other names, with users of their own.
        find_more: Finds users that no record names.
        limit: Seconds that each file is waited for.

    Raises:
        ImageInUseError: Some are in use; names the users.
    """
    with contextlib.ExitStack() as stack:
        # All processes lock in one order, so that no two wait for each other.
        places = sorted({Path(os.path.realpath(file)) for file in files})
        locks = [stack.enter_context(_excluding(place, by_name, limit)) for place in places]
        users = {user for file in files for user in find_users(file)} | set(find_more())
        # A running machine that has a record is named once.
        users = users or {user for user in locks if user is not None}
        if users:
            raise ImageInUseError(str(files[0]), sorted(users))
        yield


def record(disk: Path, files: Iterable[Path]) -> None:
    """Record that a disk is built on files, or needs them; this replaces earlier records of it.

    Where no record can be written, there is none. Another program may delete the disk meanwhile: it
    removes the records after the disk, and this function looks for the disk after it has recorded
    it. So no record is left, whichever of them is the last.
    """
    directory = _kept_with(disk)
    before = _list_kept(directory)
    for file in {Path(os.path.realpath(file)) for file in files}:
        try:
            # Without parents: those of a deleted disk must not come back.
            create_private_directory(directory, parents=False)
            _record(disk, file, directory)
        except OSError as error:
            expected = error.errno in _NOT_WRITABLE or not os.path.lexists(disk)
            level = logging.DEBUG if expected else logging.WARNING
            _log.log(level, "No record beside %s that %s uses it: %s", file, disk, error)
    for kept in before:
        _forget(kept)
    if not os.path.lexists(disk):
        forget(disk)


def is_recorded(disk: Path) -> bool:
    """Whether anything was recorded of a disk."""
    return _kept_with(disk).is_dir()


def forget(disk: Path) -> None:
    """Remove the records of a deleted disk; missing ones are no error."""
    directory = _kept_with(disk)
    for kept in _list_kept(directory):
        _forget(kept)
    with contextlib.suppress(OSError):  # there is none, or something else is in it
        directory.rmdir()


def forget_gone(directory: Path) -> None:
    """Remove the records of a directory's disks that do not exist any more."""
    for kept in directory.glob(f"*{_BESIDE}"):
        disk = kept.with_name(kept.name.removesuffix(_BESIDE))
        if not os.path.lexists(disk):
            forget(disk)


def find_users(file: Path) -> list[str]:
    """Return the recorded users of a file; delete records that are stale."""
    file = Path(os.path.realpath(file))
    users = []
    for found in _records_of(file):
        if _counts(found):
            users.append(_describe_user(found))
        else:
            with contextlib.suppress(OSError):  # another user's, or gone
                found.unlink()
    return users


def _record(disk: Path, file: Path, directory: Path) -> None:
    token = secrets.token_hex(8)
    beside = file.with_name(f"{_start(file)}{token}.{_LINKED}")
    kept = directory / token
    _Record(str(disk), str(beside), _host()).write(kept)
    try:
        try:
            os.link(kept, beside)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            beside = beside.with_name(f"{_start(file)}{token}.{_ELSEWHERE}")
            content = _Record(str(disk), str(beside), _host())
            content.write(kept)
            content.write(beside)
    except OSError:
        kept.unlink(missing_ok=True)
        raise


def _forget(kept: Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        beside = Path(_Record.read(kept).record)
        # A damaged record must not name another file.
        if kept.name in beside.name and _ENDING.search(beside.name):
            beside.unlink()
    with contextlib.suppress(FileNotFoundError):
        kept.unlink()


def _list_kept(directory: Path) -> list[Path]:
    try:
        return [file for file in directory.iterdir() if _TOKEN.fullmatch(file.name)]
    except OSError:
        return []


def _kept_with(disk: Path) -> Path:
    return disk.with_name(disk.name + _BESIDE)


def _start(file: Path) -> str:
    name = os.fsencode(file.name)
    whole = len(name) <= _LONGEST_NAME
    return f".{file.name if whole else hashlib.sha256(name).hexdigest()}."


def _records_of(file: Path) -> list[Path]:
    start = _start(file)
    try:
        beside = [*file.parent.iterdir()]
    except OSError:
        return []
    return [
        found
        for found in beside
        if found.name.startswith(start) and _ENDING.fullmatch(found.name[len(start) :])
    ]


def _counts(found: Path) -> bool:
    """Whether the disk of a record exists."""
    try:
        facts = found.lstat()
    except FileNotFoundError:
        return False
    if found.suffix == f".{_LINKED}":
        return facts.st_nlink > 1 or _was_copied(found)
    try:
        content = _Record.read(found)
        os.lstat(content.disk)
    except (FileNotFoundError, NotADirectoryError):
        if not os.path.lexists(found):
            return False
        if content.host == _host():
            return False
    except (OSError, ValueError):
        pass  # another user's, or damaged
    else:
        return True
    return time.time() - facts.st_mtime < _UNKNOWN_AGE


def _was_copied(found: Path) -> bool:
    """Whether a record and the file that it was a link of were copied as separate files.

    As `rsync -a` and `cp -r` do with a home. A copy of only the images has no users.
    """
    try:
        content = _Record.read(found)
        kept = _kept_with(Path(content.disk)) / found.name.split(".")[-2]
        return found.samefile(content.record) and os.path.lexists(kept)
    except (OSError, ValueError):
        return False


def _describe_user(found: Path) -> str:
    try:
        return Path(_Record.read(found).disk).stem
    except (OSError, ValueError):
        pass
    try:
        return f"a machine of the user {pwd.getpwuid(found.lstat().st_uid).pw_name}"
    except (OSError, KeyError):
        return "a machine of another user"


def _host() -> str:
    """Return an id of this host, or container: paths are different in others.

    Containers of one image may share a machine-id, and hosts a name.
    """
    machine_id = ""
    with contextlib.suppress(OSError, ValueError):
        machine_id = Path("/etc/machine-id").read_text(encoding="ascii").strip()
    return f"{machine_id} {socket.gethostname()}"


@contextlib.contextmanager
def _holding(file: Path) -> Iterator[None]:
    file = Path(os.path.realpath(file))
    while True:
        try:
            descriptor = moved(os.open(file, os.O_RDONLY | os.O_CLOEXEC))
        except PermissionError:
            # The error comes when it is read; it cannot be locked.
            yield
            return
        with _closing(descriptor):
            lock_bytes(descriptor, fcntl.F_RDLCK, _byte_of(file), 1, wait=True)
            # It may have been deleted before the lock was free.
            if _is_at(descriptor, file):
                yield
                return


@contextlib.contextmanager
def _excluding(file: Path, by_name: bool, limit: float) -> Iterator[str | None]:
    """Lock a file that is removed in the block; yield who uses it, as far as locks show."""
    while (descriptor := _open(file)) is not None:
        with _closing(descriptor):
            user = _exclude(descriptor, file, by_name, limit)
            # It may have been deleted or replaced before the lock was free.
            if user is not None or _is_at(descriptor, file):
                yield user
                return
    yield None


def _exclude(descriptor: int, file: Path, by_name: bool, limit: float) -> str | None:
    """Lock a file that is to be removed; return who uses it, as far as locks show."""
    try:
        start, length = (_byte_of(file), 1) if by_name else (_FIRST_BYTE, _TO_THE_END)
    except FileNotFoundError:
        return None  # removed by now, with its directory
    deadline = Deadline.after(limit)
    while True:
        locked = lock_bytes(descriptor, fcntl.F_WRLCK, start, length)
        others = find_byte_lock(descriptor, start, length)
        if others == fcntl.F_RDLCK:
            return LAUNCHING
        if locked and others == fcntl.F_UNLCK:
            break
        if deadline.expired:
            return REMOVING
        time.sleep(_LOOK_SECONDS)
    if not by_name and find_byte_lock(descriptor, 0, _FIRST_BYTE) != fcntl.F_UNLCK:
        return RUNNING
    return None


def _open(file: Path) -> int | None:
    # Only a file open for writing can be locked exclusively; to see locks, reading is enough.
    for flags in (os.O_RDWR, os.O_RDONLY):
        with contextlib.suppress(OSError):
            return moved(os.open(file, flags | os.O_CLOEXEC | os.O_NONBLOCK))
    return None


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    """Unlock and close a descriptor after the block; a child process may have it open, too."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock_bytes(descriptor, fcntl.F_UNLCK, _FIRST_BYTE, _TO_THE_END)
        os.close(descriptor)


def _byte_of(file: Path) -> int:
    """Return the byte to lock for a name of a file: each of its names has its own byte."""
    name = b"%d/%s" % (file.parent.stat().st_ino, to_bytes(file.name))
    return _FIRST_BYTE + int.from_bytes(hashlib.sha256(name).digest()[:5], "big")


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
