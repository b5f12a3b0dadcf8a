"""Further disks in a guest: found, partitioned, written to, saved, copied and rolled back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pycloudlib import Qemu
from pycloudlib.qemu.cloud import Disk
from pycloudlib.qemu.instance import QemuInstance

pytestmark = pytest.mark.guest

_LIMIT = 60


@pytest.fixture
def cloud() -> Iterator[Qemu]:
    with Qemu(tag="disks") as cloud:
        yield cloud


def run(vm: QemuInstance, command: str) -> str:
    done = vm.execute(["sudo", "sh", "-ec", command], timeout=_LIMIT)
    assert done.ok, done
    return done.stdout


def test_disk_is_saved_copied_and_rolled_back_with_its_guest(cloud: Qemu, saved: str) -> None:
    source = cloud.launch(saved)
    disk = source.add_disk(Disk(1, serial="scratch"))
    run(source, f"until [ -b {disk.device} ]; do sleep 0.1; done")
    assert run(source, f"readlink -f {disk.device}") == "/dev/sdb"
    assert run(source, "lsblk -bdno SIZE,SERIAL /dev/sdb").split() == [str(1 << 30), "scratch"]
    part = f"{disk.device}-part1"
    run(source, f"echo ,,L | sfdisk -q {disk.device}; until [ -b {part} ]; do sleep 0.1; done")
    run(source, f"mkfs.ext4 -q {part}; mount {part} /mnt; echo before >/mnt/file; sync")

    image = cloud.snapshot(source, memory=True)
    run(source, "echo after >/mnt/file; sync")
    copy = cloud.launch(image)
    assert run(copy, "cat /mnt/file") == "before"
    run(copy, "echo of its own >/mnt/file; umount /mnt; e2fsck -fn /dev/sdb1")
    assert run(source, "cat /mnt/file") == "after"

    source.rollback(image)
    assert run(source, "cat /mnt/file; findmnt -no SOURCE /mnt").split() == ["before", "/dev/sdb1"]
    run(source, "umount /mnt; e2fsck -fn /dev/sdb1")
    source.remove_disk("scratch")
    run(source, "while [ -e /dev/sdb ]; do sleep 0.1; done")
