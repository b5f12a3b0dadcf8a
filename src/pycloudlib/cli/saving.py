"""`snapshot`, `fork` and `rollback`: machines that are kept, doubled and taken back."""

from __future__ import annotations

import itertools
from pathlib import Path

import click

from pycloudlib.cli import imagenames
from pycloudlib.cli.machines import free_names, open_machine
from pycloudlib.cli.power import open_running
from pycloudlib.cli.session import Session, command
from pycloudlib.cli.values import ImageName, MachineName, NewName
from pycloudlib.errors import ImageNotFoundError


@command("snapshot", short_help="Make an image of a machine.")
@click.argument("name", type=MachineName())
@click.option("--memory", is_flag=True, help="Save the running machine; its copies do not boot.")
@click.option("--clean/--no-clean", default=True, help="Whether copies boot as for the first time.")
def snapshot(session: Session, name: str, memory: bool, clean: bool) -> None:
    """Make an image of a machine, and print its name, by which `launch` takes it.

    For an image of the disk the machine is switched off; one that is off already is saved as it is.
    With --memory it runs on, with its connections, and `launch` starts copies that go on from there
    at once.
    """
    instance = open_running(session, name)
    image = session.cloud.snapshot(instance, clean, memory=memory)
    click.echo(Path(image).stem)
    if not memory:
        session.note(f"{name} is off: 'pycloudlib start {name}' switches it on")


@command("fork", short_help="Start running copies of a running machine.")
@click.argument("name", type=MachineName())
@click.option("-n", "--name", "new_name", type=NewName(), help="What the copy is called.")
@click.option("--count", type=click.IntRange(1, 50), default=1, help="How many; 1 by default.")
@click.option("--fresh-identity", is_flag=True, help="Each copy is somebody of its own.")
def fork(
    session: Session, name: str, new_name: str | None, count: int, fresh_identity: bool
) -> None:
    """Start copies of a machine that go on from this moment, and print their names.

    The machine itself goes on, too. Several copies are called NAME-1, NAME-2 and so on.
    """
    instance = open_running(session, name)
    prefix = instance.name if new_name is None else new_name
    if new_name is not None and count == 1:
        names = [new_name]
    else:
        names = list(itertools.islice(free_names(session.cloud.working_dir, prefix), count))
    copies = instance.fork(count, fresh_identity=fresh_identity, names=names)
    for copy in copies:
        click.echo(copy.name)


@command("rollback", short_help="Take a machine back to where it was saved.")
@click.argument("name", type=MachineName())
@click.argument("snapshot", type=ImageName(), required=False)
def rollback(session: Session, name: str, snapshot: str | None) -> None:
    """Take a machine back to a SNAPSHOT with memory, by default its latest one.

    What happened in it since is forgotten; it goes on from there.
    """
    instance = open_machine(session.cloud, name)
    cloud = session.cloud
    if snapshot is None:
        latest = imagenames.find_saved_of(cloud.working_dir, instance.name)
        if latest is None:
            raise ImageNotFoundError(
                message=f"{name} has no snapshot to go back to: "
                f"'pycloudlib snapshot --memory {name}' makes one"
            )
        image = str(latest)
    else:
        found = imagenames.find_here(cloud, snapshot)
        if found is None:
            raise imagenames.unknown_image(cloud, snapshot)
        image = found
    instance.rollback(image)
