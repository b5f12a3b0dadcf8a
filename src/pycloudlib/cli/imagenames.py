"""What people call images, turned into ids: a release, a snapshot, or a path."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from pycloudlib import Qemu
from pycloudlib._base.files import expand_user, is_file
from pycloudlib.cli.output import nearest
from pycloudlib.cli.session import TAG
from pycloudlib.errors import ImageNotFoundError
from pycloudlib.images import store
from pycloudlib.images.recipe import RELEASES as BUILT_RELEASES
from pycloudlib.progress import ProgressCallback
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.state import savedmachine
from pycloudlib.util import UBUNTU_RELEASE_VERSION_MAP

_ALIASES = ("devel", "lts")


def known_releases() -> list[str]:
    """List the releases that are known by name."""
    return [*BUILT_RELEASES, *UBUNTU_RELEASE_VERSION_MAP, *_ALIASES]


def snapshots(working_dir: Path) -> list[Path]:
    """List the images that were made of the command line's machines, the newest last."""
    store_of_all = layers.LayerStore(layers.cloud_directory(working_dir, TAG))
    found = [path for path in store_of_all.snapshots.glob("*.img") if path.is_file()]
    return sorted(found, key=_made_at)


def _made_at(image: Path) -> int:
    for file in (store.record_path(image), image):
        # The record is written a moment after the image; and both may be deleted just now.
        with contextlib.suppress(OSError):
            return file.stat().st_mtime_ns
    return 0


def short_name(image: Path, image_dir: Path) -> str:
    """Give an image by as few words as tell it from others, which name it in turn."""
    if layers.is_snapshot(image):
        return image.stem
    inside = image.relative_to(image_dir).parts if image.is_relative_to(image_dir) else ()
    if len(inside) == 3 and store.is_serial(inside[1]):
        return "/".join(inside[:2])
    return str(image)


def snapshot_names(working_dir: Path) -> list[str]:
    """Name those images."""
    return [path.stem for path in snapshots(working_dir)]


def find_here(cloud: Qemu, text: str) -> str | None:
    """Find an image that is here by its name or path; None where it would have to be got."""
    for path in snapshots(cloud.working_dir):
        if text in (path.stem, path.name):
            return str(path)
    for stored in cloud.images():
        if text == short_name(Path(stored.image_id), cloud.image_dir):
            return stored.image_id
    is_path = "/" in text or Path(text).suffix in (".img", ".qcow2", ".raw")
    here = expand_user(text)
    if is_path and is_file(here):
        return str(here.absolute())
    if is_path:
        return str(store.resolve(text, cloud.image_dir))
    return None


def get_image(cloud: Qemu, text: str, *, daily: bool, on_progress: ProgressCallback | None) -> str:
    """Give the id of an image by what people call it; it is built or downloaded if need be.

    Args:
        cloud: Where images are kept.
        text: A release, a snapshot, a build (`noble/20260930`), or a path.
        daily: Whether the daily image of a release is meant, not the released one.
        on_progress: Told of a build or a download.

    Raises:
        ImageNotFoundError: There is none; tells the nearest.
        ValueError: The server knows no such release.
        ImageBuildError: It could not be got.
    """
    try:
        found = find_here(cloud, text)
    except ImageNotFoundError as error:
        raise unknown_image(cloud, text) from error
    if found is not None:
        return found
    if text in BUILT_RELEASES:
        return cloud.build_image(text, on_progress=on_progress)
    check_release(cloud, text)
    if daily:
        return cloud.daily_image(text, on_progress=on_progress)
    return cloud.released_image(text, on_progress=on_progress)


def check_release(cloud: Qemu, text: str) -> None:
    """Make sure that a text may be a release: known, or like none that is; a server decides.

    Raises:
        ImageNotFoundError: It is a slip of one that is known, or cannot be a release's name.
    """
    versions = UBUNTU_RELEASE_VERSION_MAP.values()
    if text in (*known_releases(), *versions):
        return
    if nearest(text, _known(cloud)) or not re.fullmatch(r"[a-z]+|[0-9]{2}\.[0-9]{2}", text):
        raise unknown_image(cloud, text)


def unknown_image(cloud: Qemu, text: str) -> ImageNotFoundError:
    """Tell that there is no image of a name, and what there is that is like it."""
    near = nearest(text, _known(cloud))
    hint = f"did you mean {near!r}?" if near else "'pycloudlib images list' tells what is here"
    return ImageNotFoundError(
        resource_name=text,
        message=f"There is no image {text!r}: it is neither a release, nor a snapshot, nor a file; "
        f"{hint}",
    )


def _known(cloud: Qemu) -> list[str]:
    return [*known_releases(), *snapshot_names(cloud.working_dir)]


def name_prefix(text: str) -> str:
    """Give what the name of a machine begins with whose image is called so."""
    series = {version: name for name, version in UBUNTU_RELEASE_VERSION_MAP.items()}
    word = series.get(text, text)
    if word in known_releases():
        return word
    # A snapshot is called `MACHINE-1a2b3c4d`.
    machine = re.fullmatch(r"([a-z0-9][a-z0-9-]*)-[0-9a-f]{8}(?:\.img)?", word)
    return machine[1] if machine else "vm"


def find_saved_of(working_dir: Path, name: str) -> Path | None:
    """Find the latest snapshot of a machine that it can be rolled back to."""
    for image in reversed(snapshots(working_dir)):
        record = store.find_record(image)
        made_of_it = record is not None and record.source == f"saved from {name}"
        if made_of_it and savedmachine.find(image) is not None:
            return image
    return None


def fork_bases(working_dir: Path) -> Iterator[Path]:
    """List what forks are built on, which nobody launches from: saved, with its memory dropped."""
    for image in snapshots(working_dir):
        record = store.find_record(image)
        saved = record is not None and record.source.startswith("saved from ")
        if saved and not savedmachine.directory_of(image).exists():
            yield image
