"""`images …`, and `snapshot`, `fork` and `rollback`: the commands of images and copies."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import click

from pycloudlib._base.files import allocated_size
from pycloudlib.cli.common import (
    Session,
    age_in_words,
    command,
    json_option,
    print_json,
    print_table,
    size_in_words,
    timestamp,
)
from pycloudlib.cli.machines import (
    ImageName,
    NewName,
    Size,
    free_names,
    open_machine,
    open_running,
)
from pycloudlib.cli.names import MachineName
from pycloudlib.cloud import ImageType
from pycloudlib.errors import ImageNotFoundError
from pycloudlib.images import store
from pycloudlib.images.recipe import RELEASES as BUILT_RELEASES
from pycloudlib.qemu import imagenames
from pycloudlib.qemu.state import savedmachine

_minimal = click.option("--minimal", is_flag=True, help="The minimal variant.")
_daily = click.option("--daily", is_flag=True, help="The daily image, not the released one.")


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """An image, as `images list --json` prints it.

    Attributes:
        name: Its name for commands.
        kind: `image`, `snapshot` of a disk, or `saved machine`.
        id: Its id, which is its path.
        release: Series or suite; empty if unknown.
        serial: The build serial; empty if unknown.
        size_bytes: Space that its files take on disk.
        source: Where it came from.
        last_used: When a machine was last launched from it, or when it was made, as ISO 8601 in
            UTC.
    """

    name: str
    kind: str
    id: str
    release: str
    serial: str
    size_bytes: int
    source: str
    last_used: str


@click.group("images", short_help="Get, build and delete images.")
def images() -> None:
    """List, download, build, export, delete and pin the images that machines are launched from."""


@command("list", short_help="List the images on this host.")
@json_option
def list_images(session: Session, as_json: bool) -> None:
    """List the images on this host: downloaded, built, and made of machines."""
    images_here = _collect(session)
    if as_json:
        print_json([facts for facts, _used in images_here])
    elif images_here:
        print_table(
            ("name", "kind", "size", "used", "from"),
            [
                (
                    facts.name,
                    facts.kind,
                    size_in_words(facts.size_bytes),
                    f"{age_in_words(used)} ago",
                    facts.source.partition(" ")[0] if facts.kind == "image" else facts.source,
                )
                for facts, used in images_here
            ],
        )
    else:
        session.note("There are no images; 'pycloudlib images pull' or 'build' gets one")


def _collect(session: Session) -> list[tuple[ImageFacts, float]]:
    """Return all images, each with the time of its last use, in seconds since the epoch."""
    cloud = session.cloud
    found = []
    for stored in cloud.images():
        name = imagenames.short_name(Path(stored.image_id), cloud.image_dir)
        facts = ImageFacts(
            name,
            "image",
            stored.image_id,
            stored.release,
            stored.serial,
            stored.size,
            stored.source,
            timestamp(stored.last_used),
        )
        found.append((facts, stored.last_used))
    bases = set(imagenames.fork_bases(cloud.working_dir))
    for path in imagenames.snapshots(cloud.working_dir):
        if path not in bases:
            found.append(_describe_snapshot(path))
    return found


def _describe_snapshot(path: Path) -> tuple[ImageFacts, float]:
    record = store.find_record(path)
    directory = savedmachine.directory_of(path)
    size = allocated_size(path, *(directory.iterdir() if directory.is_dir() else ()))
    used = (store.record_path(path) if record else path).stat().st_mtime
    return ImageFacts(
        path.stem,
        "saved machine" if savedmachine.find(path) is not None else "snapshot",
        str(path),
        record.release if record else "",
        record.serial if record else "",
        size,
        record.source if record else "",
        timestamp(used),
    ), used


@command("pull", short_help="Download an Ubuntu image.")
@click.argument("release", type=ImageName())
@_daily
@_minimal
@click.option("--refresh", is_flag=True, help="Ask the server for a newer build than the one here.")
def pull(session: Session, release: str, daily: bool, minimal: bool, refresh: bool) -> None:
    """Download the image of an Ubuntu RELEASE, unless it is here already, and print its path."""
    cloud = session.cloud
    if release in BUILT_RELEASES:
        raise click.UsageError(
            f"Debian's images are built here: 'pycloudlib images build {release}'"
        )
    imagenames.check_release(cloud, release)
    kind = ImageType.MINIMAL if minimal else ImageType.GENERIC
    if daily:
        image = cloud.daily_image(release, image_type=kind, on_progress=session.progress)
    else:
        image = cloud.released_image(
            release, image_type=kind, refresh=refresh, on_progress=session.progress
        )
    click.echo(image)


@command("build", short_help="Build a Debian image from signed packages.")
@click.argument("release", type=click.Choice(BUILT_RELEASES), default=BUILT_RELEASES[0])
@click.option("-p", "--package", "packages", multiple=True, help="A package to install.")
@click.option("-d", "--disk", type=Size("G"), help="Size of its disk, such as 8G.")
@click.option("--user", "default_user", help="Its login user.")
@click.option("--mirror", help="URL of the Debian mirror.")
@click.option("--refresh", is_flag=True, help="Build again, with the newest packages.")
def build(
    session: Session,
    release: str,
    packages: tuple[str, ...],
    disk: int | None,
    default_user: str | None,
    mirror: str | None,
    refresh: bool,
) -> None:
    """Build an image of a Debian RELEASE, unless the same one is here, and print its path."""
    given = {"disk_size_gib": disk, "default_user": default_user, "mirror": mirror}
    options = {name: value for name, value in given.items() if value is not None}
    image = session.cloud.build_image(
        release, packages, on_progress=session.progress, refresh=refresh, **options
    )
    click.echo(image)


@command("export", short_help="Write an image as one file.")
@click.argument("image", type=ImageName())
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--compress/--no-compress", default=True, help="A smaller file, which takes longer.")
def export(session: Session, image: str, path: Path, compress: bool) -> None:
    """Write an IMAGE, with all its backing files, to PATH as one qcow2 file."""
    session.cloud.export_image(_find(session, image), path, compress, on_progress=session.progress)


@command("delete", short_help="Delete images.")
@click.argument("images_", type=ImageName(), nargs=-1, required=True, metavar="IMAGE...")
def delete_images(session: Session, images_: tuple[str, ...]) -> None:
    """Delete images and snapshots that no machine is built on."""
    for found in [_find(session, image) for image in images_]:
        session.cloud.delete_image(found)


@command("prune", short_help="Delete old builds.")
@click.option("--keep", type=click.IntRange(0), default=1, help="Newest builds of each to keep.")
@json_option
def prune(session: Session, keep: int, as_json: bool) -> None:
    """Delete old builds that no machine and no snapshot is built on, and print their paths."""
    deleted = session.cloud.prune_images(keep)
    if as_json:
        print_json(deleted)
        return
    for path in deleted:
        click.echo(path)


@command("lock", short_help="Pin a release to its newest build.")
@click.argument("release", type=ImageName(), required=False)
@_daily
@_minimal
@click.option("--update", is_flag=True, help="Pin all pinned releases to their newest builds.")
def lock(session: Session, release: str | None, daily: bool, minimal: bool, update: bool) -> None:
    """Pin a RELEASE to its newest build, in pycloudlib.lock, and print the build's serial."""
    if (release is not None) is update:
        raise click.UsageError("Name a RELEASE, or give --update")
    if release is None:
        serials = session.cloud.update_image_lock()
    else:
        kind = ImageType.MINIMAL if minimal else ImageType.GENERIC
        serials = [session.cloud.lock_image(release, daily=daily, image_type=kind)]
    for serial in serials:
        click.echo(serial)


