"""Sees to it that machines end with a program that dies: a small process that watches it.

One for each program that has machines, from the first one on; it ends with the program. It is told
of a normal end by a pipe, and of any end by the kernel (pidfd). The QEMUs of the program it knows
by a mark in their environment, which they have from their first moment: so there is none that it
could miss, not even one that was started in the very moment in which the program died.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import threading
from dataclasses import dataclass
from importlib import resources

from pycloudlib import tools
from pycloudlib.descriptors import make_pipe, moved
from pycloudlib.qemu.identity import ProcessIdentity
from pycloudlib.qemu.ownership import Orphans, at_normal_end

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
