"""Further disks: empty ones, overlays on images, and images that a machine writes to itself."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pycloudlib._base.documents import safe_repr
from pycloudlib._base.files import allocated_size, expand_user, is_file
from pycloudlib.qemu.parts.part import OwnDisk, Part, Start, escape
from pycloudlib.qemu.parts.standard import DISK_BUS, ROOT

_GIB = 1 << 30
_LARGEST_GIB = 64 * 1024
# The bus has 256 places; the root disk is in the first.
_LAST_SLOT = 255
# Of a longer one, QEMU shows the guest the beginning alone (VPD page 0x83), by which udev names it.
_LONGEST_SERIAL = 20
_SERIAL = re.compile(rf"[0-9A-Za-z][0-9A-Za-z._-]{{0,{_LONGEST_SERIAL - 1}}}")
_BY_ID = "/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_"


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk beside the root disk, as it is asked for.

    Attributes:
        size_gib: Its length in GiB, of one from an image not less than the image has; by default
            as long as the image.
        serial: By which the guest knows it, see `device`: 1 to 20 characters of a-z, A-Z, 0-9,
            '.', '_' and '-', the first a letter or digit. By default `disk1`, `disk2` and so on.
        path: The image that it begins with; without one, it is empty. Nothing is written to the
            image: the disk is an overlay on it.
        write: Whether the machine writes to the image itself. Such a machine cannot be saved.
    """

    size_gib: int | None = None
    serial: str | None = None
    path: str | Path | None = None
    write: bool = False

    @property
    def device(self) -> str:
        """Its name in the guest, whatever number it has there; of one whose serial is chosen."""
        return f"{_BY_ID}{self.serial}"


