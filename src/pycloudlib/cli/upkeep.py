"""`prune`, `doctor` and `completion`: the house kept in order."""

from __future__ import annotations

import click

from pycloudlib.cli.output import print_json
from pycloudlib.cli.power import drop_fork_bases
from pycloudlib.cli.session import Session, command, json_option

_PROGRAM = "pycloudlib"
_COMPLETE_VARIABLE = "_PYCLOUDLIB_COMPLETE"
_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


@command("prune", short_help="Remove what dead programs have left behind.")
@click.option("--stopped", is_flag=True, help="Machines that are off, too, yours among them.")
@click.option("--images", is_flag=True, help="Old builds of images, too.")
@click.option("--warm", is_flag=True, help="Machines that are kept ready, too.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@json_option
def prune(
    session: Session, stopped: bool, images: bool, warm: bool, yes: bool, as_json: bool
) -> None:
    """Remove what programs have left behind that were killed or crashed, and print its paths.

    What belongs to a program that is alive stays, and so do machines of the command line.
    """
    if stopped and not yes:
        click.confirm("Delete all machines that are off?", abort=True, err=True)
    cloud = session.cloud
    removed = [*cloud.prune(stopped=stopped), *drop_fork_bases(session)]
    if images:
        removed += cloud.prune_images()
    if warm:
        removed += [f"kept ready: {key}" for key in cloud.prune_warm_images()]
    if as_json:
        print_json(removed)
    elif removed:
        click.echo("\n".join(removed))
    else:
        session.note("There is nothing to remove")


@command("doctor", short_help="Check what a launch needs.")
@click.option("--offline", is_flag=True, help="Leave the image server alone.")
@json_option
def doctor(session: Session, offline: bool, as_json: bool) -> int:
    """Check what a launch needs, and say how to mend what is missing.

    The exit code is 1 when something is in the way of a launch.
    """
    from pycloudlib.cli import hostfacts  # noqa: PLC0415 - seldom
    from pycloudlib.cli.doctor import Outcome, judge  # noqa: PLC0415 - seldom

    if not as_json:
        session.note("Looking, which takes some seconds …")
    found = judge(hostfacts.collect(ask_server=not offline))
    if as_json:
        print_json(found)
    else:
        for check in found:
            word = check.outcome.value
            mark = click.style(f"{word:8}", fg=_COLOURS[word], bold=True)
            click.echo(f"{mark} {check.name}: {check.detail}")
            if check.remedy:
                click.echo(f"{'':8} → {check.remedy}")
    return int(any(check.outcome is Outcome.PROBLEM for check in found))


@command("completion", short_help="Print what makes a shell complete commands and names.")
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion(context: click.Context, _session: Session, shell: str) -> None:
    """Print the script that makes a SHELL complete commands, options and names.

    \b
    bash:  eval "$(pycloudlib completion bash)"           in ~/.bashrc
    zsh:   eval "$(pycloudlib completion zsh)"            in ~/.zshrc
    fish:  pycloudlib completion fish | source            in ~/.config/fish/config.fish
    """  # noqa: D301 - click's mark for a paragraph that is left as it is
    from click.shell_completion import get_completion_class  # noqa: PLC0415 - seldom

    kind = get_completion_class(shell)
    assert kind is not None  # click knows all three
    click.echo(kind(context.find_root().command, {}, _PROGRAM, _COMPLETE_VARIABLE).source())
