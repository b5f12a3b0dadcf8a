"""Disk images: looked at before they are trusted, and overlays on them."""

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
from pycloudlib._base.files import temporary_name
from pycloudlib._base.tools import run_tool, run_tool_streaming
from pycloudlib.errors import ToolError
from pycloudlib.progress import Progress, ProgressCallback

_T = TypeVar("_T")

_SECTOR = 512
QCOW_MAGIC = b"QFI\xfb"
_QCOW2_VERSIONS = (2, 3)
_QCOW2_SIZE_AT = 24  # docs/interop/qcow2.txt: the virtual size, 8 bytes, big-endian
# `check` ends with 3 for clusters that nobody uses: wasted space, no damage (qemu-img(1)).
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
"""Bytes that a machine's disk has at least where nothing else is asked for."""
LONGEST_BACKING_NAME = 1023
"""Bytes that the path of an image may have that disks are built on (docs/interop/qcow2.txt)."""


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


def inspect_image(path: Path, trusted_dir: Path | None = None) -> BaseImage:
    """Make sure that a file is a whole disk image, and refers to no other file.

    Args:
        path: The file.
        trusted_dir: Images below it are our own snapshots, which may be built on others.

    Raises:
        ValueError: It is in another format, encrypted, truncated or damaged, or names other files;
            says which and what to do.
        MissingPrerequisiteError: qemu-img is not installed.
    """
    if trusted_dir is not None and path.resolve().is_relative_to(trusted_dir.resolve()):
        return read_layer(path)
    with path.open("rb") as file:
        start = file.read(2 * _SECTOR)
    if start.startswith(QCOW_MAGIC) and int.from_bytes(start[4:8], "big") in _QCOW2_VERSIONS:
        return _inspect_qcow2(path)
    _check_is_raw(path, start)
    return BaseImage(path, "raw", path.stat().st_size)


def read_layer(path: Path) -> BaseImage:
    """Describe a qcow2 file that this package made.

    Raises:
        ValueError: It is not one.
    """
    with path.open("rb") as file:
        header = file.read(_QCOW2_SIZE_AT + 8)
    if not header.startswith(QCOW_MAGIC) or len(header) < _QCOW2_SIZE_AT + 8:
        raise ValueError(f"{path} is not an image that was made here")
    return BaseImage(path, "qcow2", int.from_bytes(header[_QCOW2_SIZE_AT:], "big"))


def parse_size(disk_size_gib: int | None, image: BaseImage) -> int | None:
    """Read how large a disk is to be; give it in bytes, and None for the usual size.

    Raises:
        TypeError: It is not a whole number.
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
    """Make a disk on top of an image; the image is never written to.

    It is at least 10 GiB, and never smaller than the image: with a smaller size, qemu-img would
    cut the guest's disk without a word.

    Args:
        base: The image.
        path: The new disk.
        unopened: Whether the image is not looked at, as a running QEMU may still write to it.
        size: Its length in bytes, not less than the image's; None for the usual one.

    Raises:
        ValueError: The image's path is too long for a disk that is built on it.
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


