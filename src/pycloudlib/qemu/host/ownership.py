"""Which program a machine belongs to, and what becomes of it when that program is no more.

Whatever a program makes that outlives a function has a file beside it that names the program: its
process identity. A program that ends normally notes there that it has left the thing behind on
purpose. So what a dead program did not leave on purpose can be told from all else, at any time.
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
from pycloudlib.qemu.host.processes import NotedProcess, ProcessIdentity, World

OWNER_SUFFIX = ".owner"
"""How the file that tells whom something belongs to is called, or ends."""
_STAGED = re.compile(rf"\..+\.(?P<pid>[0-9]+)-(?P<start>[0-9]+)(-(?P<world>{World.PATTERN}))?\.new")


@enum.unique
class Orphans(enum.Enum):
    """What becomes of a program's machines when it ends without deleting them."""

    REAP_AFTER_CRASH = "reap-after-crash"
    """They live on when it ends normally, and end with it when it is killed or crashes."""
    KEEP = "keep"
    """They live on."""
    REAP = "reap"
    """They end with it, however it ends."""


@dataclass(frozen=True, slots=True)
class _Note:
    """An `Ownership` as it is written down; its first lines are a `NotedProcess`."""

    pid: int
    start: int
    orphans: Orphans
    left: bool
    world: str | None = None
    host: str = ""


@dataclass(frozen=True, slots=True)
class Ownership:
    """Which program something belongs to.

    Attributes:
        process: The program that made it or, of a machine, that started it last.
        orphans: What becomes of it when the program ends.
        left: Whether the program has ended normally and left it behind.
    """

    process: ProcessIdentity
    orphans: Orphans
    left: bool = False

    @property
    def is_over(self) -> bool:
        """Whether nobody is to have it any more."""
        if self.orphans is Orphans.KEEP or self.process.alive:
            return False
        return self.orphans is Orphans.REAP or not self.left

    @classmethod
    def find(cls, owned: Path) -> Ownership | None:
        """Read whom something belongs to; None of what is not known to belong to anybody."""
        try:
            noted = decode(_Note, parse_json(owner_file(owned).read_bytes()))
            process = NotedProcess(noted.pid, noted.start, noted.world, noted.host).identity()
        except (OSError, ValueError):
            return None
        return cls(process, noted.orphans, noted.left)

    def write(self, owned: Path) -> None:
        """Note whom something belongs to."""
        facts = {
            **self.process.to_plain(),
            "orphans": self.orphans.value,
            "left": self.left,
        }
        with replace_atomically(owner_file(owned), synced=False) as temporary:
            write_private(temporary, json.dumps(facts) + "\n")


def owner_file(owned: Path) -> Path:
    """Name the file that tells whom something belongs to: in a directory, or beside a file."""
    return (
        owned / OWNER_SUFFIX if owned.is_dir() else owned.with_name(f"{owned.name}{OWNER_SUFFIX}")
    )


def claim(owned: Path, orphans: Orphans) -> None:
    """Note that something belongs to this program."""
    with _changing_note(owned):
        Ownership(ProcessIdentity.own(), orphans).write(owned)
    _register(owned)


def disown(image: Path) -> None:
    """Remove the note of whose an image is, which is deleted; that there is none is no error.

    The program that made it may end just now, and change the note.
    """
    with contextlib.suppress(FileNotFoundError), _changing_note(image):
        owner_file(image).unlink(missing_ok=True)


def _changing_note(owned: Path) -> contextlib.AbstractContextManager[int]:
    """Keep other programs from changing whose something is, for a moment."""
    return directory_lock(owner_file(owned).parent)


def create_owned_directory(path: Path, orphans: Orphans) -> Path:
    """Make a new private directory, and its parent, that belongs to this program at any moment.

    Raises:
        FileExistsError: There is something of that name.
        CloudSetupError: The parent is not this user's own.
    """
    me = ProcessIdentity.own()
    staged = path.with_name(f".{path.name}.{me.pid}-{me.start_time}-{me.world}.new")
    while True:
        create_private_directory(path.parent)
        # Another process may remove the parent, which it finds empty, just now.
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
    _register(path)
    return path


