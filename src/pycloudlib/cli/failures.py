"""How a command ends: its exit code, and what people are told when it has failed."""

from __future__ import annotations

import enum
import traceback

import click

from pycloudlib.cli.output import colour_choice
from pycloudlib.diagnosis import UNDIAGNOSED, Cause, Diagnosis
from pycloudlib.errors import (
    PycloudlibException,
    PycloudlibTimeoutError,
    ResourceNotFoundError,
)


class ExitCode(enum.IntEnum):
    """The exit codes of all commands; `exec` and `shell` give the command's own beside them."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    NOT_FOUND = 3
    TIMEOUT = 4
    CONNECTION_LOST = 255
    INTERRUPTED = 130


MEANINGS = {
    ExitCode.OK: "all went well",
    ExitCode.FAILURE: "it did not work; the message says why",
    ExitCode.USAGE: "what was given is wrong: an option, an argument, the configuration, a file",
    ExitCode.NOT_FOUND: "there is no machine or image of that name",
    ExitCode.TIMEOUT: "what was waited for did not happen in time, or never can",
    ExitCode.INTERRUPTED: "Ctrl-C",
    ExitCode.CONNECTION_LOST: "`exec`, `shell`: a signal ended the command, or the line did",
}
"""What each exit code means, for the reference."""


_HINTS = {
    Cause.POWERED_OFF: (
        "user-data may have asked for it (power_state), or somebody in the guest; 'pycloudlib "
        "start' switches it on again"
    ),
    Cause.SWITCHED_OFF: "'pycloudlib start' switches it on",
    Cause.GUEST_MEMORY: "give it more memory: 'pycloudlib launch --memory 2G'",
    Cause.GUEST_DISK: "launch it with a larger disk: 'pycloudlib launch --disk 20G'",
    Cause.NO_NETWORK: "'pycloudlib console' gets in without a network",
    Cause.NO_SSH_SERVER: "is it installed and enabled? 'pycloudlib console' gets in without it",
    Cause.STILL_BOOTING: "'pycloudlib wait' waits on, or longer with --timeout",
    Cause.UNKNOWN: "'pycloudlib logs' shows what the guest did",
}
"""What to try, where `Cause.hint` speaks to those who write programs."""


def exit_code_of(error: BaseException) -> ExitCode:
    """Tell with which code a command ends that has failed."""
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    if isinstance(error, click.Abort):
        interrupted = isinstance(error.__cause__, KeyboardInterrupt)
        return ExitCode.INTERRUPTED if interrupted else ExitCode.FAILURE
    if isinstance(error, ResourceNotFoundError):
        return ExitCode.NOT_FOUND
    if isinstance(error, PycloudlibTimeoutError):
        return ExitCode.TIMEOUT
    if isinstance(error, (ValueError, click.UsageError)):
        return ExitCode.USAGE
    return ExitCode.FAILURE


def is_expected(error: BaseException) -> bool:
    """Say whether an error speaks for itself; any other is a defect of this package."""
    # paramiko is heavy to load; whoever raises its errors has done so.
    known = (PycloudlibException, OSError, ValueError, click.ClickException)
    return isinstance(error, known) or type(error).__module__.startswith("paramiko")


def tell(error: BaseException, *, with_traceback: bool) -> None:
    """Print one clear message to standard error."""
    if with_traceback and not isinstance(error, (click.ClickException, click.Abort)):
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    if isinstance(error, click.ClickException):
        error.show()
        return
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        interrupted = exit_code_of(error) is ExitCode.INTERRUPTED
        click.echo("Interrupted" if interrupted else "Nothing was done", err=True)
        return
    words = _words_of(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        words = f"{error.strerror}: {error.filename}"
    if not is_expected(error):
        words = f"this is a defect of pycloudlib: {type(error).__name__}: {words} (-vv tells more)"
    mark = click.style("Error: ", fg="red", bold=True)
    click.echo(mark + words, err=True, color=colour_choice())


def hint_of(cause: Cause) -> str:
    """Say what to try on the command line."""
    return _HINTS.get(cause, cause.hint)


def tell_diagnosis(diagnosis: Diagnosis, *, beside: str = "") -> str:
    """Return a diagnosis as text that says what to try on the command line.

    Args:
        diagnosis: The diagnosis.
        beside: A text that it follows; facts that this has are not told again.
    """
    return diagnosis.tell(beside=beside, hint=hint_of(diagnosis.cause))


def _words_of(error: BaseException) -> str:
    """Return what an error says, with a diagnosis for readers of the command line if it has one."""
    diagnosis = getattr(error, "diagnosis", None)
    said: str | None = getattr(error, UNDIAGNOSED, None)
    if said is None or not isinstance(diagnosis, Diagnosis):
        return str(error)
    return f"{said}\n{tell_diagnosis(diagnosis, beside=said)}"
