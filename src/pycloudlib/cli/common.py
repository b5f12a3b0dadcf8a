"""What all commands share: the session, common options, tables and JSON, errors and exit codes."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import datetime
import enum
import io
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pycloudlib._base import documents
from pycloudlib.diagnosis import UNDIAGNOSED, Audience, Diagnosis
from pycloudlib.errors import (
    PycloudlibException,
    PycloudlibTimeoutError,
    ResourceNotFoundError,
)
from pycloudlib.progress import ProgressCallback, ignore_progress
from pycloudlib.qemu.state.settings import COMMAND_LINE_TAG, DIRECTORIES

if TYPE_CHECKING:
    from pycloudlib import Qemu

_LOGGER = "pycloudlib"
_LOG_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
_SIZE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_AGE_UNITS = ((86400, "days"), (3600, "hours"), (60, "minutes"))
_STATE_COLOURS = {
    "running": "green",
    "elsewhere": "yellow",
    "broken": "red",
    "paused": "yellow",
    "starting": "yellow",
}
_Target = TypeVar("_Target", bound="Callable[..., Any] | click.Command")


class Session:
    """One run of the command line.

    Attributes:
        verbosity: 0 prints warnings, 1 each action, 2 everything, with tracebacks.
        quiet: Whether neither progress nor notes nor warnings are printed.
    """

    def __init__(self) -> None:
        self.verbosity = 0
        self.quiet = False
        self._printer: logging.Handler | None = None
        self._level_before = logging.NOTSET

    @cached_property
    def cloud(self) -> Qemu:
        """The cloud of the command line, whose machines outlive its programs.

        Errors are those of `Qemu`.
        """
        from pycloudlib import Qemu  # noqa: PLC0415 - not all commands need it

        return Qemu(COMMAND_LINE_TAG, timestamp_suffix=False, orphans="keep")

    @contextlib.contextmanager
    def naming_directories(self) -> Iterator[None]:
        """Add the key of the configuration to errors about a directory that it configures."""
        try:
            yield
        except OSError:
            cloud = self.__dict__.get("cloud")  # where it was made already
            with contextlib.nullcontext() if cloud is None else cloud.settings.naming(*DIRECTORIES):
                raise

    @property
    def progress(self) -> ProgressCallback | None:
        """What to call with the progress of long work: None for what suits the terminal."""
        return ignore_progress if self.quiet else None

    def note(self, text: str) -> None:
        """Print a note beside the result, on standard error."""
        if not self.quiet:
            click.echo(text, err=True)

    def show_log(self) -> None:
        """Print this package's log to standard error, from the level that the verbosity asks for.

        `hide_log` ends it.
        """
        logger = logging.getLogger(_LOGGER)
        if self._printer is None:
            self._printer, self._level_before = _LogPrinter(), logger.level
            logger.addHandler(self._printer)
        logger.setLevel(logging.ERROR if self.quiet else _LOG_LEVELS[min(self.verbosity, 2)])

    def hide_log(self) -> None:
        """Restore the log as it was before `show_log`."""
        logger = logging.getLogger(_LOGGER)
        if self._printer is not None:
            logger.removeHandler(self._printer)
            logger.setLevel(self._level_before)
            self._printer = None


class _LogPrinter(logging.Handler):
    """Prints log records to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        message = record.getMessage()
        if record.levelno >= logging.WARNING:
            message = click.style(f"{record.levelname.capitalize()}: ", fg="yellow") + message
        click.echo(message, err=True, color=colour_choice())


# Commands and their options.


def _set_verbosity(context: click.Context, _parameter: click.Parameter, value: int) -> None:
    session = context.ensure_object(Session)
    session.verbosity = max(session.verbosity, value)
    session.show_log()


