"""Released and daily images brought to `image_dir`, each with its kernel, initrd and record."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pycloudlib._base.files import create_directories, is_shared_with_group
from pycloudlib._base.locks import exclusive_lock
from pycloudlib.errors import ImageBuildError, ImageNotFoundError, ImageVerificationError
from pycloudlib.images import store, uses
from pycloudlib.images.catalog import CatalogEntry, check_release_form, image_name
from pycloudlib.images.download import (
    Client,
    Digest,
    download_file,
    open_client,
    shown_url,
)
from pycloudlib.images.source import (
    UNVERIFIED,
    ImageSource,
    Stream,
    fetch_sums,
)
from pycloudlib.progress import Progress, ProgressCallback, ignore_progress
from pycloudlib.util import UBUNTU_RELEASE_VERSION_MAP

# Bytes that are left free: a kernel and an initrd, whose sizes are not published, and some more.
_SPARE_SPACE = 256 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _File:
    """A file to download and its target."""

    url: str
    target: Path
    expected: Digest

    @property
    def partial(self) -> Path:
        """The file until it is complete, named by its content so that builds do not mix."""
        return self.target.with_name(f".{self.target.name}.{self.expected.sha256[:16]}.part")


def image_path(entry: CatalogEntry, image_dir: Path) -> Path:
    """Return the path of an image; it need not exist.

    `<image_dir>/24.04/<serial>/ubuntu-24.04-server-cloudimg-amd64.img` for a released one,
    `<image_dir>/noble/<serial>/noble-server-cloudimg-amd64.img` for a daily one.
    """
    return image_dir / entry.local_directory / entry.serial / f"{entry.name}.img"


def find_stored(
    source: ImageSource,
    image_dir: Path,
    stream: Stream,
    release: str,
    minimal: bool = False,
    *,
    pinned: bool = False,
) -> Path | None:
    """Find the newest image of a release that is on disk, without any network.

    The publisher that `source` trusts has to vouch for it, as for a download.

    Args:
        source: Whom to trust.
        image_dir: Where images are kept.
        stream: Released or daily builds.
        release: Series, version, or another name that the catalog had for it ("lts").
        minimal: Whether the minimal variant is wanted.
        pinned: Whether to include images that are here only because a lock has chosen them.

    Raises:
        ValueError: `release` cannot be the name of a release.
    """
    check_release_form(release)
    stored = [
        (store.serial_order(record.serial), image)
        for image in image_dir.glob("*/*/*.img")
        if image.stem == image_name(stream, image.parent.parent.name, minimal=minimal)
        and (record := _find_whole(image)) is not None
        and release in (record.release, image.parent.parent.name, *record.names)
        and _is_trusted(record, source)
        and (pinned or not record.pinned)
    ]
    return max(stored)[1] if stored else None


def find_unverified(
    source: ImageSource, image_dir: Path, stream: Stream, release: str, minimal: bool = False
) -> list[Path]:
    """Find images of a release that are in their places but not trusted, the newest first.

    The original pycloudlib leaves such images, without records: same places, same names. Others
    were downloaded while another publisher was trusted, or without verification.

    Arguments and errors are those of `find_stored`.
    """
    check_release_form(release)
    version = UBUNTU_RELEASE_VERSION_MAP.get(release, release)
    directory = version if stream is Stream.RELEASED else release
    name = f"{image_name(stream, directory, minimal=minimal)}.img"
    unverified = [
        image
        for image in (image_dir / directory).glob(f"*/{name}")
        if store.is_serial(image.parent.name)
        and not ((record := _find_whole(image)) and _is_trusted(record, source))
    ]
    unverified.sort(key=lambda image: store.serial_order(image.parent.name), reverse=True)
    return unverified


def fetch_image(
    entry: CatalogEntry,
    source: ImageSource,
    image_dir: Path,
    *,
    on_progress: ProgressCallback = ignore_progress,
    pinned: bool = False,
) -> Path:
    """Download an image to `image_dir`, with its kernel, its initrd and its record.

    Complete files are used as they are; without any network if all are complete. After a failure
    only the part of a file is left that was downloaded (`.NAME.DIGEST.part`), which the next call
    resumes. A file that has the image's name but another content is renamed (`NAME.replaced`).

    Args:
        entry: The build, from `find_entry`.
        source: The keys that signed the catalog, and have to have signed the kernel's checksums.
        image_dir: Where images are kept; made if missing.
        on_progress: Called with each piece of each file, in bytes.
        pinned: Whether a lock has chosen the build. Where nothing is verified, it may be in no
            catalog: then it has no vouchers, and is never found as a release.

    Returns:
        The path of the image.

    Raises:
        ImageBuildError: Something could not be downloaded or written.
        ImageVerificationError: Something is not what its publisher signed.
        ImageInUseError: A file of its name is not it, and machines are built on that.
        ImageNotFoundError: No kernel is published with the image.
        MissingPrerequisiteError: `gpgv` is not installed.
    """
    image = image_path(entry, image_dir)
    if is_complete(entry, source, image_dir):
        _update_record(image, entry, source, pinned=pinned)
        return image

    def report_wait(holder: str) -> None:
        on_progress(Progress(f"waiting for another process that downloads this image: {holder}"))

    # One for each image, outside its directory, which may not exist yet.
    lock = image_dir / f".{entry.local_directory}-{entry.serial}-{entry.name}.lock"
    with _new_directory(image_dir), exclusive_lock(lock, report_wait, remove=True):
        if not is_complete(entry, source, image_dir):
            _fetch(entry, source, image, on_progress, pinned=pinned)
    return image


def _fetch(
    entry: CatalogEntry,
    source: ImageSource,
    image: Path,
    on_progress: ProgressCallback,
    *,
    pinned: bool,
) -> None:
    vouchers = (source.voucher,) if source.verified or not pinned else ()
    with _new_directory(image.parent) as made, open_client(source.login, source.limits) as client:
        for directory in reversed(made):
            if is_shared_with_group(directory.parent):
                # All members of the group add builds, whatever the first one's umask is.
                directory.chmod(0o2775)
        _check_protected(image)
        _check_place(image, entry)
        files = [
            *_find_boot_files(client, entry, source, image),
            _File(entry.url, image, Digest(entry.sha256, entry.size)),
        ]
        missing = [file for file in files if not file.expected.matches(file.target)]
        if missing:
            _check_space(missing)
            for file in missing:
                download_file(
                    client, file.url, file.partial, file.expected, on_progress=on_progress
                )
            # A file that machines are built on is not replaced, even if it is damaged.
            with uses.removing(*(file.target for file in reversed(missing))):
                if not source.verified:
                    # First: an image without a record counts as one that the original left.
                    store.write_record(image, _make_record(entry, vouchers, pinned=pinned))
                _put_in_place(missing)
        elif (known := _find_whole(image)) is not None:
            # All of it is what both vouchers say.
            pinned = pinned and (known.pinned or not known.vouchers)
            vouchers = tuple(dict.fromkeys((*known.vouchers, *vouchers)))
        # Last: an image that has its record is complete.
        store.write_record(image, _make_record(entry, vouchers, pinned=pinned))


def _check_protected(image: Path) -> None:
    """Check that no other user can change what is going to be verified.

    Raises:
        ImageBuildError: Somebody can.
    """
    unprotected = store.find_unprotected(image)
    if unprotected is not None:
        raise ImageBuildError(
            f"{unprotected} belongs to another user or can be written by all, who could change "
            "the image after it was verified; remove it, or take the permission away (chmod o-w), "
            "or share image_dir with a group (chmod g+ws)"
        )


def _check_place(image: Path, entry: CatalogEntry) -> None:
    """Check that no signed image is in the place of this one: machines may be built on it.

    Raises:
        ImageVerificationError: There is another image in the place of this one, and a key vouches
            for it.
    """
    known = _find_whole(image)
    if known is None or known.sha256 == entry.sha256:
        return
    if _is_signed(known):
        raise ImageVerificationError(
            f"{image} is here with SHA-256 {known.sha256}, for which trusted keys have vouched "
            f"({', '.join(known.vouchers)}), and is not replaced by one from "
            f"{shown_url(entry.url)} with SHA-256 {entry.sha256}. Delete it, or use another "
            "image_dir"
        )


def is_complete(entry: CatalogEntry, source: ImageSource, image_dir: Path) -> bool:
    """Whether an image is there, with its kernel and its record, and trusted."""
    image = image_path(entry, image_dir)
    # By digest, not by the whole record: another mirror's file is the same image.
    record = _find_whole(image)
    if record is None or record.sha256 != entry.sha256:
        return False
    trusted = not source.verified or _is_trusted(record, source)
    return trusted and store.kernel_path(image).is_file()


def is_stored_as_pinned(pin: CatalogEntry, name: str, source: ImageSource, image_dir: Path) -> bool:
    """Whether a pinned image is here, and was found in the catalog as it is pinned.

    Args:
        pin: The build, from a lock.
        name: What its release has to be called.
        source: Whose catalog it has to have been.
        image_dir: Where images are kept.
    """
    record = _find_whole(image_path(pin, image_dir))
    if record is None:
        return False
    # An older version recorded no names; a series has one version for ever.
    version = UBUNTU_RELEASE_VERSION_MAP.get(record.release, "")
    names = record.names or (record.release, version)
    return (
        is_complete(pin, source, image_dir)
        and (record.release, record.size) == (pin.release, pin.size)
        and {pin.release, pin.version, name} <= set(names)
    )


def _is_trusted(record: store.ImageRecord, source: ImageSource) -> bool:
    """Whether the publisher vouches for an image that would have to vouch for a download now.

    Older versions recorded no vouchers, and trusted locks as well as signed catalogs. An image that
    they fetched from its place on the mirror is the mirror's all the same.
    """
    if record.vouchers or record.names:
        return source.trusts(record.vouchers)
    return not store.is_future_serial(record.serial) and source.has_build_at(
        record.source, record.serial
    )


def _update_record(image: Path, entry: CatalogEntry, source: ImageSource, *, pinned: bool) -> None:
    """Update the names and the pin in an image's record, by which it is found."""
    record = store.find_record(image)
    if record is None or not record.vouchers:
        return
    # An unsigned catalog does not name a signed image, and a lock names none.
    if not source.verified and (pinned or _is_signed(record)):
        return
    now = dataclasses.replace(record, names=entry.names, pinned=record.pinned and pinned)
    if now != record:
        with contextlib.suppress(OSError):  # it may be another's image, which only they record
            store.write_record(image, now)


