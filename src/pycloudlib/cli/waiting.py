"""Waiting for a machine to be ready, with where its boot is shown on a terminal."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator

import click

from pycloudlib.cli.session import Session, is_terminal
from pycloudlib.progress import Progress, ProgressCallback, ignore_progress
from pycloudlib.qemu.instance import QemuInstance

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