def is_cut_off(path: Path) -> bool:
    """Say whether a directory was being made by a program that is no more."""
    found = _STAGED.fullmatch(path.name)
    if found is None:
        return False
    world = None if found["world"] is None else World.parse(found["world"])
    return not ProcessIdentity(int(found["pid"]), int(found["start"]), world).alive


def at_normal_end(work: Callable[[], None]) -> None:
    """Have something done when this program ends by itself, with an error even.

    Not when it is killed. A worker of `multiprocessing` ends without what `atexit` does.
    """
    atexit.register(work)
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        util.Finalize(None, work, exitpriority=-1)


_owned: set[Path] = set()
_registered_by: int | None = None


def _register(owned: Path) -> None:
    global _registered_by  # noqa: PLW0603 - it is the process's own
    if _registered_by != os.getpid():
        _registered_by = os.getpid()
        _owned.clear()  # a forked child has no part in what its parent owns
        at_normal_end(_leave)
    _owned.add(owned)


def _leave() -> None:
    """Note, at a normal end, that what is left is left on purpose."""
    if _registered_by != os.getpid():
        return
    me = ProcessIdentity.own()
    while _owned:
        owned = _owned.pop()
        if not owner_file(owned).exists():
            continue  # it is removed by now
        with contextlib.suppress(OSError), _changing_note(owned):  # it may be being removed
            found = Ownership.find(owned)
            # Another program may have it by now.
            if found is not None and found.process == me and not found.left:
                Ownership(me, found.orphans, left=True).write(owned)


_log = logging.getLogger(__name__)

_MARK = "PYCLOUDLIB_OWNER"
NORMAL_END = b"normal end"
"""What the guardian reads when the program ends by itself."""


@dataclass(frozen=True, slots=True)
class Guardian:
    """The process that watches this one.

    Attributes:
        owner: The pid of this process.
        pid: Its own.
        lifeline: Our end of the pipe.
        token: By which it knows our machines.
    """

    owner: int
    pid: int
    lifeline: int
    token: str

    @property
    def alive(self) -> bool:
        """Whether it runs still."""
        try:
            return os.waitpid(self.pid, os.WNOHANG) == (0, 0)
        except ChildProcessError:  # somebody has waited for all children of this process
            return ProcessIdentity.find(self.pid) is not None

    def dismiss(self) -> None:
        """Tell it of a normal end."""
        with contextlib.suppress(OSError):
            os.write(self.lifeline, NORMAL_END)


_lock = threading.Lock()
_guardian: Guardian | None = None


def environment(orphans: Orphans) -> dict[str, str]:
    """Return the environment of a QEMU that belongs to this program.

    Args:
        orphans: What becomes of it when the program ends.
    """
    if orphans is Orphans.KEEP:
        return tools.environment()
    return {**tools.environment(), _MARK: f"{_find_guardian().token} {orphans.value}"}


def _find_guardian() -> Guardian:
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
        # It means this process whatever PID namespace it is looked at in.
        me = moved(os.pidfd_open(os.getpid()))
        closing.callback(os.close, me)
        # No Popen: that would complain at the end of a program that does not wait for it.
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
    _log.debug("Process %d sees to it that machines end with this program", pid)
    return Guardian(os.getpid(), pid, ours, token)


def _dismiss() -> None:
    if _guardian is not None and _guardian.owner == os.getpid():
        _guardian.dismiss()


def _begin_anew() -> None:
    """Forget, in a forked child, the guardian of its parent."""
    global _guardian, _lock
    if _guardian is not None:
        os.close(_guardian.lifeline)
    _guardian, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_begin_anew)
