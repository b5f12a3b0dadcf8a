"""`start`, `stop`, `restart`, `wait` and `delete`: each for several machines at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import click

from pycloudlib.cli import imagenames
from pycloudlib.cli.failures import exit_code_of, is_expected, tell
from pycloudlib.cli.machines import delete_machine, list_machines, open_machine
from pycloudlib.cli.session import Session, command, is_terminal
from pycloudlib.cli.values import MachineName, Minutes
from pycloudlib.cli.waiting import wait_until_ready
from pycloudlib.errors import ImageInUseError
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.util import raise_cleanup_errors

_names = click.argument("names", type=MachineName(), nargs=-1, metavar="NAME...")
_all = click.option("-a", "--all", "everything", is_flag=True, help="All machines of `list`.")
_wait = click.option("-w", "--wait", is_flag=True, help="Return when it is ready.")
_timeout = click.option(
    "--timeout", type=Minutes(), metavar="MINUTES", help="How long it may take."
)


@command("start", short_help="Switch machines on.")
@_names
@_all
@_wait
@_timeout
def start(
    session: Session, names: tuple[str, ...], everything: bool, wait: bool, timeout: float | None
) -> int:
    """Switch machines on; those that run already stay as they are."""

    def do(name: str) -> None:
        instance = open_machine(session.cloud, name)
        instance.start(wait=False)
        if wait:
            wait_until_ready(session, instance, timeout)

    return for_each(session, _chosen(session, names, everything), do)


@command("stop", short_help="Switch machines off.")
@_names
@_all
@click.option("-f", "--force", is_flag=True, help="Pull the plug instead of asking the guest.")
def stop(session: Session, names: tuple[str, ...], everything: bool, force: bool) -> int:
    """Switch machines off: by the power button, or by force if the guest does not answer to it."""

    def do(name: str) -> None:
        instance = open_machine(session.cloud, name)
        if force:
            instance.machine.kill()
        else:
            if is_terminal():
                session.note(f"Waiting for {name} to switch itself off (--force does not)")
            instance.shutdown()

    return for_each(session, _chosen(session, names, everything), do)


@command("restart", short_help="Reboot machines.")
@_names
@_all
@_wait
def restart(session: Session, names: tuple[str, ...], everything: bool, wait: bool) -> int:
    """Reboot machines, cleanly where the guest can be asked to."""

    def do(name: str) -> None:
        open_machine(session.cloud, name).restart(wait=wait)

    return for_each(session, _chosen(session, names, everything), do)


@command("wait", short_help="Wait until machines are ready.")
@_names
@_all
@_timeout
def wait(session: Session, names: tuple[str, ...], everything: bool, timeout: float | None) -> int:
    """Wait until machines execute commands and cloud-init has finished.

    It ends at once when a machine can never be ready, and says why.
    """

    def do(name: str) -> None:
        wait_until_ready(session, open_running(session, name), timeout)

    return for_each(session, _chosen(session, names, everything), do)


@command("delete", short_help="Delete machines.")
@_names
@_all
def delete(session: Session, names: tuple[str, ...], everything: bool) -> int:
    """Delete machines, running or not, with their disks. Snapshots of them stay."""

    def do(name: str) -> None:
        raise_cleanup_errors(delete_machine(session.cloud, name), None)

    code = for_each(session, _chosen(session, names, everything), do)
    drop_fork_bases(session)
    return code


def drop_fork_bases(session: Session) -> list[str]:
    """Delete what forks were built on that are no more; give the paths."""
    dropped = []
    for image in imagenames.fork_bases(session.cloud.working_dir):
        try:
            session.cloud.delete_image(str(image))
            dropped.append(str(image))
        except ImageInUseError:
            continue
    return dropped


def _chosen(session: Session, names: Sequence[str], everything: bool) -> list[str]:
    if bool(names) is everything:
        raise click.UsageError("Name machines, or give --all")
    if names:
        return list(dict.fromkeys(names))
    return [machine.full_name for machine in list_machines(session.cloud.working_dir)]


def for_each(session: Session, names: Sequence[str], do: Callable[[str], None]) -> int:
    """Do something with each of some machines; what fails with one does not keep the others.

    Returns:
        The exit code: of the first that failed, or 0.
    """
    code = 0
    for name in names:
        try:
            do(name)
        except Exception as error:
            if len(names) == 1 or not is_expected(error):
                raise
            tell(error, with_traceback=session.verbosity > 1)
            code = code or int(exit_code_of(error))
    return code


def open_running(session: Session, name: str) -> QemuInstance:
    """Take a machine over that is to be reached; it is put right first where it is a copy.

    Errors are those of `open_machine`.
    """
    instance = open_machine(session.cloud, name)
    instance.machine.look()
    instance.put_right_soon()
    return instance
