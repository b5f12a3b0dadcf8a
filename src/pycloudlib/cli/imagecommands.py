"""`images`: what is here, got, built, written out, deleted and pinned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from pycloudlib.cli.machines import ImageName, Size
from pycloudlib.cli.output import (
    age_in_words,
    print_json,
    print_table,
    size_in_words,
    timestamp,
)
from pycloudlib.cli.session import Session, command, json_option
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
    """An image, as `images list --json` tells of it.

    Attributes:
        name: By what commands take it.
        kind: `image`, `snapshot` of a disk, or `saved machine`.
        id: Its id, which is its path.
        release: Series or suite; empty where it is not known.
        serial: The build serial; empty where it is not known.
        size_bytes: What its file takes on disk.
        source: Where it came from.
        last_used: When a machine was last launched from it, or it came here, by ISO 8601 in UTC.
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
    """Images that machines are launched from: what is here, got, built, written out, deleted."""


@command("list", short_help="List the images that are here.")
@json_option
def list_images(session: Session, as_json: bool) -> None:
    """List the images that are here: downloaded, built, and made of machines."""
    seen = _collect(session)
    if as_json:
        print_json([told for told, _used in seen])
    elif seen:
        print_table(
            ("name", "kind", "size", "used", "from"),
            [
                (
                    told.name,
                    told.kind,
                    size_in_words(told.size_bytes),
                    f"{age_in_words(used)} ago",
                    told.source.partition(" ")[0] if told.kind == "image" else told.source,
                )
                for told, used in seen
            ],
        )
    else:
        session.note("There are no images; 'pycloudlib images pull' or 'build' gets one")


def _collect(session: Session) -> list[tuple[ImageFacts, float]]:
    cloud = session.cloud
    seen = []
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
        seen.append((facts, stored.last_used))
    bases = set(imagenames.fork_bases(cloud.working_dir))
    for path in imagenames.snapshots(cloud.working_dir):
        if path not in bases:
            seen.append(_describe_snapshot(path))
    return seen


def _describe_snapshot(path: Path) -> tuple[ImageFacts, float]:
    record = store.find_record(path)
    facts = path.stat()
    size = facts.st_blocks * 512
    directory = savedmachine.directory_of(path)
    if directory.is_dir():
        size += sum(file.stat().st_blocks * 512 for file in directory.iterdir())
    used = store.record_path(path).stat().st_mtime if record else facts.st_mtime
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
@click.option("--refresh", is_flag=True, help="Ask the server for a newer build than is here.")
def pull(session: Session, release: str, daily: bool, minimal: bool, refresh: bool) -> None:
    """Download the image of an Ubuntu RELEASE, unless it is here, and print its path."""
    cloud = session.cloud
    if release in BUILT_RELEASES:
        raise click.UsageError(f"Debian's are built here: 'pycloudlib images build {release}'")
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
@click.option("-p", "--package", "packages", multiple=True, help="A package to add.")
@click.option("-d", "--disk", type=Size("G"), help="Size of its disk, such as 8G.")
@click.option("--user", "default_user", help="Its login user.")
@click.option("--mirror", help="URL of the Debian mirror.")
@click.option("--refresh", is_flag=True, help="Build anew, with the packages of today.")
def build(
    session: Session,
    release: str,
    packages: tuple[str, ...],
    disk: int | None,
    default_user: str | None,
    mirror: str | None,
    refresh: bool,
) -> None:
    """Build an image of a Debian RELEASE, unless the same is here, and print its path."""
    asked = {"disk_size_gib": disk, "default_user": default_user, "mirror": mirror}
    options = {name: value for name, value in asked.items() if value is not None}
    image = session.cloud.build_image(
        release, packages, on_progress=session.progress, refresh=refresh, **options
    )
    click.echo(image)


@command("export", short_help="Write an image as one file.")
@click.argument("image", type=ImageName())
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--compress/--no-compress", default=True, help="Smaller, and slower to write.")
def export(session: Session, image: str, path: Path, compress: bool) -> None:
    """Write an IMAGE, and all that it is built on, to PATH as one qcow2 file."""
    found = _find(session, image)
    session.cloud.export_image(found, path, compress, on_progress=session.progress)


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
@click.option("--update", is_flag=True, help="Pin all that is pinned to the newest builds.")
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
    """Find an image that has to be here.

    Raises:
        ImageNotFoundError: It is not; tells the nearest.
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


for _command in (list_images, pull, build, export, delete_images, prune, lock):
    images.add_command(_command)
