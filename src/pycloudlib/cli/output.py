"""What commands print: tables for people, JSON for programs, sizes and ages in words."""

from __future__ import annotations

import codecs
import dataclasses
import datetime
import enum
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from pycloudlib._base import documents
from pycloudlib.diagnosis import UNDIAGNOSED, Audience, Diagnosis
from pycloudlib.errors import (
    PycloudlibException,
    PycloudlibTimeoutError,
    ResourceNotFoundError,
)

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_AGES = ((86400 * 2, 86400, "days"), (3600 * 2, 3600, "hours"), (60 * 2, 60, "minutes"))
_STATE_COLOURS = {
    "running": "green",
    "elsewhere": "yellow",
    "broken": "red",
    "paused": "yellow",
    "starting": "yellow",
}


def colour_choice() -> bool | None:
    """Say whether colours are printed: None leaves it to whether there is a terminal.

    `NO_COLOR` forbids them (https://no-color.org).
    """
    return False if os.environ.get("NO_COLOR") else None


def show_any_text() -> None:
    """Let standard output and error show what their encoding cannot write, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.closed:
            # ASCII is what a process has that was told nothing; click, too, writes UTF-8 then.
            unset = _codec(stream.encoding) == "ascii"
            stream.reconfigure(encoding="utf-8" if unset else None, errors=documents.ESCAPED)


def _codec(encoding: str | None) -> str:
    return codecs.lookup(encoding or "ascii").name


def print_json(value: Any) -> None:
    r"""Print a value, or a list of them, as JSON.

    A path that is no text comes with the escapes by which Python's `os.fsencode` finds it again
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
    """Print rows below their columns' names; nothing is cut off."""
    click.echo(format_table(columns, rows))


def format_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lay rows out in columns as wide as what is in them."""
    cells = [[documents.escape_line(str(cell)) for cell in row] for row in rows]
    heads = [column.upper() for column in columns]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = [_lay_out(heads, widths, lambda text, _plain: click.style(text, bold=True))]
    lines += [_lay_out(row, widths, _coloured) for row in cells]
    return "\n".join(lines)


def _lay_out(row: Sequence[str], widths: Sequence[int], styled: Any) -> str:
    padded = [
        styled(cell, cell) + " " * (width - len(cell))
        for cell, width in zip(row, widths, strict=True)
    ]
    return "  ".join(padded).rstrip()


def _coloured(text: str, plain: str) -> str:
    colour = _STATE_COLOURS.get(plain)
    return click.style(text, fg=colour) if colour else text


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Print names and what they stand for, one a line; what is empty is left out."""
    shown = [(name, str(value)) for name, value in facts if value not in (None, "")]
    width = max((len(name) for name, _value in shown), default=0) + 2
    for name, value in shown:
        label = click.style(f"{name}:", bold=True) + " " * (width - len(name) - 1)
        click.echo(label + _coloured(value, value))


def size_in_words(size: float) -> str:
    """Give a number of bytes with a unit."""
    units = iter(_UNITS)
    unit = next(units)
    while size >= 1024 and unit != _UNITS[-1]:
        size, unit = size / 1024, next(units)
    return f"{size:.0f} {unit}" if size >= 10 or size == int(size) else f"{size:.1f} {unit}"


def age_in_words(since: float, now: float | None = None) -> str:
    """Give how long ago something was, in the largest unit that tells enough."""
    seconds = max(0.0, (time.time() if now is None else now) - since)
    for least, length, unit in _AGES:
        if seconds >= least:
            return f"{seconds / length:.0f} {unit}"
    return "1 second" if round(seconds) == 1 else f"{seconds:.0f} seconds"


def timestamp(seconds: float) -> str:
    """Give a time, in seconds since the epoch, by ISO 8601 in UTC."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


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


def _words_of(error: BaseException) -> str:
    """Return what an error says, with its diagnosis, if any, for users of the command line."""
    diagnosis = getattr(error, "diagnosis", None)
    said: str | None = getattr(error, UNDIAGNOSED, None)
    if said is None or not isinstance(diagnosis, Diagnosis):
        return str(error)
    return f"{said}\n{diagnosis.tell(beside=said, audience=Audience.COMMAND_LINE)}"
