"""What people call images, and which image a name means: a release, a snapshot, a build, a path.

The command line and the pytest plugin take these names. Snapshots have names only if they were made
of machines of the command line.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pycloudlib._base.documents import nearest
from pycloudlib._base.files import expand_user, is_file
from pycloudlib.errors import ImageNotFoundError
from pycloudlib.images import store
from pycloudlib.images.recipe import RELEASES as BUILT_RELEASES
from pycloudlib.progress import ProgressCallback
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.settings import COMMAND_LINE_TAG
from pycloudlib.util import UBUNTU_RELEASE_VERSION_MAP

if TYPE_CHECKING:
    from pycloudlib.qemu.cloud import Qemu

_ALIASES = ("devel", "lts")


def known_releases() -> list[str]:
    """List the releases that have a known name."""
    return [*BUILT_RELEASES, *UBUNTU_RELEASE_VERSION_MAP, *_ALIASES]


def snapshots(working_dir: Path) -> list[Path]:
    """List the images made of the command line's machines, the newest last."""
    cloud_directory = layers.cloud_directory(working_dir, COMMAND_LINE_TAG)
    images = layers.LayerStore(cloud_directory).snapshots.glob("*.img")
    return sorted((path for path in images if path.is_file()), key=_modified)


def _modified(image: Path) -> int:
    for file in (store.record_path(image), image):
        # The record is written a moment after the image; and both may be deleted just now.
        with contextlib.suppress(OSError):
            return file.stat().st_mtime_ns
    return 0


def snapshot_names(working_dir: Path) -> list[str]:
    """List the names of `snapshots`."""
    return [path.stem for path in snapshots(working_dir)]


def short_name(image: Path, image_dir: Path) -> str:
    """Return the shortest name by which `find_here` finds an image."""
    if layers.is_snapshot(image):
        return image.stem
    inside = image.relative_to(image_dir).parts if image.is_relative_to(image_dir) else ()
    if len(inside) == 3 and store.is_serial(inside[1]):
        return "/".join(inside[:2])
    return str(image)


def find_here(cloud: Qemu, text: str) -> str | None:
    """Find an image on this host by its name or path; None if it has to be downloaded or built.

    Raises:
        ImageNotFoundError: The text is a path, and no image.
    """
    for path in snapshots(cloud.working_dir):
        if text in (path.stem, path.name):
            return str(path)
    for stored in cloud.images():
        if text == short_name(Path(stored.image_id), cloud.image_dir):
            return stored.image_id
    if "/" not in text and Path(text).suffix not in (".img", ".qcow2", ".raw"):
        return None
    here = expand_user(text)
    return str(here.absolute() if is_file(here) else store.resolve(text, cloud.image_dir))


def get_image(cloud: Qemu, text: str, *, daily: bool, on_progress: ProgressCallback | None) -> str:
    """Return the id of the image that a name means; build or download it if it is not here.

    Args:
        cloud: The cloud whose images are searched.
        text: A release, a snapshot, a build (`noble/20260930`), or a path.
        daily: Whether a release means its daily image, not the released one.
        on_progress: Called with the progress of a build or a download.

    Raises:
        ImageNotFoundError: No image has that name; suggests the nearest.
        ValueError: The server knows no such release.
        ImageBuildError: The build or download failed.
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
    """Check that a text may be a release: a known one, or one that only the server may know.

    Raises:
        ImageNotFoundError: It is a misspelt name, or cannot be a release's name.
    """
    if text in (*known_releases(), *UBUNTU_RELEASE_VERSION_MAP.values()):
        return
    if nearest(text, _names(cloud)) or not re.fullmatch(r"[a-z]+|[0-9]{2}\.[0-9]{2}", text):
        raise unknown_image(cloud, text)


def unknown_image(cloud: Qemu, text: str) -> ImageNotFoundError:
    """Return the error that no image has a name; it suggests the nearest."""
    near = nearest(text, _names(cloud))
    hint = f"did you mean {near!r}?" if near else "'pycloudlib images list' lists what is here"
    return ImageNotFoundError(
        resource_name=text,
        message=f"There is no image {text!r}: it is neither a release, nor a snapshot, nor a file; "
        f"{hint}",
    )


def _names(cloud: Qemu) -> list[str]:
    return [*known_releases(), *snapshot_names(cloud.working_dir)]


def name_prefix(text: str) -> str:
    """Return the prefix of the names of machines launched from the image that a name means."""
    series = {version: name for name, version in UBUNTU_RELEASE_VERSION_MAP.items()}
    word = series.get(text, text)
    if word in known_releases():
        return word
    # A snapshot is called `MACHINE-1a2b3c4d`.
    machine = re.fullmatch(r"([a-z0-9][a-z0-9-]*)-[0-9a-f]{8}(?:\.img)?", word)
    return machine[1] if machine else "vm"


def find_saved_of(working_dir: Path, name: str) -> Path | None:
    """Find the latest snapshot with memory of a machine of the command line."""
    for image in reversed(snapshots(working_dir)):
        record = store.find_record(image)
        is_of_machine = record is not None and record.source == f"saved from {name}"
        if is_of_machine and savedmachine.find(image) is not None:
            return image
    return None


def fork_bases(working_dir: Path) -> Iterator[Path]:
    """List the snapshots on which forks are built: saved ones without their memory."""
    for image in snapshots(working_dir):
        record = store.find_record(image)
        is_saved = record is not None and record.source.startswith("saved from ")
        if is_saved and not savedmachine.directory_of(image).exists():
            yield image
