"""Programs of the host: found, run, confined; a failure carries what they printed."""

from __future__ import annotations

import collections
import contextlib
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pycloudlib.errors import MissingPrerequisiteError, ToolError

_T = TypeVar("_T")

PACKAGES = {
    "gpgv": "gpgv",
    "grub-mkimage": "grub-common",
    "mke2fs": "e2fsprogs",
    "mkfs.vfat": "dosfstools",
    "mmdebstrap": "mmdebstrap",
    "newgidmap": "uidmap",
    "newuidmap": "uidmap",
    "prlimit": "util-linux",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "setpriv": "util-linux",
    "sfdisk": "fdisk",
    "ssh": "openssh-client",
    "unshare": "util-linux",
}
"""The Debian and Ubuntu package of each program."""

# prlimit(1): what a program that reads others' data may use.
_LIMITS = (f"--as={4 << 30}", "--cpu=120")
_KEPT_LINES = 200
_GRACE_SECONDS = 10.0

# Where administrators' programs live; an ordinary user's PATH on Debian leaves them out.
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")

# What a program may need to run at all: paths, user, language, and, for a QEMU with a window or
# sound, how to reach the desktop. Everything else is the caller's own: tokens of a CI service,
# passwords, settings of other programs.
_PASSED_ON = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|LC_\w+|LOCPATH|LOCALE_ARCHIVE|TZ|TZDIR|TMPDIR"
    r"|LD_LIBRARY_PATH|LD_PRELOAD|NIX_LD(?:_LIBRARY_PATH)?|GLIBC_TUNABLES|MALLOC_\w+"
    r"|(?:A|L|UB|T)SAN_OPTIONS|SSL_CERT_(?:FILE|DIR)|XDG_\w+_(?:DIRS?|HOME)"
    r"|QEMU_MODULE_DIR|QEMU_(?:AUDIO|ALSA|OSS|PA|SDL)_\w+"
    r"|DISPLAY|WAYLAND_DISPLAY|XAUTHORITY|ICEAUTHORITY|DBUS_SESSION_BUS_ADDRESS"
    r"|(?:SDL|GDK|GTK|PULSE|PIPEWIRE|LIBGL|MESA|__EGL|__GLX)_\w+"
)
# For those that fetch something; a proxy's address may have a password in it.
_FOR_DOWNLOADS = re.compile(r"(?:https?|ftp|all|no)_proxy|APT_CONFIG", re.IGNORECASE)

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


