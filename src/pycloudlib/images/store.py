"""What is in `image_dir`: images, the files beside them, and what is known of each.

Beside an image `NAME.img` stand its kernel (`NAME-vmlinuz-generic`), its initrd
(`NAME-initrd-generic`) and its record (`NAME.img.json`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from pycloudlib._base.documents import decode, parse_json
from pycloudlib._base.files import (
    expand_user,
    is_file,
    is_not_found,
    is_shared_with_group,
    read_bounded,
    remove_file,
    replace_atomically,
    write_private,
)
from pycloudlib.errors import ImageNotFoundError

_log = logging.getLogger(__name__)

DEFAULT_USER = "ubuntu"
"""The login user of an image without a record: Ubuntu's own."""

# A day, and a number when there was more than one build on it: "20240821", "20260930.1".
_SERIAL = re.compile(r"([0-9]{8})(?:\.([0-9]{1,4}))?")
# Seconds after which an incomplete file is abandoned.
_CUT_OFF_AGE = 86400
_LONGEST_RECORD = 1 << 20


def is_serial(text: str) -> bool:
    """Whether a text has the form of a build serial."""
    return _SERIAL.fullmatch(text) is not None


def is_future_serial(serial: str) -> bool:
    """Whether a build serial names a day that has not begun anywhere on earth."""
    tomorrow = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=1)
    return serial_order(serial)[0] > int(f"{tomorrow:%Y%m%d}")


def serial_order(serial: str) -> tuple[int, int]:
    """Return the sort key of a build serial, oldest first; what is no serial comes first."""
    match = _SERIAL.fullmatch(serial)
    return (int(match[1]), int(match[2] or 0)) if match else (0, 0)


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """What is known of a stored image.

    Attributes:
        release: Series or suite ("noble", "bookworm").
        serial: The build serial ("20240821", "20260930.1").
        sha256: Digest of the image file, lower-case hexadecimal.
        size: Length of the image file in bytes.
        source: Where it comes from: its URL, or "built" and the builder's recipe key.
        default_user: The login user that cloud-init creates in it.
        vouchers: Who vouches for a downloaded one (`ImageSource.voucher`): it was found in a
            catalog that they signed, and the files beside it in a list that they signed. Empty if
            that is unknown.
        names: The names of its release in its catalog ("noble", "24.04", "lts"). Older versions
            recorded neither these nor vouchers.
        pinned: Whether only a lock has chosen this build: without that lock it is used only where
            the newest is not available.
    """

    release: str
    serial: str
    sha256: str
    size: int
    source: str
    default_user: str = DEFAULT_USER
    vouchers: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image in `image_dir`.

    Attributes:
        image_id: Its id, which is its path.
        release: Series or suite ("noble", "bookworm"); without a record, the name of its
            directory.
        serial: The build serial.
        size: Length of its file in bytes.
        sha256: The digest that its file was verified by; empty if it never was.
        source: Where it comes from.
        last_used: When a machine was last launched from it, or it was stored, in seconds since the
            epoch.
    """

    image_id: str
    release: str
    serial: str
    size: int
    sha256: str
    source: str
    last_used: float


def list_images(image_dir: Path) -> list[StoredImage]:
    """List the images in their places below `image_dir`, by release, the newest build first."""
    found = []
    for image in image_dir.glob("*/*/*.img"):
        if image.is_file() and is_serial(image.parent.name):
            # Another process may delete it just now.
            with contextlib.suppress(FileNotFoundError):
                found.append(_describe(image))
    newest_first = sorted(found, key=lambda stored: serial_order(stored.serial), reverse=True)
    return sorted(newest_first, key=lambda stored: Path(stored.image_id).parent.parent.name)


def _describe(image: Path) -> StoredImage:
    record = find_record(image)
    described_by = image if record is None else record_path(image)
    return StoredImage(
        image_id=str(image),
        release=record.release if record else image.parent.parent.name,
        serial=image.parent.name,
        size=image.stat().st_size,
        sha256=record.sha256 if record else "",
        source=record.source if record else "",
        last_used=described_by.stat().st_mtime,
    )


def record_use(image: Path) -> None:
    """Record that a machine was launched from an image, by the time of its record."""
    # It may have no record, or belong to another user.
    with contextlib.suppress(OSError):
        os.utime(record_path(image))


def kernel_path(image: Path) -> Path:
    """Return the path of the kernel beside an image; it need not exist."""
    return image.with_name(f"{image.stem}-vmlinuz-generic")


def initrd_path(image: Path) -> Path:
    """Return the path of the initrd beside an image; it need not exist."""
    return image.with_name(f"{image.stem}-initrd-generic")


def record_path(image: Path) -> Path:
    """Return the path of the record beside an image; it need not exist."""
    return image.with_name(f"{image.name}.json")


def write_record(image: Path, record: ImageRecord) -> None:
    """Write the record beside an image, complete or not at all; with the image's permissions."""
    with replace_atomically(record_path(image)) as temporary:
        write_private(temporary, json.dumps(dataclasses.asdict(record), indent=1) + "\n")
        if image.exists():
            temporary.chmod(stat.S_IMODE(image.stat().st_mode))


