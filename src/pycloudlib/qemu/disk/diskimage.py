"""Disk images, checked before they are trusted; overlays on them, and exports."""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pycloudlib._base.documents import decode, parse_json, safe_repr
from pycloudlib._base.files import is_not_found, temporary_name
from pycloudlib._base.tools import run_tool, run_tool_streaming
from pycloudlib.errors import ToolError, describe_exit
from pycloudlib.progress import Progress, ProgressCallback
from pycloudlib.qemu.parts.part import OwnDisk

_T = TypeVar("_T")

_SECTOR = 512
_QCOW2_MAGIC = b"QFI\xfb"
_QCOW2_VERSIONS = (2, 3)
_QCOW2_SIZE_AT = 24  # docs/interop/qcow2.txt: the virtual size, 8 bytes, big-endian
# `check` exits with 3 for leaked clusters: wasted space, no damage (qemu-img(1)).
_ACCEPTED = (0, 3)
_LUKS_MAGIC = b"LUKS\xba\xbe"
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
}
_GPT_SIGNATURE = b"EFI PART"
_GIB = 1 << 30
_LARGEST_GIB = 64 * 1024
MINIMUM_DISK_SIZE = 10 * _GIB
"""The default minimum size of a machine's disk, in bytes."""
# The maximum length, in bytes, of the path of a backing file (docs/interop/qcow2.txt).
_LONGEST_BACKING_NAME = 1023
_QCOW2_HEADER = struct.Struct(">4sIQI")
_LAST_OFFSET = 1 << 60  # beyond the end of any file, and still valid for pread(2)


@dataclass(frozen=True, slots=True)
class BaseImage:
    """An image on which a machine's disk can be built.

    Attributes:
        path: The file.
        format: `qcow2` or `raw`.
        virtual_size: Size of the guest's disk, in bytes.
    """

    path: Path
    format: str
    virtual_size: int


def inspect_image(path: Path, trusted_dir: Path | None = None) -> BaseImage:
    """Check that a file is a complete disk image, and refers to no other file.

    Args:
        path: The file.
        trusted_dir: A directory of our own snapshots, which may have backing files.

    Raises:
        ValueError: It has another format, is encrypted, truncated or damaged, or refers to other
            files; says which, and what to do.
        MissingPrerequisiteError: qemu-img is not installed.
    """
    if trusted_dir is not None and path.resolve().is_relative_to(trusted_dir.resolve()):
        return read_layer(path)
    with path.open("rb") as file:
        start = file.read(2 * _SECTOR)
    if start.startswith(_QCOW2_MAGIC) and int.from_bytes(start[4:8], "big") in _QCOW2_VERSIONS:
        return _inspect_qcow2(path)
    _check_is_raw(path, start)
    return BaseImage(path, "raw", path.stat().st_size)


def read_layer(path: Path) -> BaseImage:
    """Read the header of a qcow2 file that this package made.

    Raises:
        ValueError: It is not one.
    """
    with path.open("rb") as file:
        header = file.read(_QCOW2_SIZE_AT + 8)
    if not header.startswith(_QCOW2_MAGIC) or len(header) < _QCOW2_SIZE_AT + 8:
        raise ValueError(f"{path} is not an image that was made here")
    return BaseImage(path, "qcow2", int.from_bytes(header[_QCOW2_SIZE_AT:], "big"))