def _find(session: Session, image: str) -> str:
    """Return the id of an image on this host.

    Raises:
        ImageNotFoundError: No image here has that name; suggests the nearest.
    """
    cloud = session.cloud
    try:
        found = imagenames.find_here(cloud, image)
    except ImageNotFoundError:
        found = None
    if found is None:
        stored = [stored.image_id for stored in cloud.images() if stored.release == image]
        found = stored[0] if len(stored) == 1 else None
    if found is None:
        raise imagenames.unknown_image(cloud, image)
    return found


@command("snapshot", short_help="Make an image of a machine.")
@click.argument("name", type=MachineName())
@click.option("--memory", is_flag=True, help="Save the running machine; its copies do not boot.")
@click.option("--clean/--no-clean", default=True, help="Whether copies boot as for the first time.")
def snapshot(session: Session, name: str, memory: bool, clean: bool) -> None:
    """Make an image of a machine, and print its name, which `launch` takes.

    An image of the disk switches the machine off; one that is off already is saved as it is. With
    --memory the machine continues, with its connections, and `launch` starts copies that continue
    from the same moment at once.
    """
    instance = open_running(session, name)
    image = session.cloud.snapshot(instance, clean, memory=memory)
    click.echo(Path(image).stem)
    if not memory:
        session.note(f"{name} is off: 'pycloudlib start {name}' switches it on")


@command("fork", short_help="Start running copies of a running machine.")
@click.argument("name", type=MachineName())
@click.option("-n", "--name", "new_name", type=NewName(), help="Name of the copy.")
@click.option("--count", type=click.IntRange(1, 50), default=1, help="How many; 1 by default.")
@click.option(
    "--fresh-identity",
    is_flag=True,
    help="Give each copy a new hostname, machine-id and host key.",
)
def fork(
    session: Session, name: str, new_name: str | None, count: int, fresh_identity: bool
) -> None:
    """Start copies of a machine that continue from this moment, and print their names.

    The machine itself continues, too. Several copies are called NAME-1, NAME-2 and so on.
    """
    instance = open_running(session, name)
    prefix = instance.name if new_name is None else new_name
    if new_name is not None and count == 1:
        names = [new_name]
    else:
        names = list(itertools.islice(free_names(session.cloud.working_dir, prefix), count))
    for copy in instance.fork(count, fresh_identity=fresh_identity, names=names):
        click.echo(copy.name)


@command("rollback", short_help="Return a machine to a snapshot.")
@click.argument("name", type=MachineName())
@click.argument("snapshot", type=ImageName(), required=False)
def rollback(session: Session, name: str, snapshot: str | None) -> None:
    """Return a machine to a SNAPSHOT with memory, by default its latest one.

    It continues from the snapshot; all changes since are lost.
    """
    cloud = session.cloud
    instance = open_machine(cloud, name)
    if snapshot is not None:
        image = imagenames.find_here(cloud, snapshot)
        if image is None:
            raise imagenames.unknown_image(cloud, snapshot)
    else:
        latest = imagenames.find_saved_of(cloud.working_dir, instance.name)
        if latest is None:
            raise ImageNotFoundError(
                message=f"{name} has no snapshot to go back to: "
                f"'pycloudlib snapshot --memory {name}' makes one"
            )
        image = str(latest)
    instance.rollback(image)


for _command in (list_images, pull, build, export, delete_images, prune, lock):
    images.add_command(_command)
