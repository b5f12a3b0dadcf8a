"""Locks among threads and processes: each ends with its block, and with its process.

A lock is the kernel's (flock(2)) on a separate file. The kernel holds it for as long as any process
has the file open, and a fork copies that: a lock that is only closed stays held by every child that
another thread has started meanwhile. So it is unlocked before it is closed, and forked children
close their copies. Executed programs inherit none, except a directory's lock that is passed to them
on purpose. Single bytes of any file can be locked as well, which only open descriptors hold.

A lock of Python's `threading` that another thread holds at the moment of a fork stays held in the
child for ever. Objects that a child may use have their locks renewed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import struct
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.documents import escape_line, from_bytes, to_bytes
from pycloudlib._base.files import is_shared_with_group, moved, opener
from pycloudlib.errors import CloudSetupError

_log = logging.getLogger(__name__)

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
# Seconds: a wait that takes longer says who holds the lock.
REPORT_AFTER = 5.0
# flock(2) has no limit of time.
_LOOK_SECONDS = 0.05
_NOTE_LIMIT = 200  # bytes

# struct flock of Linux on x86-64: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")
_NO_LOCKS = (errno.ENOLCK, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)

# The locks that have a file open, or are about to. No lock of Python's guards it, since a Ctrl-C or
# a fork could leave that held; each step is atomic in the interpreter.
_opened: dict[int, weakref.ref[_Lock]] = {}
# The objects whose Python locks are renewed in forked children, and what makes each lock.
_Makers = dict[str, Callable[[], object]]
_renewed: list[tuple[weakref.ref[object], _Makers]] = []


class _Lock:
    """One lock, from its wait to its end.

    A class, not a generator: so there is no moment in which a Ctrl-C leaves the lock held, but
    outside of the block.

    Args:
        path: The lock's file, or a directory.
        on_wait: Called with who holds it, when it is not free.
        deadline: When to stop waiting; None to wait for ever.
        remove: Whether the file goes with the lock.
    """

    _descriptor = -1
    _thread: int | None = None  # which one holds it

    def __init__(
        self,
        path: Path,
        *,
        on_wait: Callable[[str], None] | None = None,
        deadline: Deadline | None = None,
        remove: bool = False,
        report_after: float = REPORT_AFTER,
    ) -> None:
        self._path = path
        self._report_after = report_after
        self._on_wait = on_wait
        self._deadline = deadline
        self._remove = remove

    def _open(self) -> int:
        if not is_shared_with_group(self._path.parent):
            return moved(os.open(self._path, _FLAGS, 0o600))
        # All members of the group can lock it, whatever their umask.
        descriptor = moved(os.open(self._path, _FLAGS, 0o660))
        with contextlib.suppress(PermissionError):  # another member's
            os.fchmod(descriptor, 0o660)
        return descriptor

    def acquire(self) -> bool:
        """Wait for the lock; return whether it is held now."""
        try:
            while True:
                _opened[id(self)] = weakref.ref(self)  # first, so that a fork meanwhile knows of it
                self._descriptor = self._open()
                if not self._lock():
                    self.release()
                    return False
                if self._is_in_place():
                    self._thread = threading.get_ident()
                    self._note_holder()
                    return True
                self.release()  # removed while this one waited: the lock is another file now
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """End the lock; without effect when it is not held, and in a forked child."""
        try:
            if self._thread is not None:
                self._leave_file()
        finally:
            self._thread = None
            try:
                if self._descriptor >= 0:
                    with contextlib.suppress(OSError):
                        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            finally:
                self._close()

    def abandon(self) -> None:
        """Close the file in a forked child, whose parent keeps the lock."""
        if self._descriptor < 0:  # the fork came when it was just opened
            self._close_all_of(self._path)
        self._thread = None
        self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            # In one step, which no Ctrl-C can divide; then the class's -1 counts.
            os.close(self.__dict__.pop("_descriptor"))
        _opened.pop(id(self), None)

    @staticmethod
    def _close_all_of(path: Path) -> None:
        file = path.stat()
        for entry in list(Path("/proc/self/fd").iterdir()):
            with contextlib.suppress(OSError):  # the one that lists them
                if os.path.samestat(file, entry.stat()):
                    os.close(int(entry.name))

    def __del__(self) -> None:
        self.release()

    def _lock(self) -> bool:
        if self._try():
            return True
        if self._deadline is not None:
            while not self._deadline.expired:
                time.sleep(self._deadline.capped(_LOOK_SECONDS))
                if self._try():
                    return True
            return False
        self._refuse_deadlock()
        if self._on_wait is not None:
            self._on_wait(self._holder())
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            return True
        report = threading.Timer(self._report_after, self._report)
        report.daemon = True
        try:
            report.start()
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        finally:
            report.cancel()
        return True

    def _try(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise CloudSetupError(
                f"{self._path} cannot be locked ({error.strerror}): the file system of "
                f"{self._path.parent} has to support locks (flock)"
            ) from error
        return True

    def _refuse_deadlock(self) -> None:
        """Raise an error instead of a wait for a lock that this very thread holds."""
        mine = os.fstat(self._descriptor)
        for reference in list(_opened.values()):
            other = reference()
            if other is None or other._thread != threading.get_ident():
                continue
            if os.path.samestat(mine, os.fstat(other._descriptor)):
                raise RuntimeError(f"{self._path} is locked already by the same thread")

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._path.stat())
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _note_holder(self) -> None:
        program = Path(sys.argv[0]).name if sys.argv else ""
        note = f"{os.getpid()} {os.uname().nodename} {program}"
        with contextlib.suppress(OSError):  # a full disk: others wait without knowing for whom
            os.pwrite(self._descriptor, to_bytes(note)[:_NOTE_LIMIT] + b"\n", 0)

    def _leave_file(self) -> None:
        with contextlib.suppress(OSError):
            if self._remove:
                self._path.unlink()
            else:
                os.ftruncate(self._descriptor, 0)

    def _holder(self) -> str:
        """Describe who holds the lock, as noted in the file."""
        try:
            with open(self._path, "rb", opener=opener) as file:
                note, _, _ = from_bytes(file.read(_NOTE_LIMIT)).partition("\n")
        except OSError:  # a directory, or removed by now
            note = ""
        pid, _, rest = note.partition(" ")
        host, _, program = rest.partition(" ")
        if not pid.isdecimal():
            return "another process"
        if host != os.uname().nodename:
            return escape_line(f"process {pid} ({program}) on {host}")
        if int(pid) == os.getpid():
            return "another thread of this process"
        return escape_line(f"process {pid} ({program})")

    def _report(self) -> None:
        _log.warning("Still waiting for %s, which holds %s", self._holder(), self._path)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.release()
        except BaseException:
            self.release()  # a Ctrl-C came in the middle
            raise


class _ExclusiveLock(_Lock):
    def __enter__(self) -> None:
        self.acquire()


class _AttemptedLock(_Lock):
    def __enter__(self) -> bool:
        return self.acquire()


class _DirectoryLock(_Lock):
    def _open(self) -> int:
        opened = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Above the numbers that shells use for themselves.
            return fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, 100)
        finally:
            os.close(opened)

    def __enter__(self) -> int:
        self.acquire()
        return self._descriptor


def exclusive_lock(
    path: Path,
    on_wait: Callable[[str], None] | None = None,
    *,
    remove: bool = False,
    report_after: float = REPORT_AFTER,
) -> contextlib.AbstractContextManager[None]:
    """Hold a lock that other threads and processes wait for, inside a block.

    The holder may remove the file. Without `on_wait`, a long wait is logged.

    Args:
        path: The lock's file; made when missing.
        on_wait: Called when the lock is not free, with who holds it ("process 4711 (pytest)").
        remove: Whether the file is removed with the lock.
        report_after: Seconds after which a wait is logged.

    Raises:
        FileNotFoundError: The file's directory does not exist.
        CloudSetupError: The file system has no locks.
        RuntimeError: The same thread holds this lock already.
    """
    return _ExclusiveLock(path, on_wait=on_wait, remove=remove, report_after=report_after)


def try_lock(
    path: Path, deadline: Deadline | None = None
) -> contextlib.AbstractContextManager[bool]:
    """Hold a lock of `exclusive_lock` if it is free, inside a block that gets whether it is held.

    Args:
        path: The lock's file; made when missing.
        deadline: How long to wait for it; by default not at all.

    Raises:
        FileNotFoundError: The file's directory does not exist.
        CloudSetupError: The file system has no locks.
    """
    return _AttemptedLock(path, deadline=deadline or Deadline.after(0))


def directory_lock(directory: Path) -> contextlib.AbstractContextManager[int]:
    """Hold the lock of a directory, inside a block that gets the directory's descriptor.

    Programs that are given the descriptor keep the lock if this process is killed.

    Raises:
        FileNotFoundError: The directory does not exist.
        CloudSetupError: The file system has no locks.
        RuntimeError: The same thread holds this lock already.
    """
    return _DirectoryLock(directory)


def is_locked(path: Path) -> bool:
    """Whether a lock of `exclusive_lock` is held; its file is not made for that."""
    try:
        descriptor = moved(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
    except FileNotFoundError:
        return False
    try:
        # Shared, so that two processes that look do not disturb each other.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def lock_bytes(descriptor: int, kind: int, start: int, length: int, *, wait: bool = False) -> bool:
    """Lock bytes of an open file (fcntl(2), OFD), or unlock them; False if others hold a lock.

    Args:
        descriptor: The open file, which holds the lock.
        kind: F_RDLCK, which several may hold, F_WRLCK or F_UNLCK.
        start: The first byte; it need not exist.
        length: How many bytes; 0 for all that follow.
        wait: Whether to wait while others hold a lock.
    """
    command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
    try:
        fcntl.fcntl(descriptor, command, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        # The file system has no such locks.
        if error.errno not in _NO_LOCKS:
            raise
    return True


def find_byte_lock(descriptor: int, start: int, length: int) -> int:
    """Return the kind of lock that others hold on bytes of an open file: F_UNLCK for none."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    try:
        return int(_FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))[0])
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return fcntl.F_UNLCK


def renew_in_children(owner: object, **makers: Callable[[], object]) -> None:
    """Renew an object's Python locks in forked children.

    Args:
        owner: The object; one that can be referred to weakly.
        **makers: What makes each lock (`threading.Condition`), by the name of its attribute.
    """
    _renewed[:] = [known for known in _renewed if known[0]() is not None]
    _renewed.append((weakref.ref(owner), makers))


def _renew_locks() -> None:
    for reference, makers in list(_renewed):
        owner = reference()
        for name, make in makers.items() if owner is not None else ():
            setattr(owner, name, make())


def _leave_locks_to_parent() -> None:
    for reference in list(_opened.values()):
        lock = reference()
        if lock is not None:
            with contextlib.suppress(OSError):
                lock.abandon()


os.register_at_fork(after_in_child=_renew_locks)
os.register_at_fork(after_in_child=_leave_locks_to_parent)