def _is_signed(record: store.ImageRecord) -> bool:
    """Whether a key vouches for an image."""
    return bool(set(record.vouchers) - {UNVERIFIED})


def _find_whole(image: Path) -> store.ImageRecord | None:
    """Read the record of an image that has not changed since; None if it has, or has no record.

    Its length has to be the recorded one, the recorded serial that of its directory, and no other
    user may be able to change it.
    """
    record = store.find_record(image)
    if record is None or not image.is_file() or image.stat().st_size != record.size:
        return None
    unprotected = store.find_unprotected(image)
    if unprotected is not None:
        _log.warning(
            "%s is not used: %s belongs to another user or can be written by all",
            image,
            unprotected,
        )
        return None
    return record if record.serial == image.parent.name else None


def _make_record(
    entry: CatalogEntry, vouchers: tuple[str, ...], *, pinned: bool
) -> store.ImageRecord:
    return store.ImageRecord(
        release=entry.release,
        serial=entry.serial,
        sha256=entry.sha256,
        size=entry.size,
        source=shown_url(entry.url),
        vouchers=vouchers,
        names=entry.names,
        pinned=pinned,
    )


def _find_boot_files(
    client: Client, entry: CatalogEntry, source: ImageSource, image: Path
) -> Sequence[_File]:
    """Find kernel and initrd in the signed list of the directory `unpacked/` beside the image.

    An image may do without an initrd, but none is without a kernel.
    """
    directory = f"{entry.url.rpartition('/')[0]}/unpacked/"
    sums = fetch_sums(client, f"{directory}SHA256SUMS", entry.serial, source)
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