@dataclass(frozen=True, slots=True)
class FurtherDisk(Part):
    """A disk beside the root disk.

    Attributes:
        serial: By which the guest knows it.
        slot: Its place on the bus, from 1 on.
        size: Its length in bytes.
        image: The image that it begins with; None for one that begins empty.
        image_format: Whether that is `qcow2` or `raw`.
        write: Whether the machine writes to the image itself.
    """

    serial: str
    slot: int
    size: int
    image: Path | None = None
    image_format: str | None = None
    write: bool = False

    def arguments(self, start: Start) -> list[str]:
        drive = f"if=none,id={self.device},discard=unmap"
        if self.write and self.image is not None:
            drive += f",format={self.image_format},cache=writeback,file={escape(self.image)}"
        else:
            file = escape(self._own.beside(start.disk))
            drive += f",format=qcow2,cache=unsafe,file={file}"
        plug = self.plug
        driver = plug.pop("driver")
        options = ",".join(f"{name}={value}" for name, value in plug.items())
        return ["-drive", drive, "-device", f"{driver},drive={self.device},{options}"]

    @property
    def device(self) -> str:
        """QEMU's name of it."""
        return f"disk-{self.serial}"

    @property
    def plug(self) -> dict[str, Any]:
        """The device's properties but for its drive, as they are after the start and in QMP."""
        return {
            "driver": "scsi-hd",
            "id": self.device,
            "bus": DISK_BUS,
            "scsi-id": self.slot,
            "serial": self.serial,
        }

    @property
    def _own(self) -> OwnDisk:
        return OwnDisk(
            self.device, f"+{self.serial}", self.size, self.image, self.image_format or ""
        )

    @property
    def disks(self) -> tuple[OwnDisk, ...]:
        return () if self.write else (self._own,)

    @property
    def needs(self) -> tuple[Path, ...]:
        return () if self.image is None else (self.image,)

    @property
    def save_obstacle(self) -> str | None:
        if not self.write:
            return None
        return (
            f"its disk {self.serial} is the image {self.image} itself (write=True), which would "
            "change under what is saved"
        )

    @property
    def start_obstacle(self) -> str | None:
        return f"it writes to the image {self.image}" if self.write else None

    @property
    def key(self) -> Mapping[str, Any]:
        return {"disk": [self.serial, self.slot, self.size, self.write]}

    def tell(self, disk: Path) -> Mapping[str, Any]:
        told = {
            "serial": self.serial,
            "bytes": self.size,
            "used_bytes": self._used(disk),
            "image": "" if self.image is None else str(self.image),
            "write": self.write,
            "device": self.asked.device,
        }
        return {"disks": [told]}

    def _used(self, disk: Path) -> int:
        file = self.image if self.write and self.image else self._own.beside(disk)
        with contextlib.suppress(OSError):  # it may vanish
            return allocated_size(file)
        return 0

    @property
    def asked(self) -> Disk:
        """The disk as it could have been asked for."""
        return Disk(-(-self.size // _GIB), self.serial, self.image, self.write)


class LookedAt(Protocol):
    """An image that was looked at, and can be trusted."""

    @property
    def format(self) -> str:
        """`qcow2` or `raw`."""

    @property
    def virtual_size(self) -> int:
        """Length of the disk that the guest sees, in bytes."""


Look = Callable[[Path, bool], LookedAt]


def parse_disks(asked: Iterable[int | Disk] | None, look: Look) -> tuple[FurtherDisk, ...]:
    """Check the disks that are asked for.

    Args:
        asked: A number of GiB for an empty disk, or a `Disk`, each.
        look: Looks at an image, and whether it may be written to, if it is; errors are its own.

    Raises:
        TypeError: One is of a wrong type; says which.
        ValueError: One cannot be; says which, and why.
        FileNotFoundError: There is no image at a path.
    """
    if asked is None:
        return ()
    if isinstance(asked, (str, bytes, Mapping)) or not isinstance(asked, Iterable):
        raise TypeError(
            f"disks must be a list such as [20, Disk(4, serial='data')], not {safe_repr(asked)}"
        )
    wanted = {f"disks[{number}]": each for number, each in enumerate(asked)}
    disks = {name: _as_disk(each, name) for name, each in wanted.items()}
    chosen = {disk.serial for disk in disks.values()}
    made: list[FurtherDisk] = []
    for name, disk in disks.items():
        made.append(_parse(disk, look, made, chosen, name))
    return tuple(made)


def parse_disk(asked: int | Disk, look: Look, others: Sequence[FurtherDisk]) -> FurtherDisk:
    """Check one disk that is asked for.

    Arguments and errors are those of `parse_disks`; `others` are those that the machine has.
    """
    return _parse(_as_disk(asked, "disk"), look, others, set(), "disk")


def _as_disk(asked: object, name: str) -> Disk:
    if isinstance(asked, Disk):
        disk = asked
    elif isinstance(asked, int) and not isinstance(asked, bool):
        disk = Disk(asked)
    else:
        raise TypeError(f"{name} must be a number of GiB or a Disk, not {safe_repr(asked)}")
    if disk.path is not None and not isinstance(disk.path, (str, os.PathLike)):
        raise TypeError(f"{name}.path must be a path, not {safe_repr(disk.path)}")
    if not isinstance(disk.write, bool):
        raise TypeError(f"{name}.write must be true or false, not {safe_repr(disk.write)}")
    if disk.serial is not None:
        _check_serial(disk.serial, f"{name}.serial")
    return disk


def _check_serial(serial: object, name: str) -> None:
    if not isinstance(serial, str):
        raise TypeError(f"{name} must be a text, not {safe_repr(serial)}")
    if not _SERIAL.fullmatch(serial):
        raise ValueError(
            f"{name} is {safe_repr(serial)}, expected 1 to {_LONGEST_SERIAL} characters of a-z, "
            "A-Z, 0-9, '.', '_' and '-', the first a letter or digit"
        )
    if serial == ROOT.device:
        raise ValueError(f"{name} is {serial!r}, by which the guest knows its root disk")


def _parse(
    disk: Disk,
    look: Look,
    before: Sequence[FurtherDisk],
    chosen: set[str | None],
    name: str,
) -> FurtherDisk:
    taken = {other.slot for other in before}
    slot = next((slot for slot in range(1, _LAST_SLOT + 1) if slot not in taken), None)
    if slot is None:
        raise ValueError(
            f"{name} is one too many: a machine has {_LAST_SLOT} further disks at most"
        )
    used: set[str | None] = {other.serial for other in before}
    if disk.serial in used:
        raise ValueError(f"{name}.serial is {disk.serial!r}, as that of another disk is")
    serial = disk.serial or _choose_serial(slot, used | chosen)
    if disk.path is None:
        if disk.write:
            raise ValueError(f"{name}.write is for a disk from an image (path)")
        if disk.size_gib is None:
            raise ValueError(f"{name} has neither size_gib nor path: one says what the disk is")
        return FurtherDisk(serial, slot, _parse_size(disk.size_gib, 1, name))
    image = expand_user(disk.path).absolute()
    if not is_file(image):
        raise FileNotFoundError(f"{name}.path {str(disk.path)!r} is not a file")
    for other in before:
        if other.image is not None and disk.write | other.write and _is_same(image, other.image):
            raise ValueError(
                f"{name}.path is {str(disk.path)!r}, which is the image of the disk "
                f"{other.serial}, too, and one of them is to write to it"
            )
    found = look(image, disk.write)
    size = found.virtual_size
    if disk.size_gib is not None:
        if disk.write:
            raise ValueError(
                f"{name}.size_gib cannot be chosen with write=True: the image has its own"
            )
        size = _parse_size(disk.size_gib, max(1, -(-size // _GIB)), name)
    return FurtherDisk(serial, slot, size, image, found.format, disk.write)


def _choose_serial(slot: int, used: set[str | None]) -> str:
    numbers = (*range(slot, 2 * _LAST_SLOT), *range(1, slot))
    return next(serial for number in numbers if (serial := f"disk{number}") not in used)


def _parse_size(size_gib: object, least: int, name: str) -> int:
    if isinstance(size_gib, bool) or not isinstance(size_gib, int):
        raise TypeError(f"{name}: size_gib must be a whole number, not {safe_repr(size_gib)}")
    if not least <= size_gib <= _LARGEST_GIB:
        raise ValueError(f"{name}: size_gib is {size_gib}, expected {least} to {_LARGEST_GIB}")
    return size_gib * _GIB


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except FileNotFoundError:  # the other one was removed
        return False