def environment(*, downloads: bool = False, agent: bool = False) -> dict[str, str]:
    """Return the environment for programs of the host: what they need of this process's own.

    Args:
        downloads: Whether the program fetches something, and needs to know the proxies.
        agent: Whether the program logs in, and may ask the SSH agent.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if _PASSED_ON.fullmatch(name)
        or (downloads and _FOR_DOWNLOADS.fullmatch(name))
        or (agent and name == "SSH_AUTH_SOCK")
    }


def find_tool(name: str) -> Path:
    """Find a host program by name or path.

    Raises:
        MissingPrerequisiteError: It is not there, or is not executable; names it and its package.
    """
    found = shutil.which(name, path=_search_path())
    if found is None:
        package = PACKAGES.get(Path(name).name)
        hint = f"; on Debian and Ubuntu install the package {package!r}" if package else ""
        passed_over = shutil.which(name)
        if passed_over is not None:
            hint += f" ({passed_over!r} is passed over: that entry of PATH is relative)"
        raise MissingPrerequisiteError(f"The program {name!r} was not found{hint}")
    return Path(found)


def _search_path() -> str:
    # An empty entry, or a relative one, would let the directory that a program runs in choose what
    # checks signatures and what runs machines.
    named = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join((*filter(os.path.isabs, named), *_SBIN))


def run_tool(
    step: str,
    argv: Sequence[str | Path],
    *,
    input_bytes: bytes = b"",
    accepted: Sequence[int] = (0,),
    bounded: bool = False,
) -> subprocess.CompletedProcess[bytes]:
    """Run a short host program to its end.

    Args:
        step: The purpose, for the error.
        argv: The program, as `find_tool` finds it, and its arguments.
        input_bytes: What it reads on standard input; nothing by default.
        accepted: The exit statuses that are no error.
        bounded: Whether it reads data of others: it may then use at most 4 GiB of address space and
            two minutes of processor time.

    Returns:
        The finished process with its `stdout` and `stderr` as bytes.

    Raises:
        MissingPrerequisiteError: The program is not installed.
        ToolError: It ended with an error.
    """
    command = _command(argv)
    limits = [str(find_tool("prlimit")), *_LIMITS, "--"] if bounded else []
    finished = subprocess.run(
        [*limits, *command],
        capture_output=True,
        check=False,
        env=environment(),
        input=input_bytes,
    )
    if finished.returncode not in accepted:
        output = (finished.stderr + finished.stdout).decode(errors="replace")
        raise ToolError(step, command, finished.returncode, output)
    return finished


def _command(argv: Sequence[str | Path]) -> list[str]:
    return [str(find_tool(str(argv[0]))), *map(str, argv[1:])]


def run_tool_streaming(
    step: str,
    argv: Sequence[str | Path],
    *,
    on_line: Callable[[str], None],
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    ends_with_stdin: bool = False,
) -> None:
    """Run a long host program to its end, passing on each line it prints.

    The program does not outlive this call, also when `on_line` raises, on Ctrl-C, and when this
    process is killed.

    Args:
        step: The purpose, for the error.
        argv: The program, as `find_tool` finds it, and its arguments.
        on_line: Called with each line of its output and of its errors, as they come.
        env: Environment variables beside those that every program gets, see `environment`.
        pass_fds: File descriptors that it inherits.
        ends_with_stdin: Whether the program ends itself, and all that it has started, once its
            standard input ends; any other program is killed.

    Raises:
        MissingPrerequisiteError: The program is not installed.
        ToolError: It ended with an error.
    """
    command = _command(argv)
    # The kernel sends the signal when the thread that started the program ends: it waits below.
    guard = [] if ends_with_stdin else [str(find_tool("setpriv")), "--pdeathsig", "KILL", "--"]
    process = subprocess.Popen(
        [*guard, *command],
        cwd="/",
        env={**environment(), "PATH": _search_path(), **(env or {})},
        encoding="utf-8",
        errors="replace",
        pass_fds=pass_fds,
        start_new_session=True,  # a Ctrl-C is for this process alone
        stderr=subprocess.STDOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    tail: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
    with _ended(process, gently=ends_with_stdin):
        for line in map(str.strip, process.stdout or ()):
            if line:
                tail.append(line)
                on_line(line)
    if process.returncode != 0:
        raise ToolError(step, command, process.returncode, "\n".join(tail))


@contextlib.contextmanager
def _ended(process: subprocess.Popen[str], *, gently: bool) -> Iterator[None]:
    """Wait for a process at the end of the block; end it when the block raises."""
    with process:  # closes the pipes and waits
        try:
            yield
            process.wait()
        except BaseException:
            if gently and process.stdin is not None:
                process.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE_SECONDS)
            process.kill()
            raise


def is_root() -> bool:
    """Whether this process is root, so that no user namespace is needed."""
    return os.geteuid() == 0


def list_prerequisites() -> tuple[str, ...]:
    """Return the programs that `run_confined` needs."""
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
    """Run a program as root in separate namespaces; no process of it is left afterwards.

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
    """Check that this host lets this user make such namespaces.

    Raises:
        MissingPrerequisiteError: It does not; says what to do.
    """
    try:
        run_confined("making namespaces", ("mount", "-t", "tmpfs", "tmpfs", "/tmp"))  # noqa: S108
    except ToolError as error:
        hint = _ROOT_HINT if is_root() else _USER_HINT
        raise MissingPrerequisiteError(f"Cannot install packages here: {hint}. {error}") from error


def uninterrupted(work: Callable[[], _T], undo: Callable[[], None] | None = None) -> _T:
    """Run a function in a new thread, where no KeyboardInterrupt can come.

    Ctrl-C reaches the main thread only. When it comes, the work is completed, and undone if `undo`
    is given: so there is no moment at which an unknown process exists.
    """
    results: list[_T] = []
    errors: list[BaseException] = []
    # Not Thread.join(): once interrupted, it takes the thread for ended. Starting the thread can be
    # interrupted, too: so the work begins when its end is waited for.
    begin, ended = threading.Event(), threading.Event()

    def run() -> None:
        begin.wait()
        if ended.is_set():
            return
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            errors.append(error)
        finally:
            ended.set()

    try:
        threading.Thread(target=run, name="qemu-start", daemon=True).start()
    except BaseException:
        # The thread may have been started.
        ended.set()
        begin.set()
        raise
    interrupt: BaseException | None = None
    while not ended.is_set():
        try:
            begin.set()
            ended.wait()
        except BaseException as error:  # noqa: BLE001 - raised again when the work has ended
            interrupt = error
    if interrupt is not None:
        if undo is not None:
            undo()
        raise interrupt
    if errors:
        raise errors[0]
    return results[0]