def _check_space(files: Sequence[_File]) -> None:
    """Check that there is space for the files, as far as their sizes are known.

    Raises:
        ImageBuildError: There is not enough.
    """
    needed = sum(file.expected.size or 0 for file in files) + _SPARE_SPACE
    present = sum(file.partial.stat().st_size for file in files if file.partial.exists())
    directory = files[0].target.parent
    free = shutil.disk_usage(directory).free
    if free < needed - present:
        raise ImageBuildError(
            f"No room for {files[-1].target.name} in {directory}: {(needed - present) >> 20} MiB "
            f"are needed, {free >> 20} MiB are free"
        )


def _put_in_place(files: Sequence[_File]) -> None:
    """Rename files to their final names, once all of them are complete."""
    for file in files:
        if file.target.exists():  # it may be a changed image that is still wanted
            kept = file.target.with_name(f"{file.target.name}.replaced")
            file.target.replace(kept)
            _log.warning("%s is not what its publisher signed; kept as %s", file.target, kept)
        file.partial.replace(file.target)


@contextlib.contextmanager
def _new_directory(directory: Path) -> Iterator[list[Path]]:
    """Make a directory and yield what was made, innermost first; on failure, remove it if empty."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        # Other users may read the images of a shared directory.
        create_directories(directory, 0o755)
        yield made
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