def _set_quiet(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    session = context.ensure_object(Session)
    session.quiet = session.quiet or value
    session.show_log()


def common_options(target: _Target) -> _Target:
    """Add the options of every command."""
    add_verbose = click.option(
        "-v",
        "--verbose",
        count=True,
        expose_value=False,
        callback=_set_verbosity,
        help="Print each action; twice: everything, and tracebacks.",
    )
    add_quiet = click.option(
        "-q",
        "--quiet",
        is_flag=True,
        expose_value=False,
        callback=_set_quiet,
        help="No progress, notes or warnings.",
    )
    return add_verbose(add_quiet(target))


def command(name: str, **settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a command of a function that takes a `Session` first and may return an exit code."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        make: Callable[[Callable[..., Any]], click.Command] = click.command(name, **settings)
        # Last, so that the command's own options are first in its help.
        return common_options(make(click.pass_obj(function)))

    return decorate


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, for programs; see the reference."
)


# Output.


def colour_choice() -> bool | None:
    """Return False if `NO_COLOR` (https://no-color.org) forbids colours; None: on terminals."""
    return False if os.environ.get("NO_COLOR") else None


def escape_unencodable() -> None:
    """Make standard output and error escape what their encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.closed:
            # ASCII is the encoding of a process without a locale; click, too, writes UTF-8 then.
            is_unset = _codec(stream.encoding) == "ascii"
            stream.reconfigure(encoding="utf-8" if is_unset else None, errors=documents.ESCAPED)


def _codec(encoding: str | None) -> str:
    return codecs.lookup(encoding or "ascii").name


def print_json(value: Any) -> None:
    r"""Print a value, or a list of them, as JSON.

    A path that is not UTF-8 has the escapes of which Python's `os.fsencode` makes the path again
    (`\udcd1` for the byte d1). An output in another encoding than UTF-8 gets ASCII alone.
    """
    ascii_alone = _codec(getattr(sys.stdout, "encoding", None)) != "utf-8"
    document = json.dumps(value, default=_plain, indent=2, ensure_ascii=ascii_alone)
    click.echo(documents.escape_json(document))


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} is no JSON")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows below the names of their columns; nothing is cut off."""
    click.echo(format_table(columns, rows))


def format_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return rows as text, in columns as wide as their longest cells."""
    cells = [[documents.escape_line(str(cell)) for cell in row] for row in rows]
    heads = [column.upper() for column in columns]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = [_format_row(heads, widths, lambda text: click.style(text, bold=True))]
    lines += [_format_row(row, widths, _coloured) for row in cells]
    return "\n".join(lines)


def _format_row(row: Sequence[str], widths: Sequence[int], style: Callable[[str], str]) -> str:
    cells = zip(row, widths, strict=True)
    return "  ".join(style(cell) + " " * (width - len(cell)) for cell, width in cells).rstrip()


def _coloured(text: str) -> str:
    colour = _STATE_COLOURS.get(text)
    return click.style(text, fg=colour) if colour else text


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Print names and their values, one a line; without those that have none."""
    shown = [(name, str(value)) for name, value in facts if value not in (None, "")]
    width = max((len(name) for name, _value in shown), default=0) + 2
    for name, value in shown:
        label = click.style(f"{name}:", bold=True) + " " * (width - len(name) - 1)
        click.echo(label + _coloured(value))


def size_in_words(size: float) -> str:
    """Return a number of bytes with a unit."""
    units = iter(_SIZE_UNITS)
    unit = next(units)
    while size >= 1024 and unit != _SIZE_UNITS[-1]:
        size, unit = size / 1024, next(units)
    return f"{size:.0f} {unit}" if size >= 10 or size == int(size) else f"{size:.1f} {unit}"


def age_in_words(since: float, now: float | None = None) -> str:
    """Return the time since a moment, in the largest unit of which it has two."""
    seconds = max(0.0, (time.time() if now is None else now) - since)
    for length, unit in _AGE_UNITS:
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return "1 second" if round(seconds) == 1 else f"{seconds:.0f} seconds"


def timestamp(seconds: float) -> str:
    """Return seconds since the epoch as ISO 8601, in UTC."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


# Errors.


class ExitCode(enum.IntEnum):
    """The exit codes of all commands; `exec` and `shell` return the command's own, too."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    NOT_FOUND = 3
    TIMEOUT = 4
    CONNECTION_LOST = 255
    INTERRUPTED = 130


MEANINGS = {
    ExitCode.OK: "the command succeeded",
    ExitCode.FAILURE: "the command failed; the message says why",
    ExitCode.USAGE: "an option, an argument, the configuration or a file is wrong",
    ExitCode.NOT_FOUND: "no machine or image has that name",
    ExitCode.TIMEOUT: "a wait timed out, or can never succeed",
    ExitCode.INTERRUPTED: "Ctrl-C",
    ExitCode.CONNECTION_LOST: "`exec`, `shell`: a signal ended the command, or the connection did",
}
"""What each exit code means, for the reference."""


def exit_code_of(error: BaseException) -> ExitCode:
    """Return the exit code of a command that failed with an error."""
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
    """Whether an error is for the user; any other is a defect of this package."""
    # paramiko is heavy to load; whoever raises its errors has done so.
    known = (PycloudlibException, OSError, ValueError, click.ClickException)
    return isinstance(error, known) or type(error).__module__.startswith("paramiko")


def print_error(error: BaseException, *, with_traceback: bool) -> None:
    """Print an error as one clear message to standard error."""
    if with_traceback and not isinstance(error, (click.ClickException, click.Abort)):
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    if isinstance(error, click.ClickException):
        error.show()
        return
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        interrupted = exit_code_of(error) is ExitCode.INTERRUPTED
        click.echo("Interrupted" if interrupted else "Nothing was done", err=True)
        return
    message = _message_of(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        message = f"{error.strerror}: {error.filename}"
    if not is_expected(error):
        name = type(error).__name__
        message = f"this is a defect of pycloudlib: {name}: {message} (-vv tells more)"
    mark = click.style("Error: ", fg="red", bold=True)
    click.echo(mark + message, err=True, color=colour_choice())


def _message_of(error: BaseException) -> str:
    """Return an error's message, with its diagnosis, if any, for users of the command line."""
    diagnosis = getattr(error, "diagnosis", None)
    message: str | None = getattr(error, UNDIAGNOSED, None)
    if message is None or not isinstance(diagnosis, Diagnosis):
        return str(error)
    return f"{message}\n{diagnosis.tell(beside=message, audience=Audience.COMMAND_LINE)}"
