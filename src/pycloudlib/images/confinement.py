"""Host programs run as root of a small world of their own, which ends with its last program.

Installing packages needs root, mounts and many processes. All of that happens in mount and process
namespaces; an ordinary user gets a user namespace too, in which they are root. The kernel takes
such a world down, with its mounts and whatever still runs in it, as soon as its first process
ends. A lifeline makes that process end with its owner: standard input is a pipe that the owner
holds, and nothing but the owner's end, SIGKILL included, makes it reach its end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pycloudlib.errors import MissingPrerequisiteError, ToolError
from pycloudlib.tools import run_tool_streaming

# `kill -1` reaches every process of the namespace but its first, which then has nothing left to
# wait for. File descriptors 3 to 8 are the caller's to pass, and those from 20.
_LIFELINE = """\
umask 022
exec 9<&0 </dev/null
{ read -r _; kill -KILL -1; } <&9 &
exec 9<&-
"$@"
status=$?
exit $status
"""

_ROOT_HINT = (
    "root needs the privilege to make mounts (CAP_SYS_ADMIN), which most containers withhold; "
    "run the container with it or build outside"
)
_USER_HINT = (
    "building as an ordinary user needs user namespaces: install the package 'uidmap', give the "
    "user ranges in /etc/subuid and /etc/subgid (usermod --add-subuids 100000-165535 "
    "--add-subgids 100000-165535 USER), and see that the settings "
    "kernel.unprivileged_userns_clone=0 and user.max_user_namespaces=0 are not in force; "
    "or build as root"
)


def is_root() -> bool:
    """Tell whether this process is root, so that no user namespace is needed."""
    return os.geteuid() == 0


def list_prerequisites() -> tuple[str, ...]:
    """Name the programs that `run_confined` needs."""
    if is_root():
        return ("unshare",)
    return ("mmdebstrap", "newuidmap", "newgidmap")


def run_confined(
    step: str,
    argv: Sequence[str | Path],
    *,
    on_line: Callable[[str], None] = lambda _line: None,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> None:
    """Run a program as root in namespaces of its own; nothing of it is left afterwards.

    Files it makes belong to root; for an ordinary user outside they belong to the first of the
    user's subordinate ids, and it reaches files of theirs through `pass_fds` only.

    Raises:
        ToolError: It ended with an error.
    """
    run_tool_streaming(
        step,
        [*_entry(), "sh", "-c", _LIFELINE, "sh", *argv],
        on_line=on_line,
        env=env,
        pass_fds=pass_fds,
        ends_with_stdin=True,
    )


def _entry() -> tuple[str, ...]:
    if is_root():
        return ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
    # Not unshare(1): mapping a range of ids is new in it, and Ubuntu's AppArmor lets mmdebstrap
    # make user namespaces where it forbids unshare to.
    return ("mmdebstrap", "--unshare-helper")


def check_confinement() -> None:
    """See that this host lets this user make such a world.

    Raises:
        MissingPrerequisiteError: It does not; says what to do.
    """
    try:
        run_confined("making namespaces", ("mount", "-t", "tmpfs", "tmpfs", "/tmp"))  # noqa: S108
    except ToolError as error:
        hint = _ROOT_HINT if is_root() else _USER_HINT
        raise MissingPrerequisiteError(f"Cannot install packages here: {hint}. {error}") from error