def create_empty(path: Path) -> None:
    """Make a disk of the usual size that nothing is on."""
    _create_private(path)
    run_tool(
        "making an empty disk",
        ["qemu-img", "create", "-q", "-f", "qcow2", path, str(MINIMUM_DISK_SIZE)],
    )


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
    # `check` looks at the tables alone; data missing at the file's end shows by its length.
    end = _qemu_img("check", path, parse_end)
    # The end is told in whole clusters, but a compressed image ends anywhere in its last one.
    if path.stat().st_size <= end - info.cluster_size:
        raise _truncated(path, end)
    return BaseImage(path, "qcow2", info.virtual_size)


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What qemu-img tells of an image.

    Attributes:
        virtual_size: Length of the disk that the guest sees, in bytes.
        cluster_size: Bytes of a cluster.
        outside: The file that it needs besides itself; empty when it is whole.
        encrypted: Whether it can be read only with a key.
    """

    virtual_size: int
    cluster_size: int
    outside: str
    encrypted: bool = False


def parse_info(answer: bytes) -> ImageInfo:
    """Read what `qemu-img info` answers.

    Raises:
        ValueError: It is something else; says in what.
    """
    told = parse_json(answer)
    specific = _inside(_inside(told, "format-specific"), "data")
    return decode(
        ImageInfo,
        {
            "virtual_size": _inside(told).get("virtual-size"),
            "cluster_size": _inside(told).get("cluster-size"),
            "encrypted": told.get("encrypted", False),
            "outside": told.get("backing-filename") or specific.get("data-file") or "",
        },
    )


def parse_end(answer: bytes) -> int:
    """Read where an image ends, in bytes, from what `qemu-img check` answers; 0 if it is not told.

    Raises:
        ValueError: It is something else; says in what.
    """
    end = _inside(parse_json(answer)).get("image-end-offset", 0)
    if type(end) is not int:
        raise ValueError(f"image-end-offset is {safe_repr(end)}, expected a whole number")
    return end


def _inside(answer: object, key: str | None = None) -> dict[str, Any]:
    """Give the keys and values of an answer, or of what it has at a key; none if it has nothing."""
    if not isinstance(answer, dict):
        raise ValueError(f"{safe_repr(answer)} is not keys and values")
    return answer if key is None else _inside(answer.get(key, {}))


def _qemu_img(command: str, path: Path, parse: Callable[[bytes], _T]) -> _T:
    argv: list[str | Path] = ["qemu-img", command, "-f", "qcow2", "--output=json", path]
    try:
        # A few bytes of an image can ask for tables of any size.
        answer = run_tool(f"qemu-img {command}", argv, accepted=_ACCEPTED, bounded=True)
    except ToolError as error:
        if "Failed to get" in error.output and "lock" in error.output:
            raise ValueError(
                f"The image {path} is in use by another program that may write to it"
            ) from error
        said = error.output.strip().splitlines()
        if "nsupported" in error.output:
            raise ValueError(f"The image {path} is not for this qemu-img: {said[0]}") from error
        raise ValueError(
            f"The image {path} is truncated or damaged (qemu-img {command}: "
            f"{said[0] if said else f'exit status {error.exit_status}'}). Fetch or build it again"
        ) from error
    try:
        return parse(answer.stdout)
    except ValueError as error:
        raise ValueError(
            f"What qemu-img {command} says of {path} cannot be understood: {error}"
        ) from error


def _check_is_raw(path: Path, start: bytes) -> None:
    """Accept a raw disk: a partition table, and all of it there."""
    if start.startswith(_LUKS_MAGIC):
        raise _encrypted(path, "luks")
    for magic, program in _PACKED.items():
        if start.startswith(magic):
            raise ValueError(f"{path} is packed by {program}; unpack it, and give what was in it")
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
    """Build a disk directly on the lowest file of its chain, taking in what lies between."""
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
    """Write an image and all that it is built on as one qcow2 file.

    Raises:
        FileExistsError: There is a file already; it stays as it is.
        ToolError: qemu-img failed, for want of space for example.
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
    temporary = temporary_name(target, "tmp")
    try:
        _create_private(temporary)
        run_tool_streaming(
            "exporting the image", [*argv, temporary], on_line=_percent_reader(on_progress)
        )
        # Unlike a rename, a link never replaces what appeared there meanwhile.
        os.link(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _check_backing_name(path: Path) -> None:
    length = len(os.fsencode(path))
    if length > LONGEST_BACKING_NAME:
        raise ValueError(
            f"No disk can be built on {path}: its path has {length} bytes, and a qcow2 disk names "
            f"what it is built on by at most {LONGEST_BACKING_NAME}. Let image_dir and working_dir "
            "in [qemu] name shorter ones"
        )


def _create_private(path: Path) -> None:
    """Make a file for qemu-img to write, which would make one that everybody can read."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _percent_reader(on_progress: ProgressCallback) -> Callable[[str], None]:
    """Read what `qemu-img -p` prints, such as `(12.34/100%)`."""

    def read(line: str) -> None:
        match = re.search(r"\(([0-9.]+)/100%\)", line)
        if match:
            on_progress(Progress("exporting the image", done=float(match[1]), total=100, unit="%"))

    return read


def _is_qcow2(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(QCOW_MAGIC)) == QCOW_MAGIC
