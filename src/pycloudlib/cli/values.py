"""What may be given on the command line: sizes and names, read, and completed by the shell."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from pycloudlib.cli import imagenames
from pycloudlib.cli.machines import Found, list_machines
from pycloudlib.config import parse_config
from pycloudlib.deadline import positive
from pycloudlib.qemu.settings import QemuSettings
from pycloudlib.qemu.spec import check_name

if TYPE_CHECKING:
    _Integer = click.ParamType[int]
    _Number = click.ParamType[float]
    _Text = click.ParamType[str]
else:  # older ones are not generic
    _Integer = _Number = _Text = click.ParamType

_UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT])(?:i?B)?", re.IGNORECASE)


class Size(_Integer):
    """An amount of memory or disk, read as a whole number of a unit.

    Args:
        unit: `M` for MiB, `G` for GiB.
    """

    name = "size"

    def __init__(self, unit: str) -> None:
        self._unit = unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            self.fail(
                f"{value!r} is no size: expected a number with K, M, G or T, such as 2G or 512M",
                param,
                ctx,
            )
        size = float(match[1]) * (1 << _UNITS[match[2].upper()])
        whole = size / (1 << _UNITS[self._unit])
        if whole != int(whole) or whole < 1:
            self.fail(f"{value!r} is not a whole number of {self._unit}iB, 1 at least", param, ctx)
        return int(whole)


class Minutes(_Number):
    """How long something may take."""

    name = "minutes"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Read it."""
        try:
            return positive("it", float(value), self.name)
        except ValueError:
            self.fail(f"{value!r} is no time: expected a positive number of minutes", param, ctx)


class NewName(_Text):
    """A name for a machine that is to be."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Read it."""
        try:
            return check_name(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class MachineName(_Text):
    """The name of a machine that there is."""

    name = "name"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Complete it."""
        return [
            CompletionItem(machine.full_name, help=machine.state)
            for machine in _machines(everywhere="/" in incomplete)
            if machine.full_name.startswith(incomplete)
        ]


class ImageName(_Text):
    """A release, a snapshot, or the path of an image."""

    name = "image"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Complete it; a path is left to the shell."""
        names = [*imagenames.known_releases(), *_snapshots()]
        fitting = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return fitting or [CompletionItem(incomplete, type="file")]


class Place(_Text):
    """A file here, or in a machine: `name:path`."""

    name = "place"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Complete the name of a machine; a path here is left to the shell."""
        names = [f"{machine.full_name}:" for machine in _machines()]
        fitting = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return [*fitting, CompletionItem(incomplete, type="file")]


def _machines(*, everywhere: bool = False) -> list[Found]:
    working_dir = _working_dir()
    return [] if working_dir is None else list_machines(working_dir, everywhere=everywhere)


def _snapshots() -> list[str]:
    working_dir = _working_dir()
    return [] if working_dir is None else imagenames.snapshot_names(working_dir)


def _working_dir() -> Path | None:
    """Find where machines are as a cloud does; None where the configuration is wrong."""
    try:
        config = parse_config()
        section = config.get("qemu")
        settings = QemuSettings.parse(section if isinstance(section, dict) else {}, config.source)
        return settings.working_dir
    except ValueError:
        return None  # which is told when a command is run, not while it is typed


def read_document(path: Path | None) -> bytes | None:
    """Read a file that is handed to cloud-init, or standard input for `-`; None for no file."""
    if path is None:
        return None
    if str(path) == "-":
        return sys.stdin.buffer.read()
    return path.read_bytes()
