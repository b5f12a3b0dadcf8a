"""Names of machines that arguments have, and the connection that is kept to a machine.

It imports little: whoever runs a command in a machine waits for that.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from pycloudlib.config import parse_config
from pycloudlib.guest.access import kept
from pycloudlib.guest.access.kept import Keeper
from pycloudlib.qemu.state.settings import CLOUD_PREFIX, COMMAND_LINE_TAG, QemuSettings

if TYPE_CHECKING:
    from pycloudlib.cli.machines import MachineEntry

    _Text = click.ParamType[str]
else:  # older versions of click are not generic
    _Text = click.ParamType

_NAME = re.compile(r"(?:(?P<tag>[a-z0-9-]+)/)?(?P<name>[a-z0-9-]+)")


class MachineName(_Text):
    """The name of an existing machine."""

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


class MachinePath(_Text):
    """A path on the host, or in a machine: `name:path`."""

    name = "path"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Complete the name of a machine; the shell completes paths on the host."""
        names = [f"{machine.full_name}:" for machine in _machines()]
        fitting = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return [*fitting, CompletionItem(incomplete, type="file")]


def find_working_dir() -> Path | None:
    """Find the directory of machines as a cloud does; None if the configuration is wrong."""
    try:
        config = parse_config()
        section = config.get("qemu")
        settings = QemuSettings.parse(section if isinstance(section, dict) else {}, config.source)
        return settings.working_dir
    except ValueError:
        return None  # running the command reports it; completing it must not


def find_keeper(name: str) -> Keeper | None:
    """Find the SSH connection that is kept to the machine of a name; None where there is none.

    Neither the cloud nor the machine is looked at for that.
    """
    match, working_dir = _NAME.fullmatch(name), find_working_dir()
    if match is None or working_dir is None:
        return None
    parent = working_dir / f"{CLOUD_PREFIX}{match['tag'] or COMMAND_LINE_TAG}"
    keeper = Keeper(parent / match["name"] / kept.DIRECTORY)
    return keeper if keeper.is_there() else None


def _machines(*, everywhere: bool = False) -> list[MachineEntry]:
    from pycloudlib.cli.machines import list_machines  # noqa: PLC0415 - see the module

    working_dir = find_working_dir()
    return [] if working_dir is None else list_machines(working_dir, everywhere=everywhere)
