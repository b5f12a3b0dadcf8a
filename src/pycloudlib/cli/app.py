"""The command `pycloudlib`: all commands in one group, and how each of them ends."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from pycloudlib._base.documents import nearest
from pycloudlib._version import __version__
from pycloudlib.cli.common import (
    Session,
    colour_choice,
    command,
    common_options,
    escape_unencodable,
    exit_code_of,
    print_error,
)
from pycloudlib.cli.terminal import exiting_on_signals, secure_streams

PROGRAM = "pycloudlib"
_COMPLETE_VARIABLE = "_PYCLOUDLIB_COMPLETE"
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


# The commands in the order of the help, with the module and the function of each: that is imported
# when its command is run.
_COMMANDS = {
    "launch": ("lifecycle", "launch"),
    "list": ("reports", "list_"),
    "info": ("reports", "info"),
    "exec": ("inside", "execute"),
    "shell": ("inside", "shell"),
    "console": ("inside", "console"),
    "copy": ("inside", "copy"),
    "start": ("lifecycle", "start"),
    "stop": ("lifecycle", "stop"),
    "restart": ("lifecycle", "restart"),
    "wait": ("lifecycle", "wait"),
    "delete": ("lifecycle", "delete"),
    "snapshot": ("imagecommands", "snapshot"),
    "fork": ("imagecommands", "fork"),
    "rollback": ("imagecommands", "rollback"),
    "images": ("imagecommands", "images"),
    "logs": ("reports", "logs"),
    "diagnose": ("reports", "diagnose"),
    "prune": ("doctor", "prune"),
    "doctor": ("doctor", "doctor"),
}


_NOT_YET = click.Command(None)


class _Commands(dict[str, click.Command]):
    """The commands by their names; each is imported when it is asked for."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(_COMMANDS, _NOT_YET))

    def __getitem__(self, name: str) -> click.Command:
        if super().__getitem__(name) is _NOT_YET:
            module, attribute = _COMMANDS[name]
            self[name] = getattr(import_module(f"pycloudlib.cli.{module}"), attribute)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a command, or the default."""
        try:
            return self[name]
        except KeyError:
            return default

    def items(self) -> Any:
        """Return all of them, with their names."""
        return [(name, self[name]) for name in self]

    def values(self) -> Any:
        """Return all of them."""
        return [self[name] for name in self]


class _Group(click.Group):
    """A group that lists its commands by theme, and suggests the nearest to an unknown one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands, in the order in which they were added."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of a name."""
        name = args[0] if args else ""
        known = not name or name.startswith("-") or self.get_command(ctx, name) is not None
        if not (known or ctx.resilient_parsing):  # as in completion
            near = nearest(name, self.list_commands(ctx))
            hint = f" Did you mean {near!r}?" if near else ""
            ctx.fail(f"No such command {name!r}.{hint}")
        return super().resolve_command(ctx, args)


@click.group(PROGRAM, cls=_Group, context_settings=_SETTINGS, commands=_Commands())
@click.version_option(__version__, prog_name=PROGRAM)
@common_options
@click.pass_context
def application(context: click.Context) -> None:
    """Run cloud images as local QEMU machines, which live until they are deleted."""
    context.ensure_object(Session)
    context.color = colour_choice()


@command("completion", short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion(context: click.Context, _session: Session, shell: str) -> None:
    """Print the script with which a SHELL completes commands, options and names.

    \b
    bash:  eval "$(pycloudlib completion bash)"           in ~/.bashrc
    zsh:   eval "$(pycloudlib completion zsh)"            in ~/.zshrc
    fish:  pycloudlib completion fish | source            in ~/.config/fish/config.fish
    """  # noqa: D301 - click's mark for an unwrapped paragraph
    from click.shell_completion import get_completion_class  # noqa: PLC0415 - seldom

    kind = get_completion_class(shell)
    assert kind is not None  # click knows all three
    click.echo(kind(context.find_root().command, {}, PROGRAM, _COMPLETE_VARIABLE).source())


application.add_command(completion)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code.

    Args:
        arguments: The arguments after the program's name; by default this process's own.
    """
    session = Session()
    escape_unencodable()
    if arguments is None:
        secure_streams()
    try:
        with exiting_on_signals(), session.naming_directories():
            code = application.main(
                None if arguments is None else list(arguments),
                prog_name=PROGRAM,
                standalone_mode=False,
                obj=session,
            )
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - each is printed
        print_error(error, with_traceback=session.verbosity > 1)
        return int(exit_code_of(error))
    finally:
        session.hide_log()
    return code if isinstance(code, int) else 0
