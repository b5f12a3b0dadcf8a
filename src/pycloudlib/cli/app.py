"""The command `pycloudlib`: its commands put together, and how each of them ends."""

from __future__ import annotations

from collections.abc import Sequence

import click

from pycloudlib._base.documents import nearest
from pycloudlib._version import __version__
from pycloudlib.cli import doctor, imagecommands, inside, lifecycle, looking
from pycloudlib.cli.output import colour_choice, exit_code_of, show_any_text, tell
from pycloudlib.cli.session import Session, told_options
from pycloudlib.cli.terminal import ending_by_exception, secure_streams

PROGRAM = "pycloudlib"
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Group(click.Group):
    """A group that lists its commands by theme, and suggests the nearest for one it has not."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands, in the order in which they were added."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is meant."""
        name = args[0] if args else ""
        known = not name or name.startswith("-") or self.get_command(ctx, name) is not None
        if not (known or ctx.resilient_parsing):  # as while it is typed
            near = nearest(name, self.list_commands(ctx))
            hint = f" Did you mean {near!r}?" if near else ""
            ctx.fail(f"No such command {name!r}.{hint}")
        return super().resolve_command(ctx, args)


@click.group(PROGRAM, cls=_Group, context_settings=_SETTINGS)
@click.version_option(__version__, prog_name=PROGRAM)
@told_options
@click.pass_context
def application(context: click.Context) -> None:
    """Cloud images as local QEMU machines, which live until they are deleted."""
    context.ensure_object(Session)
    context.color = colour_choice()


for _command in (
    lifecycle.launch,
    looking.list_,
    looking.info,
    inside.execute,
    inside.shell,
    inside.console,
    inside.copy,
    lifecycle.start,
    lifecycle.stop,
    lifecycle.restart,
    lifecycle.wait,
    lifecycle.delete,
    lifecycle.snapshot,
    lifecycle.fork,
    lifecycle.rollback,
    imagecommands.images,
    looking.logs,
    looking.diagnose,
    doctor.prune,
    doctor.doctor,
    doctor.completion,
):
    application.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code.

    Args:
        arguments: What is given after the program's name; by default this process's own.
    """
    session = Session()
    show_any_text()
    if arguments is None:
        secure_streams()
    try:
        with ending_by_exception(), session.naming_directories():
            code = application.main(
                None if arguments is None else list(arguments),
                prog_name=PROGRAM,
                standalone_mode=False,
                obj=session,
            )
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - each is told
        tell(error, with_traceback=session.verbosity > 1)
        return int(exit_code_of(error))
    finally:
        session.leave_log()
    return code if isinstance(code, int) else 0
