"""Which program owns a machine or a file, and what happens to it when that program has ended.

Everything that a program makes, and that outlives a function, has a file beside it with the
identity of its owner. A program that ends normally records there that it has left the thing on
purpose. So what a dead program did not leave on purpose can be recognized at any time.
"""

from __future__ import annotations

import atexit
import contextlib
import enum
import errno
import json
import logging
import os
import re
import secrets
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from pycloudlib._base import tools
from pycloudlib._base.documents import decode, parse_json
from pycloudlib._base.files import (
    create_private_directory,
    make_pipe,
    moved,
    replace_atomically,
    write_private,
)
from pycloudlib._base.locks import directory_lock
from pycloudlib.qemu.host.processes import ProcessIdentity, ProcessRecord, World

_log = logging.getLogger(__name__)

OWNER_SUFFIX = ".owner"
"""The name of the file that records the owner of a directory; its suffix for that of a file."""
NORMAL_END = b"normal end"
"""What the guardian receives when the program ends by itself."""

_MARK = "PYCLOUDLIB_OWNER"
_STAGED = re.compile(rf"\..+\.(?P<pid>[0-9]+)-(?P<start>[0-9]+)(-(?P<world>{World.PATTERN}))?\.new")


@enum.unique
class Orphans(enum.Enum):
    """What happens to a program's machines when it ends without deleting them."""

    REAP_AFTER_CRASH = "reap-after-crash"
    """They live on when it ends normally, and end with it when it is killed or crashes."""
    KEEP = "keep"
    """They live on."""
    REAP = "reap"
    """They end with it, however it ends."""


@dataclass(frozen=True, slots=True)
class _Record:
    """An `Ownership` as it is stored; its process is stored as a `ProcessRecord`."""

    pid: int
    start: int
    orphans: Orphans
    left: bool
    world: str | None = None
    host: str = ""


@dataclass(frozen=True, slots=True)
class Ownership:
    """Which program owns something.

    Attributes:
        process: The program that made it; of a machine, the one that started it last.
        orphans: What happens to it when the program ends.
        left: Whether the program has ended normally, and left it on purpose.
    """

    process: ProcessIdentity
    orphans: Orphans
    left: bool = False

    @property
    def is_orphaned(self) -> bool:
        """Whether its owner is dead and has not left it on purpose."""
        if self.orphans is Orphans.KEEP or self.process.alive:
            return False
        return self.orphans is Orphans.REAP or not self.left

    @classmethod
    def find(cls, owned: Path) -> Ownership | None:
        """Read who owns something; None if no owner is known."""
        try:
            record = decode(_Record, parse_json(owner_file(owned).read_bytes()))
            process = ProcessRecord(record.pid, record.start, record.world, record.host).identity()
        except (OSError, ValueError):
            return None
        return cls(process, record.orphans, record.left)

    def write(self, owned: Path) -> None:
        """Record who owns something."""
        facts = {
            **self.process.to_plain(),
            "orphans": self.orphans.value,
            "left": self.left,
        }
        with replace_atomically(owner_file(owned), synced=False) as temporary:
            write_private(temporary, json.dumps(facts) + "\n")


def owner_file(owned: Path) -> Path:
    """Return the path of the file that records the owner: in a directory, or beside a file."""
    return (
        owned / OWNER_SUFFIX if owned.is_dir() else owned.with_name(f"{owned.name}{OWNER_SUFFIX}")
    )


def claim(owned: Path, orphans: Orphans) -> None:
    """Record that this program owns something."""
    with changing_record(owned):
        Ownership(ProcessIdentity.own(), orphans).write(owned)
    register(owned)


def disown(image: Path) -> None:
    """Remove the record of an image's owner, if there is one, since the image is deleted.

    Its owner may end just now, and change the record.
    """
    with contextlib.suppress(FileNotFoundError), changing_record(image):
        owner_file(image).unlink(missing_ok=True)


def changing_record(owned: Path) -> contextlib.AbstractContextManager[int]:
    """Keep other programs from changing the record of an owner inside the block."""
    return directory_lock(owner_file(owned).parent)


def create_owned_directory(path: Path, orphans: Orphans) -> Path:
    """Make a private directory, and its parent; it has this program as its owner from the start.

    Raises:
        FileExistsError: The path exists already.
        CloudSetupError: The parent is not this user's own.
    """
    me = ProcessIdentity.own()
    staged = path.with_name(f".{path.name}.{me.pid}-{me.start_time}-{me.world}.new")
    while True:
        create_private_directory(path.parent)
        # Another process may remove the empty parent just now.
        with contextlib.suppress(FileNotFoundError):
            staged.mkdir(mode=0o700)
            break
    try:
        Ownership(me, orphans).write(staged)
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        staged.rename(path)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    register(path)
    return path


