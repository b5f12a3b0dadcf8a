"""Released and daily images brought to `image_dir`, each with its kernel, initrd and record."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pycloudlib.errors import ImageBuildError, ImageNotFoundError, ImageVerificationError
from pycloudlib.files import create_directories, exclusive_lock
from pycloudlib.images import store
from pycloudlib.images.catalog import CatalogEntry, check_release_form, image_name
from pycloudlib.images.download import (
    Digest,
    download_file,
    fetch_bytes,
    open_client,
    shown_url,
)
from pycloudlib.images.signature import load_trusted_keys, verify_detached
from pycloudlib.images.source import ImageSource, Stream
from pycloudlib.progress import Progress, ProgressCallback, ignore_progress
from pycloudlib.util import UBUNTU_RELEASE_VERSION_MAP

if TYPE_CHECKING:
    import httpx

# Bytes that are left free: a kernel and an initrd, whose sizes are not published, and some more.
_SPARE_ROOM = 256 << 20

# As sha256sum(1) writes it; "*" marks that the file was read as binary.
_SUM_LINE = re.compile(r"(?P<sha256>[0-9a-f]{64}) [ *](?P<name>[^/\s]+)")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _File:
    """A file to download and where it goes."""

    url: str
    target: Path
    expected: Digest

    @property
    def partial(self) -> Path:
        """Where it is as long as it is not whole: by its content, so that builds do not mix."""
        return self.target.with_name(f".{self.target.name}.{self.expected.sha256[:16]}.part")


def image_path(entry: CatalogEntry, image_dir: Path) -> Path:
    """Name the file of an image; it need not exist.

    `<image_dir>/24.04/<serial>/ubuntu-24.04-server-cloudimg-amd64.img` for a released one,
    `<image_dir>/noble/<serial>/noble-server-cloudimg-amd64.img` for a daily one.
    """
    return image_dir / entry.local_directory / entry.serial / f"{entry.name}.img"


def find_stored(
    image_dir: Path, stream: Stream, release: str, minimal: bool = False
) -> Path | None:
    """Find the newest image of a release that is on disk, without any network.

    A released image is found by series and by version, a daily one by its series: nothing on
    disk tells the version of that.

    Raises:
        ValueError: `release` cannot be the name of a release.
    """
    check_release_form(release)
    stored = [
        (store.serial_order(record.serial), image)
        for image in image_dir.glob("*/*/*.img")
        if image.stem == image_name(stream, image.parent.parent.name, minimal=minimal)
        and (record := _find_whole(image)) is not None
        and release in (record.release, image.parent.parent.name)
    ]
    return max(stored)[1] if stored else None


def find_unverified(
    image_dir: Path, stream: Stream, release: str, minimal: bool = False
) -> Path | None:
    """Find the newest image of a release that is in its place but has no record.

    The original pycloudlib leaves such images: same places, same names.

    Raises:
        ValueError: `release` cannot be the name of a release.
    """
    check_release_form(release)
    version = UBUNTU_RELEASE_VERSION_MAP.get(release, release)
    directory = version if stream is Stream.RELEASED else release
    name = f"{image_name(stream, directory, minimal=minimal)}.img"
    unverified = [
        image
        for image in (image_dir / directory).glob(f"*/{name}")
        if store.is_serial(image.parent.name) and store.find_record(image) is None
    ]
    return max(unverified, key=lambda image: store.serial_order(image.parent.name), default=None)


def fetch_image(
    entry: CatalogEntry,
    source: ImageSource,
    image_dir: Path,
    *,
    on_progress: ProgressCallback = ignore_progress,
) -> Path:
    """Bring an image to `image_dir`, with its kernel, its initrd and its record.

    What is there and whole is used as it is; without any network when that is all of it. On
    failure nothing new is left but what has come of a file, which the next call goes on with
    (`.NAME.DIGEST.part`). A file that has the image's name but another content is kept
    under a name of its own beside it.

    Args:
        entry: The build, from `find_entry`.
        source: The keys that have to have signed the kernel's checksums.
        image_dir: Where images are kept; made if missing.
        on_progress: Told of each piece of each file, in bytes.

    Returns:
        The path of the image.

    Raises:
        ImageBuildError: Something could not be downloaded or written.
        ImageVerificationError: Something is not what its publisher signed.
        ImageNotFoundError: No kernel is published with the image.
        MissingPrerequisiteError: `gpgv` is not installed.
    """
    image = image_path(entry, image_dir)
    if is_complete(entry, image_dir):
        return image
    waiting = Progress("waiting for another process that downloads this image")
    # One for each image, outside its directory, which may not be there yet.
    lock = image_dir / f".{entry.local_directory}-{entry.serial}-{entry.name}.lock"
    with _new_directory(image_dir), exclusive_lock(lock, on_wait=lambda: on_progress(waiting)):
        try:
            if not is_complete(entry, image_dir):
                _fetch(entry, source, image, on_progress)
        finally:
            lock.unlink()
    return image


def _fetch(
    entry: CatalogEntry, source: ImageSource, image: Path, on_progress: ProgressCallback
) -> None:
    with _new_directory(image.parent), open_client(source.login) as client:
        files = [
            *_find_boot_files(client, entry, source, image),
            _File(entry.url, image, Digest(entry.sha256, entry.size)),
        ]
        missing = [file for file in files if not file.expected.matches(file.target)]
        if missing:
            _check_room(missing)
            _download_all(client, missing, on_progress)
        # Last: an image that has its record is complete.
        store.write_record(image, _make_record(entry))


def is_complete(entry: CatalogEntry, image_dir: Path) -> bool:
    """Say whether an image is there, with its kernel and its record."""
    image = image_path(entry, image_dir)
    # By digest, not by the whole record: another mirror's file is the same image.
    record = _find_whole(image)
    same_image = record is not None and record.sha256 == entry.sha256
    return same_image and store.kernel_path(image).is_file()


def _find_whole(image: Path) -> store.ImageRecord | None:
    """Read the record of an image that has not lost or gained a byte since it was written."""
    record = store.find_record(image)
    if record is None or not image.is_file() or image.stat().st_size != record.size:
        return None
    return record


def _make_record(entry: CatalogEntry) -> store.ImageRecord:
    return store.ImageRecord(
        release=entry.release,
        serial=entry.serial,
        sha256=entry.sha256,
        size=entry.size,
        source=shown_url(entry.url),
    )


def _find_boot_files(
    client: httpx.Client, entry: CatalogEntry, source: ImageSource, image: Path
) -> Sequence[_File]:
    """Find kernel and initrd in the signed list of the directory `unpacked/` beside the image.

    An image may do without an initrd, but none is without a kernel.
    """
    directory = f"{entry.url.rpartition('/')[0]}/unpacked/"
    sums = _fetch_sums(client, f"{directory}SHA256SUMS", entry, source)
    targets = (store.kernel_path(image), store.initrd_path(image))
    if targets[0].name not in sums:
        raise ImageNotFoundError(
            resource_name=entry.release,
            message=f"No kernel for {shown_url(entry.url)}: {shown_url(directory)}SHA256SUMS "
            f"does not name {targets[0].name!r}",
        )
    return [
        _File(directory + target.name, target, Digest(sums[target.name]))
        for target in targets
        if target.name in sums
    ]


def _fetch_sums(
    client: httpx.Client, url: str, entry: CatalogEntry, source: ImageSource
) -> dict[str, str]:
    """Fetch a list of checksums with its detached signature; give them by file name.

    Nothing in it says which build it is of. An older build's has an older signature, though: it was
    made before the day that the build is named for.
    """
    content = fetch_bytes(client, url)
    if source.verified:
        keys = load_trusted_keys(source.keyring)
        signature = fetch_bytes(client, f"{url}.gpg")
        signed = verify_detached(content, signature, keys, shown_url(url))
        if f"{signed:%Y%m%d}" < entry.serial[:8]:
            raise ImageVerificationError(
                f"{shown_url(url)} was signed on {signed:%Y-%m-%d}, before the build "
                f"{entry.serial} beside it was made: its kernel is an older build's"
            )
    else:
        source.warn_if_unverified()
    return parse_sums(content)


def parse_sums(content: bytes) -> dict[str, str]:
    """Read a list of checksums; give them by file name. What is no line of one is passed over."""
    lines = map(_SUM_LINE.fullmatch, content.decode(errors="replace").splitlines())
    return {line["name"]: line["sha256"] for line in lines if line}


def _check_room(files: Sequence[_File]) -> None:
    """Make sure that the files have room, as far as their sizes are known.

    Raises:
        ImageBuildError: They have not.
    """
    needed = sum(file.expected.size or 0 for file in files) + _SPARE_ROOM
    there = sum(file.partial.stat().st_size for file in files if file.partial.exists())
    directory = files[0].target.parent
    free = shutil.disk_usage(directory).free
    if free < needed - there:
        raise ImageBuildError(
            f"No room for {files[-1].target.name} in {directory}: {(needed - there) >> 20} MiB are "
            f"needed, {free >> 20} MiB are free"
        )


def _download_all(
    client: httpx.Client, files: Sequence[_File], on_progress: ProgressCallback
) -> None:
    """Download files; none appears under its name before all of them are there."""
    for file in files:
        download_file(client, file.url, file.partial, file.expected, on_progress=on_progress)
    for file in files:
        _set_aside(file.target)
        file.partial.replace(file.target)


def _set_aside(path: Path) -> None:
    """Keep a file whose place is taken: it may be somebody's changed image."""
    if path.exists():
        kept = path.with_name(f"{path.name}.replaced")
        path.replace(kept)
        _log.warning("%s is not what its publisher signed; kept as %s", path, kept)


@contextlib.contextmanager
def _new_directory(directory: Path) -> Iterator[None]:
    """Make a directory; on failure, remove again what was made and is empty."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        # Others may use the images of a directory that is shared.
        create_directories(directory, 0o755)
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
