"""Disk images: looked at before they are trusted, and overlays on them."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycloudlib.errors import ToolError
from pycloudlib.files import replace_atomically
from pycloudlib.tools import run_tool

_SECTOR = 512
_QCOW_MAGIC = b"QFI\xfb"
_QCOW2_VERSIONS = (2, 3)
_GPT_SIGNATURE = b"EFI PART"
MINIMUM_DISK_SIZE = 10 << 30
"""Bytes that a machine's disk has at least."""


@dataclass(frozen=True, slots=True)
class BaseImage:
    """An image that a machine's disk can be laid over.

    Attributes:
        path: The file.
        format: `qcow2` or `raw`.
        virtual_size: Length of the disk that the guest sees, in bytes.
    """

    path: Path
    format: str
    virtual_size: int


def inspect_image(path: Path) -> BaseImage:
    """Make sure that a file is a whole, self-contained disk image.

    Raises:
        ValueError: It is in another format, is truncated or damaged, or names other files; says
            which and what to do.
        MissingPrerequisiteError: qemu-img is not installed.
    """
    with path.open("rb") as file:
        start = file.read(2 * _SECTOR)
    if start.startswith(_QCOW_MAGIC) and int.from_bytes(start[4:8], "big") in _QCOW2_VERSIONS:
        return _inspect_qcow2(path)
    _check_is_raw(path, start)
    return BaseImage(path, "raw", path.stat().st_size)


def create_overlay(base: BaseImage, path: Path) -> None:
    """Make a disk on top of an image; the image is never written to.

    It is at least 10 GiB, and never smaller than the image: with a smaller size, qemu-img would
    cut the guest's disk without a word.
    """
    size = max(base.virtual_size, MINIMUM_DISK_SIZE)
    # fmt: off
    argv: list[str | Path] = [
        "qemu-img", "create", "-q",
        "-f", "qcow2",
        "-F", base.format,
        "-b", base.path,
        path, str(size),
    ]
    # fmt: on
    try:
        run_tool("making the disk overlay", argv)
        path.chmod(0o600)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _inspect_qcow2(path: Path) -> BaseImage:
    info = _qemu_img("info", path)
    outside = info.get("backing-filename") or info.get("format-specific", {}).get("data", {}).get(
        "data-file"
    )
    if outside:
        raise ValueError(
            f"The image {path} refers to another file, {outside!r}; such an image is refused "
            "because it could read any file of this host. Make it self-contained with "
            "'qemu-img convert -O qcow2'"
        )
    check = _qemu_img("check", path)
    # `check` looks at the tables alone; data missing at the file's end shows by its length.
    end = check.get("image-end-offset", 0)
    # The end is told in whole clusters, but a compressed image ends anywhere in its last one.
    if path.stat().st_size <= end - int(info["cluster-size"]):
        raise _truncated(path, end)
    return BaseImage(path, "qcow2", int(info["virtual-size"]))


def _qemu_img(command: str, path: Path) -> dict[str, Any]:
    argv: list[str | Path] = ["qemu-img", command, "-f", "qcow2", "--output=json", path]
    try:
        answer = run_tool(f"qemu-img {command}", argv)
    except ToolError as error:
        said = error.output.strip().splitlines()
        raise ValueError(
            f"The image {path} is truncated or damaged (qemu-img {command}: "
            f"{said[0] if said else f'exit status {error.exit_status}'}). Fetch or build it again"
        ) from error
    document: dict[str, Any] = json.loads(answer.stdout)
    return document


def _check_is_raw(path: Path, start: bytes) -> None:
    """Accept a raw disk: a partition table, and all of it there."""
    if len(start) < _SECTOR or start[510:512] != b"\x55\xaa":
        raise ValueError(
            f"{path} is not a disk image in qcow2 or raw format (no qcow2 header and no partition "
            "table). Other formats can be converted with 'qemu-img convert -O qcow2'"
        )
    if path.stat().st_size < _expected_raw_size(start):
        raise _truncated(path, _expected_raw_size(start))


def _expected_raw_size(start: bytes) -> int:
    """Tell from a disk's partition table how long the disk is at least, in bytes."""
    if start[_SECTOR : _SECTOR + 8] == _GPT_SIGNATURE:
        # UEFI 2.10, 5.3.2: the second table's header is in the disk's last sector.
        (last_sector,) = struct.unpack_from("<Q", start, _SECTOR + 32)
        return int(last_sector + 1) * _SECTOR
    # Four entries, each with its type at byte 4, first sector at 8, and length at 12.
    entries = struct.iter_unpack("<4xB3xII", start[446:510])
    return max(first + count if kind else 0 for kind, first, count in entries) * _SECTOR


def _truncated(path: Path, expected: int) -> ValueError:
    return ValueError(
        f"The image {path} is truncated: it has {path.stat().st_size} bytes, its tables tell of "
        f"{expected}. Fetch or build it again"
    )


def convert(source: Path, target: Path) -> None:
    """Copy a disk with everything it is built on into one image that needs no other file."""
    with replace_atomically(target) as temporary:
        # fmt: off
        run_tool("copying the disk", [
            "qemu-img", "convert",
            "-f", "qcow2",
            "-O", "qcow2",
            source, temporary,
        ])
        # fmt: on
        temporary.chmod(0o600)