def parse_size(disk_size_gib: int | None, image: BaseImage) -> int | None:
    """Return the size of a disk in bytes; None for the default size.

    Raises:
        TypeError: The size is not a whole number.
        ValueError: It is smaller than the image, or larger than a disk can be.
    """
    if disk_size_gib is None:
        return None
    if isinstance(disk_size_gib, bool) or not isinstance(disk_size_gib, int):
        raise TypeError(f"disk_size_gib must be a whole number, not {disk_size_gib!r}")
    least = max(1, -(-image.virtual_size // _GIB))
    if not least <= disk_size_gib <= _LARGEST_GIB:
        raise ValueError(
            f"disk_size_gib is {disk_size_gib}, expected {least} (what the image {image.path} "
            f"takes) to {_LARGEST_GIB}"
        )
    return disk_size_gib * _GIB


def create_overlay(
    base: BaseImage, path: Path, *, unopened: bool = False, size: int | None = None
) -> None:
    """Make an overlay on an image, which is never written to.

    The disk is at least 10 GiB, and never smaller than the image: qemu-img would truncate it
    without a warning.

    Args:
        base: The image.
        path: The new disk.
        unopened: Whether qemu-img must not open the image, since a running QEMU may write to it.
        size: Its size in bytes, not less than the image's; None for the default.

    Raises:
        ValueError: The path of the image is too long for a backing file.
    """
    _check_backing_name(base.path)
    size = max(base.virtual_size, MINIMUM_DISK_SIZE if size is None else size)
    # fmt: off
    argv: list[str | Path] = [
        "qemu-img", "create", "-q",
        *(["-u"] if unopened else []),
        "-f", "qcow2",
        "-F", base.format,
        "-b", base.path,
        path, str(size),
    ]
    # fmt: on
    _create_private(path)
    try:
        run_tool("making the disk overlay", argv)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def create_on_layer(layer: Path, path: Path) -> None:
    """Make a disk of the same length on a layer, which a running QEMU may still write to."""
    base = read_layer(layer)
    create_overlay(base, path, unopened=True, size=base.virtual_size)


def create_own(own: OwnDisk, path: Path) -> None:
    """Make a disk of a machine as it is at its first start.

    Args:
        own: The disk, whose length is known.
        path: Its file.
    """
    if own.image is None:
        create_empty(path, own.size)
    else:
        create_overlay(BaseImage(own.image, own.image_format, own.size), path, size=own.size)


def create_empty(path: Path, size: int = MINIMUM_DISK_SIZE) -> None:
    """Make an empty disk.

    Args:
        path: The new disk.
        size: Its length in bytes.
    """
    _create_private(path)
    run_tool("making an empty disk", ["qemu-img", "create", "-q", "-f", "qcow2", path, str(size)])


def _inspect_qcow2(path: Path) -> BaseImage:
    info = _qemu_img("info", path, parse_info)
    if info.encrypted:
        raise _encrypted(path, "qcow2")
    if info.outside:
        raise ValueError(
            f"The image {path} refers to another file, {info.outside!r}; such an image is refused "
            "because it could read any file of this host. Make it self-contained with "
            "'qemu-img convert -O qcow2'"
        )
    # `check` reads only the tables; the file's length shows whether data at its end is missing.
    end = _qemu_img("check", path, parse_end)
    # The end is in whole clusters, but a compressed image may end within its last one.
    if path.stat().st_size <= end - info.cluster_size:
        raise _truncated(path, end)
    return BaseImage(path, "qcow2", info.virtual_size)


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """The facts about an image, by qemu-img.

    Attributes:
        virtual_size: Size of the guest's disk, in bytes.
        cluster_size: Bytes of a cluster.
        outside: Another file to which it refers; empty if it is self-contained.
        encrypted: Whether reading it needs a key.
    """

    virtual_size: int
    cluster_size: int
    outside: str
    encrypted: bool = False


def parse_info(answer: bytes) -> ImageInfo:
    """Parse the output of `qemu-img info`.

    Raises:
        ValueError: It is malformed; says where.
    """
    facts = _inside(parse_json(answer))
    specific = _inside(_inside(facts, "format-specific"), "data")
    return decode(
        ImageInfo,
        {
            "virtual_size": facts.get("virtual-size"),
            "cluster_size": facts.get("cluster-size"),
            "encrypted": facts.get("encrypted", False),
            "outside": facts.get("backing-filename") or specific.get("data-file") or "",
        },
    )


def parse_end(answer: bytes) -> int:
    """Parse the end of an image, in bytes, in the output of `qemu-img check`; 0 if unknown.

    Raises:
        ValueError: It is malformed; says where.
    """
    end = _inside(parse_json(answer)).get("image-end-offset", 0)
    if type(end) is not int:
        raise ValueError(f"image-end-offset is {safe_repr(end)}, expected a whole number")
    return end


def _inside(answer: object, key: str | None = None) -> dict[str, Any]:
    """Return a JSON object, or the one at a key of it; an empty one if it does not have the key."""
    if not isinstance(answer, dict):
        raise ValueError(f"{safe_repr(answer)} is not keys and values")
    return answer if key is None else _inside(answer.get(key, {}))


def _qemu_img(command: str, path: Path, parse: Callable[[bytes], _T]) -> _T:
    argv: list[str | Path] = ["qemu-img", command, "-f", "qcow2", "--output=json", path]
    try:
        # A few bytes of an image can claim tables of any size.
        answer = run_tool(f"qemu-img {command}", argv, accepted=_ACCEPTED, bounded=True)
    except ToolError as error:
        if "Failed to get" in error.output and "lock" in error.output:
            raise ValueError(
                f"The image {path} is in use by another program that may write to it"
            ) from error
        messages = error.output.strip().splitlines()
        if "nsupported" in error.output:
            raise ValueError(f"The image {path} is not for this qemu-img: {messages[0]}") from error
        why = messages[0] if messages else describe_exit(error.exit_status)
        raise ValueError(
            f"The image {path} is truncated or damaged (qemu-img {command}: {why}). Fetch or build "
            "it again"
        ) from error
    try:
        return parse(answer.stdout)
    except ValueError as error:
        raise ValueError(
            f"What qemu-img {command} says of {path} cannot be understood: {error}"
        ) from error


def _check_is_raw(path: Path, start: bytes) -> None:
    """Check that a file is a raw disk with a partition table, and complete."""
    if start.startswith(_LUKS_MAGIC):
        raise _encrypted(path, "luks")
    for magic, program in _PACKED.items():
        if start.startswith(magic):
            raise ValueError(f"{path} is packed by {program}; unpack it, and use the file in it")
    if len(start) < _SECTOR or start[510:512] != b"\x55\xaa":
        raise ValueError(
            f"{path} is not a disk image in qcow2 or raw format (no qcow2 header and no partition "
            "table). Other formats can be converted with 'qemu-img convert -O qcow2'"
        )
    if path.stat().st_size < _expected_raw_size(start):
        raise _truncated(path, _expected_raw_size(start))


def _expected_raw_size(start: bytes) -> int:
    """Return the minimum size of a disk by its partition table, in bytes."""
    if start[_SECTOR : _SECTOR + 8] == _GPT_SIGNATURE:
        if len(start) < 2 * _SECTOR:
            return 2 * _SECTOR
        # UEFI 2.10, 5.3.2: the second table's header is in the disk's last sector.
        (last_sector,) = struct.unpack_from("<Q", start, _SECTOR + 32)
        return int(last_sector + 1) * _SECTOR
    # Four entries, each with its type at byte 4, first sector at 8, and length at 12.
    entries = struct.iter_unpack("<4xB3xII", start[446:510])
    return max(first + count if kind else 0 for kind, first, count in entries) * _SECTOR


def _encrypted(path: Path, kind: str) -> ValueError:
    secret = "encrypt.key-secret" if kind == "qcow2" else "key-secret"
    return ValueError(
        f"The image {path} is encrypted ({kind}), and its key cannot be given here. Decrypt it "
        "with 'qemu-img convert -O qcow2 --object secret,id=key,file=… --image-opts "
        f"driver={kind},file.filename=…,{secret}=key …'"
    )


def _truncated(path: Path, expected: int) -> ValueError:
    return ValueError(
        f"The image {path} is truncated: it has {path.stat().st_size} bytes, its tables tell of "
        f"{expected}. Fetch or build it again"
    )


def rebase(overlay: Path, base: Path) -> None:
    """Build a disk directly on the lowest file of its chain; merge the layers between into it."""
    _check_backing_name(base)
    base_format = "qcow2" if _is_qcow2(base) else "raw"
    # fmt: off
    argv: list[str | Path] = [
        "qemu-img", "rebase",
        "-f", "qcow2",
        "-F", base_format,
        "-b", base,
        overlay,
    ]
    # fmt: on
    run_tool("merging the layers of a disk", argv)


def export(source: Path, target: Path, *, compress: bool, on_progress: ProgressCallback) -> None:
    """Write an image, with its backing files, as one qcow2 file.

    Raises:
        FileExistsError: The target exists; it is not changed.
        ToolError: qemu-img failed, for lack of space for example.
    """
    if target.exists():
        raise FileExistsError(errno.EEXIST, "export does not overwrite a file", str(target))
    # fmt: off
    argv: list[str | Path] = [
        "qemu-img", "convert", "-p",
        "-f", "qcow2" if _is_qcow2(source) else "raw",
        "-O", "qcow2",
        *(["-c"] if compress else []),
        source,
    ]
    # fmt: on
    temporary = temporary_name(target)
    try:
        _create_private(temporary)
        run_tool_streaming(
            "exporting the image", [*argv, temporary], on_line=_percent_reader(on_progress)
        )
        # Unlike a rename, a link never replaces a file that has appeared meanwhile.
        os.link(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read_backing_file(image: Path) -> Path | None:
    """Read the backing file of a qcow2 file; None if it has no valid one, or is another file.

    The header is read directly (docs/interop/qcow2.txt): a chain has many files, and a qemu-img
    process for each would be slow.
    """
    try:
        with image.open("rb") as file:
            header = file.read(_QCOW2_HEADER.size)
            if len(header) < _QCOW2_HEADER.size or not header.startswith(_QCOW2_MAGIC):
                return None
            _magic, _version, offset, length = _QCOW2_HEADER.unpack(header)
            if offset == 0 or not 0 < length <= _LONGEST_BACKING_NAME:
                return None
            # Not seek(), which fails with the impossible offset of a damaged header.
            name = os.pread(file.fileno(), length, min(offset, _LAST_OFFSET))
    except IsADirectoryError:
        return None
    except OSError as error:
        if not is_not_found(error):
            raise
        return None
    return image.parent / os.fsdecode(name) if len(name) == length and b"\0" not in name else None


def _check_backing_name(path: Path) -> None:
    length = len(os.fsencode(path))
    if length > _LONGEST_BACKING_NAME:
        raise ValueError(
            f"No disk can be built on {path}: its path has {length} bytes, and a qcow2 disk's "
            f"backing file at most {_LONGEST_BACKING_NAME}. Set image_dir and working_dir in "
            "[qemu] to shorter paths"
        )


def _create_private(path: Path) -> None:
    """Make a private file for qemu-img, which would make one that all users can read."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _percent_reader(on_progress: ProgressCallback) -> Callable[[str], None]:
    """Return a function that reports the progress that `qemu-img -p` prints: `(12.34/100%)`."""

    def read(line: str) -> None:
        match = re.search(r"\(([0-9.]+)/100%\)", line)
        if match:
            on_progress(Progress("exporting the image", done=float(match[1]), total=100, unit="%"))

    return read


def _is_qcow2(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_QCOW2_MAGIC)) == _QCOW2_MAGIC