def is_abandoned(path: Path) -> bool:
    """Whether a program began to make this directory, and died before it was done."""
    found = _STAGED.fullmatch(path.name)
    if found is None:
        return False
    world = None if found["world"] is None else World.parse(found["world"])
    return not ProcessIdentity(int(found["pid"]), int(found["start"]), world).alive


def at_normal_end(work: Callable[[], None]) -> None:
    """Call a function when this program ends by itself, even with an error, but is not killed.

    A worker of `multiprocessing` does not run the functions of `atexit`.
    """
    atexit.register(work)
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        util.Finalize(None, work, exitpriority=-1)


_owned: set[Path] = set()
_registered_by: int | None = None


def register(owned: Path) -> None:
    """Have a normal end of this program record that it has left something on purpose."""
    global _registered_by  # noqa: PLW0603 - one for each process
    if _registered_by != os.getpid():
        _registered_by = os.getpid()
        _owned.clear()  # a forked child does not own what its parent does
        at_normal_end(leave_all)
    _owned.add(owned)


def leave_all() -> None:
    """Record, at a normal end, that all that is left is left on purpose."""
    if _registered_by != os.getpid():
        return
    me = ProcessIdentity.own()
    while _owned:
        owned = _owned.pop()
        if not owner_file(owned).exists():
            continue  # it has been removed
        with contextlib.suppress(OSError), changing_record(owned):  # another process may remove it
            found = Ownership.find(owned)
            # Another program may own it by now.
            if found is not None and found.process == me and not found.left:
                Ownership(me, found.orphans, left=True).write(owned)


@dataclass(frozen=True, slots=True)
class Guardian:
    """The process that watches this one, and ends its machines if it dies.

    Attributes:
        owner: The pid of this process.
        pid: The pid of the guardian.
        lifeline: Our end of the pipe.
        token: The mark of our machines.
    """

    owner: int
    pid: int
    lifeline: int
    token: str

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        try:
            return os.waitpid(self.pid, os.WNOHANG) == (0, 0)
        except ChildProcessError:  # another function waited for all children
            return ProcessIdentity.find(self.pid) is not None

    def dismiss(self) -> None:
        """Report a normal end to it."""
        with contextlib.suppress(OSError):
            os.write(self.lifeline, NORMAL_END)


_lock = threading.Lock()
_guardian: Guardian | None = None


def environment(orphans: Orphans) -> dict[str, str]:
    """Return the environment of a QEMU that belongs to this program.

    Args:
        orphans: What happens to it when the program ends.
    """
    if orphans is Orphans.KEEP:
        return tools.environment()
    return {**tools.environment(), _MARK: f"{find_guardian().token} {orphans.value}"}


def find_guardian() -> Guardian:
    """Return the guardian of this process; start one if none runs."""
    global _guardian  # noqa: PLW0603 - one for each process
    with _lock:
        if _guardian is None or not _guardian.alive:
            earlier = _guardian
            _guardian = _start(secrets.token_hex(16) if earlier is None else earlier.token)
            if earlier is None:
                at_normal_end(_dismiss)
            else:
                os.close(earlier.lifeline)
        return _guardian


def _start(token: str) -> Guardian:
    program = resources.files(__package__).joinpath("guardian_program.py").read_text("utf-8")
    with contextlib.ExitStack() as closing, contextlib.ExitStack() as undo:
        theirs, ours = make_pipe()
        closing.callback(os.close, theirs)
        undo.callback(os.close, ours)
        # It identifies this process in any PID namespace.
        me = moved(os.pidfd_open(os.getpid()))
        closing.callback(os.close, me)
        # Popen would warn at the end of a program that has not waited for it.
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-IS", "-c", program, str(os.getpid()), token],
            tools.environment(),
            file_actions=[
                (os.POSIX_SPAWN_DUP2, theirs, 0),
                (os.POSIX_SPAWN_DUP2, me, 3),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
        undo.pop_all()
    _log.debug("Process %d ends the machines of this program with it", pid)
    return Guardian(os.getpid(), pid, ours, token)


def _dismiss() -> None:
    if _guardian is not None and _guardian.owner == os.getpid():
        _guardian.dismiss()


def _forget_guardian() -> None:
    """Drop the guardian of the parent in a forked child."""
    global _guardian, _lock
    if _guardian is not None:
        os.close(_guardian.lifeline)
    _guardian, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_guardian)
