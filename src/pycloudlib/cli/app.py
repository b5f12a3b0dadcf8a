"""The command `pycloudlib`: all commands in one group, and how each of them ends."""

from __future__ import annotations

from collections.abc import Sequence

import click

from pycloudlib._base.documents import nearest
from pycloudlib._version import __version__
from pycloudlib.cli import doctor, imagecommands, inside, lifecycle, reports
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


@click.group(PROGRAM, cls=_Group, context_settings=_SETTINGS)
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


for _command in (
    lifecycle.launch,
    reports.list_,
    reports.info,
    inside.execute,
    inside.shell,
    inside.console,
    inside.copy,
    lifecycle.start,
    lifecycle.stop,
    lifecycle.restart,
    lifecycle.wait,
    lifecycle.delete,
    imagecommands.snapshot,
    imagecommands.fork,
    imagecommands.rollback,
    imagecommands.images,
    reports.logs,
    reports.diagnose,
    doctor.prune,
    doctor.doctor,
    completion,
):
    application.add_command(_command)


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