def inherit(image: Path, base: Path, source: str) -> None:
    """Link the base's kernel and copy its record for an image made of a machine's disk.

    The digest stays empty: it would take as long as reading the whole disk.
    """
    for name in (kernel_path, initrd_path):
        if is_file(name(base)):
            name(image).symlink_to(name(base))
    known = find_record(base)
    record = ImageRecord(
        release=known.release if known else "",
        serial=known.serial if known else "",
        sha256="",
        size=image.stat().st_size,
        source=source,
        default_user=known.default_user if known else DEFAULT_USER,
    )
    write_record(image, record)


def find_record(image: Path) -> ImageRecord | None:
    """Read the record beside an image; None if there is none, or a damaged one, which is logged."""
    record = record_path(image)
    try:
        return decode(ImageRecord, parse_json(read_bounded(record, _LONGEST_RECORD)))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and is_not_found(error):
            return None
        _log.warning("%s is damaged and is not used: %s", record, error)
        return None


def find_unprotected(image: Path) -> Path | None:
    """Return a file of a stored image, or its directory, that other users could change, if any.

    This user, root, the owner of `image_dir` and the members of the group that it is shared with
    may change it.
    """
    beside = (image, kernel_path(image), initrd_path(image), record_path(image))
    image_dir = image.parents[2].stat()
    owners = {0, os.geteuid(), image_dir.st_uid}
    # Only a member can have made files of that group there.
    is_shared = all(map(is_shared_with_group, image.parents[1:3]))
    for path in (image.parent, *beside):
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            is_members = is_shared and found.st_gid == image_dir.st_gid
            if (found.st_uid not in owners and not is_members) or found.st_mode & stat.S_IWOTH:
                return path
    return None


def resolve(image_id: str, image_dir: Path) -> Path:
    """Find the image file that an id names: an absolute path, or one below `image_dir`.

    Raises:
        ImageNotFoundError: There is no such file; says where it was looked for.
    """
    path = locate(image_id, image_dir)
    if not is_file(path):
        message = f"No image {image_id!r}: {path} is not a file"
        raise ImageNotFoundError(image_id, message=message)
    return path


def locate(image_id: str, image_dir: Path) -> Path:
    """Return the path that an id stands for; it need not exist.

    Raises:
        TypeError: The id is not a text.
    """
    if not isinstance(image_id, (str, os.PathLike)):
        raise TypeError(f"image_id must be a text, not {image_id!r}")
    return (image_dir / expand_user(image_id)).absolute()


def find_serial(image: Path) -> str:
    """Return the build serial of an image, from its record or the name of its directory.

    Raises:
        ImageNotFoundError: Neither has it.
    """
    record = find_record(image)
    if record is not None and record.serial:
        return record.serial
    if is_serial(image.parent.name):
        return image.parent.name
    raise ImageNotFoundError(
        str(image),
        message=f"The serial of {image} is unknown: it was not downloaded or built by this package",
    )


def remove_stale_downloads(image_dir: Path) -> None:
    """Remove the incomplete files of abandoned downloads."""
    for partial in image_dir.glob("*/*/.*.part"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > _CUT_OFF_AGE:
                partial.unlink()


def delete(image: Path, image_dir: Path) -> None:
    """Remove an image and what stands beside it, and the directory of its serial.

    Args:
        image: The image; a missing one is no error.
        image_dir: Where images are stored; directories elsewhere are not ours to remove.
    """
    for path in (image, kernel_path(image), initrd_path(image), record_path(image)):
        remove_file(path)
    if image.parent.is_relative_to(image_dir) and image.parent != image_dir:
        with contextlib.suppress(OSError):  # something else is in it
            image.parent.rmdir()
