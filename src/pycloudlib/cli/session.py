"""What all commands share: how much is told, and the cloud that their machines live in."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, TypeVar

import click

from pycloudlib import Qemu
from pycloudlib.cli.output import colour_choice
from pycloudlib.progress import Progress, ProgressCallback, ignore_progress
from pycloudlib.qemu.imagenames import COMMAND_LINE_TAG
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.state.settings import DIRECTORIES

_LOGGER = "pycloudlib"
_Target = TypeVar("_Target", bound="Callable[..., Any] | click.Command")


class Session:
    """One run of the command line.

    Attributes:
        verbosity: 0 tells warnings, 1 what is being done, 2 everything, with tracebacks.
        quiet: Whether neither progress nor notes nor warnings are told.
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
        return Qemu(COMMAND_LINE_TAG, timestamp_suffix=False, orphans="keep")

    @contextlib.contextmanager
    def naming_directories(self) -> Iterator[None]:
        """Name the key to set where an error is due to a directory that cannot be used."""
        try:
            yield
        except OSError:
            cloud = self.__dict__.get("cloud")  # where it was made already
            with contextlib.nullcontext() if cloud is None else cloud.settings.naming(*DIRECTORIES):
                raise

    @property
    def progress(self) -> ProgressCallback | None:
        """What is told of long work: None for what suits the terminal."""
        return ignore_progress if self.quiet else None

    def note(self, text: str) -> None:
        """Tell people something beside the result, on standard error."""
        if not self.quiet:
            click.echo(text, err=True)

    def follow_log(self) -> None:
        """Have this package's log printed to standard error, as much of it as is asked for."""
        levels = (logging.WARNING, logging.INFO, logging.DEBUG)
        level = logging.ERROR if self.quiet else levels[min(self.verbosity, 2)]
        logger = logging.getLogger(_LOGGER)
        if self._printer is None:
            self._printer, self._level_before = _LogPrinter(), logger.level
            logger.addHandler(self._printer)
        logger.setLevel(level)

    def leave_log(self) -> None:
        """Leave the log as it was before."""
        logger = logging.getLogger(_LOGGER)
        if self._printer is not None:
            logger.removeHandler(self._printer)
            logger.setLevel(self._level_before)
            self._printer = None


class _LogPrinter(logging.Handler):
    """Prints what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one entry."""
        words = record.getMessage()
        if record.levelno >= logging.WARNING:
            words = click.style(f"{record.levelname.capitalize()}: ", fg="yellow") + words
        click.echo(words, err=True, color=colour_choice())


def _set_verbosity(context: click.Context, _parameter: click.Parameter, value: int) -> None:
    session = context.ensure_object(Session)
    session.verbosity = max(session.verbosity, value)
    session.follow_log()


def _set_quiet(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    session = context.ensure_object(Session)
    session.quiet = session.quiet or value
    session.follow_log()


def told_options(target: _Target) -> _Target:
    """Add the options that every command has."""
    add_verbose = click.option(
        "-v",
        "--verbose",
        count=True,
        expose_value=False,
        callback=_set_verbosity,
        help="Tell what is being done; twice: everything, and tracebacks.",
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
        # After its own, in its help, too.
        return told_options(make(click.pass_obj(function)))

    return decorate


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, for programs; see the reference."
)


def is_terminal() -> bool:
    """Say whether somebody looks at standard error."""
    return sys.stderr.isatty()


_CLEAR_LINE = "\r\x1b[2K"


def wait_until_ready(session: Session, instance: QemuInstance, minutes: float | None) -> None:
    """Wait until a machine executes commands and cloud-init has finished.

    Args:
        session: Says whether the boot is shown.
        instance: The machine.
        minutes: How long it may take; by default what is usual for its accelerator.

    Errors are those of `QemuInstance.wait`.
    """
    try:
        with showing_boot(session, instance.name) as show:
            instance.wait(minutes, on_progress=show)
    except KeyboardInterrupt:
        session.note(
            f"{instance.name} goes on booting: 'pycloudlib wait {instance.name}' waits for it, "
            f"'pycloudlib delete {instance.name}' removes it"
        )
        raise


@contextlib.contextmanager
def showing_boot(session: Session, name: str) -> Iterator[ProgressCallback]:
    """Give a callback that keeps one line of a terminal up to date, and clears it at the end."""
    if session.quiet or not is_terminal():
        yield ignore_progress
        return

    def show(report: Progress) -> None:
        line = boot_line(name, report)[: shutil.get_terminal_size().columns - 1]
        click.echo(_CLEAR_LINE + line, err=True, nl=False)
        sys.stderr.flush()

    try:
        yield show
    finally:
        click.echo(_CLEAR_LINE, err=True, nl=False)


def boot_line(name: str, report: Progress) -> str:
    """Tell where a boot is, in one line without control characters."""
    detail = "".join(character for character in report.detail if character.isprintable())
    return f"{name}: {report.activity}, {report.done or 0:.0f} s  {detail}".rstrip()
