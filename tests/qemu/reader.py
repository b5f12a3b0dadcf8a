"""A boot sector in the place of a guest: it reads its seed as cloud-init would."""

from __future__ import annotations

from pathlib import Path

from pycloudlib import Qemu
from pycloudlib.guest.data.seed import ROOT_DIRECTORY_SECTOR
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.launching.warmcache import WarmImage
from tests.qemu.machines import SMALL, becomes, hurry

# Of the seed: user-data is the first file after the directories.
USER_DATA_SECTOR = ROOT_DIRECTORY_SECTOR + 3 * 4


def write_reader(image: Path, further_disks: int = 0) -> None:
    """Write a disk whose boot sector reads the seed's directory, then prints its user-data.

    Args:
        image: The disk.
        further_disks: How many disks the firmware finds between this one and the seed.
    """
    drive = 0x81 + further_disks
    program = bytes.fromhex(
        "fc"  # cld
        "31c0 8ed8 8ed0 bc007c"  # ds = ss = 0, sp = 0x7c00
        f"be407c b442 b2{drive:02x} cd13"  # read the sector that the packet at 0x7c40 names, of it
        f"c706487c{USER_DATA_SECTOR:02x}00"  # let the packet name another one
        f"be407c b442 b2{drive:02x} cd13"  # read it, too
        "fa be0080 baf803 b03e ee"  # undisturbed, print ">" and, from there on,
        "ac 84c0 7403 ee ebf8"  # print each byte up to a zero
        "b00a ee"  # print a line end
        "f4 ebfd"  # halt for ever
    )
    packet = bytes.fromhex(f"10000100 00800000 {ROOT_DIRECTORY_SECTOR:02x}00000000000000")
    sector = program.ljust(0x40, b"\0") + packet
    image.write_bytes(sector.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))


def launch(cloud: Qemu, image: Path, user_data: str = "mine", **options: object) -> QemuInstance:
    arguments: dict[str, object] = {"fast_boot": True, "user_data": user_data, **options}
    return hurry(cloud.launch(str(image), SMALL, **arguments))  # type: ignore[arg-type]


def prints(instance: QemuInstance, text: str, times: int = 1) -> bool:
    """Wait until the boot sector has printed a text."""
    log = instance.machine.rundir.console_log
    assert becomes(lambda: log.read_bytes().count(f">{text}\n".encode()) >= times), log.read_bytes()
    return True


def machines_in(cloud: Qemu) -> list[str]:
    return [path.name for path in cloud.parent_dir.glob("*") if not path.name.startswith(".keys-")]


def starts(cloud: Qemu) -> list[WarmImage]:
    return [warm for warm in cloud.warm_images() if warm.first_boot]


def begins_there(instance: QemuInstance, start: WarmImage) -> bool:
    return start.image_id.encode() in instance.machine.rundir.disk.read_bytes()[:4096]
