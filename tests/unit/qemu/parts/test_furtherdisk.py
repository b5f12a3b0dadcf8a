"""Further disks as they are asked for, and what they add to a machine."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from pycloudlib.guest.data.seed import Seed
from pycloudlib.qemu.cloud import Disk
from pycloudlib.qemu.disk.diskimage import BaseImage
from pycloudlib.qemu.host.accelerator import Features
from pycloudlib.qemu.launching import warmcache
from pycloudlib.qemu.launching.beginning import Host
from pycloudlib.qemu.launching.request import LaunchRequest, SeedRequest, look_at, make_seed
from pycloudlib.qemu.launching.startingpoint import find_obstacle
from pycloudlib.qemu.parts.furtherdisk import FurtherDisk, parse_disk, parse_disks
from pycloudlib.qemu.parts.part import SUFFIX
from pycloudlib.qemu.parts.standard import InstanceType
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.state.spec import MachineSpec
from pycloudlib.qemu.vm.process import build_command
from tests.unit.qemu.vm.test_command import CHANNELS, FULL, GOLDEN, SPEC

GIB = 1 << 30
EMPTY = FurtherDisk("disk1", 1, 20 * GIB)


def look(image: Path, write: bool) -> BaseImage:
    return BaseImage(image, "raw", 3 * GIB + 512)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    file = tmp_path / "data.img"
    file.write_bytes(b"data")
    return file


@pytest.fixture
def request_(tmp_path: Path) -> LaunchRequest:
    root = tmp_path / "some.img"
    root.write_bytes(bytes(1024))
    seed = SeedRequest("ssh-ed25519 AAAA me")
    return LaunchRequest("vm-1", BaseImage(root, "raw", 1024), InstanceType(1, 64), seed, None, ())


def test_disks_follow_the_root_disk_and_change_nothing_else() -> None:
    disks = (
        EMPTY,
        FurtherDisk("a.b_c-D", 7, GIB, Path("/x,y/data.img"), "raw"),
        FurtherDisk("mine", 3, GIB, Path("/x,y/data.img"), "raw", write=True),
    )
    spec = dataclasses.replace(FULL, disks=disks)
    argv = build_command(GOLDEN[0], spec, CHANNELS, Features())
    place = GOLDEN.index("scsi-hd,drive=root,bus=scsi0.0,bootindex=1") + 1

    # fmt: off
    assert argv[place:place + 12] == [
        "-drive", ("if=none,id=disk-disk1,discard=unmap,format=qcow2,cache=unsafe,"
                   "file=/run/vm/vm+disk1.qcow2"),
        "-device", "scsi-hd,drive=disk-disk1,id=disk-disk1,bus=scsi0.0,scsi-id=1,serial=disk1",
        "-drive", ("if=none,id=disk-a.b_c-D,discard=unmap,format=qcow2,cache=unsafe,"
                   "file=/run/vm/vm+a.b_c-D.qcow2"),
        "-device", ("scsi-hd,drive=disk-a.b_c-D,id=disk-a.b_c-D,bus=scsi0.0,scsi-id=7,"
                    "serial=a.b_c-D"),
        "-drive", ("if=none,id=disk-mine,discard=unmap,format=raw,cache=writeback,"
                   "file=/x,,y/data.img"),
        "-device", "scsi-hd,drive=disk-mine,id=disk-mine,bus=scsi0.0,scsi-id=3,serial=mine",
    ]
    # fmt: on
    assert argv[:place] + argv[place + 12 :] == GOLDEN


def test_machine_with_disks_survives_being_written_down() -> None:
    disks = (EMPTY, FurtherDisk("b", 2, GIB, Path("/data.img"), "qcow2", write=True))
    spec = dataclasses.replace(SPEC, disks=disks)
    assert MachineSpec.from_json(spec.to_json()) == spec


def test_machine_of_an_earlier_version_has_none() -> None:
    told = json.loads(SPEC.to_json())
    del told["disks"]
    assert MachineSpec.from_json(json.dumps(told)) == SPEC


def test_numbers_are_sizes_of_empty_disks() -> None:
    made = parse_disks([20, Disk(4, serial="scratch"), 1], look)
    assert made == (
        FurtherDisk("disk1", 1, 20 * GIB),
        FurtherDisk("scratch", 2, 4 * GIB),
        FurtherDisk("disk3", 3, GIB),
    )
    assert parse_disks(None, look) == parse_disks([], look) == ()


def test_serials_that_are_chosen_are_not_given_to_others() -> None:
    made = parse_disks([1, Disk(1, serial="disk1"), Disk(1, serial="disk3"), 1], look)
    assert [disk.serial for disk in made] == ["disk2", "disk1", "disk3", "disk4"]


def test_disk_from_an_image_is_as_long_as_that(image: Path) -> None:
    (made,) = parse_disks([Disk(path=image)], look)
    assert made == FurtherDisk("disk1", 1, 3 * GIB + 512, image, "raw")
    (longer,) = parse_disks([Disk(9, path=str(image))], look)
    assert longer.size == 9 * GIB
    assert made.disks[0].image == longer.disks[0].image == image
    assert made.needs == (image,)


def test_added_disk_takes_the_first_free_slot() -> None:
    others = (EMPTY, FurtherDisk("disk3", 3, GIB))
    assert parse_disk(5, look, others) == FurtherDisk("disk2", 2, 5 * GIB)


def test_suffixes_of_all_serials_are_known() -> None:
    for serial in ("disk1", "a.b_c-D", "0" * 20):
        (own,) = FurtherDisk(serial, 1, GIB).disks
        assert re.fullmatch(SUFFIX, own.suffix)


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ("20", TypeError, r"disks must be a list such as .*, not '20'"),
        (20, TypeError, "disks must be a list"),
        ({"a": 1}, TypeError, "disks must be a list"),
        (["20G"], TypeError, r"disks\[0\] must be a number of GiB or a Disk, not '20G'"),
        ([1.5], TypeError, r"disks\[0\].*1.5"),
        ([True], TypeError, r"disks\[0\].*True"),
        ([1, 0], ValueError, r"disks\[1\].* is 0, expected 1 to 65536"),
        ([-1], ValueError, "is -1, expected 1"),
        ([1 << 40], ValueError, "expected 1 to 65536"),
        ([Disk()], ValueError, r"disks\[0\] has neither size_gib nor path"),
        ([Disk(True)], TypeError, "size_gib must be a whole number, not True"),
        ([Disk(1, serial="")], ValueError, r"disks\[0\].serial is ''"),
        ([Disk(1, serial="x" * 21)], ValueError, "expected 1 to 20 characters"),
        ([Disk(1, serial="a b")], ValueError, "'a b'"),
        ([Disk(1, serial="-a")], ValueError, "the first a letter or digit"),
        ([Disk(1, serial="a,b")], ValueError, "'a,b'"),
        ([Disk(1, serial="root")], ValueError, "by which the guest knows its root disk"),
        ([Disk(1, serial=7)], TypeError, "serial must be a text, not 7"),  # type: ignore[arg-type]
        ([Disk(1, serial="a"), Disk(1, serial="a")], ValueError, r"disks\[1\].serial is 'a'"),
        ([Disk(1, write=True)], ValueError, "write is for a disk from an image"),
        ([Disk(1, write="yes")], TypeError, "write must be true or false"),  # type: ignore[arg-type]
        ([Disk(path=7)], TypeError, "path must be a path, not 7"),  # type: ignore[arg-type]
        ([Disk(path="/no/such")], FileNotFoundError, r"disks\[0\].path '/no/such' is not a file"),
        ([1] * 256, ValueError, r"disks\[255\] is one too many"),
    ],
)
def test_disks_that_cannot_be_are_refused(asked: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        parse_disks(asked, look)


def test_disks_of_one_image_are_refused_if_one_writes_to_it(image: Path) -> None:
    reading, writing = Disk(path=image), Disk(path=image, write=True)
    assert len(parse_disks([reading, reading], look)) == 2
    for asked in ([reading, writing], [writing, reading], [writing, writing]):
        with pytest.raises(ValueError, match=r"disks\[1\].path is .* one of them is to write"):
            parse_disks(asked, look)
    with pytest.raises(ValueError, match="size_gib cannot be chosen with write=True"):
        parse_disks([Disk(9, path=image, write=True)], look)
    with pytest.raises(ValueError, match="size_gib is 3, expected 4"):
        parse_disks([Disk(3, path=image)], look)


def test_image_is_looked_at_before_it_is_trusted(tmp_path: Path) -> None:
    image = tmp_path / "data.img"
    image.write_bytes(bytes(4096))
    with pytest.raises(ValueError, match="not a disk image"):
        look_at(image, False, working_dir=tmp_path / "work")


def test_only_a_machine_that_writes_to_an_image_cannot_be_kept(image: Path) -> None:
    for disk in (EMPTY, FurtherDisk("a", 1, GIB, image, "raw")):
        assert (disk.save_obstacle, disk.start_obstacle) == (None, None)
        assert len(disk.disks) == 1
    writing = FurtherDisk("a", 1, GIB, image, "raw", write=True)
    assert "write=True" in str(writing.save_obstacle)
    assert writing.start_obstacle is not None
    assert writing.disks == ()


def test_first_boots_begin_where_the_guest_saw_the_same_disks(
    request_: LaunchRequest, host: Host, image: Path
) -> None:
    variants: list[tuple[FurtherDisk, ...]] = [
        (),
        (EMPTY,),
        (dataclasses.replace(EMPTY, size=GIB),),
        (dataclasses.replace(EMPTY, serial="other"),),
        (dataclasses.replace(EMPTY, slot=2),),
        (dataclasses.replace(EMPTY, image=image, image_format="raw"),),
        (EMPTY, FurtherDisk("b", 2, GIB)),
    ]
    requests = [dataclasses.replace(request_, disks=disks) for disks in variants]
    assert [find_obstacle(request) for request in requests] == [None] * len(requests)
    keys = [warmcache.build_start_key(request, host) for request in requests]
    assert len(set(keys)) == len(keys)
    image.write_bytes(b"other data")
    assert warmcache.build_start_key(requests[5], host) != keys[5]


class _Mounted(FurtherDisk):
    """A disk that the guest is told of."""

    __slots__ = ()

    def complete_seed(self, seed: Seed) -> Seed:
        return dataclasses.replace(seed, user_data=seed.user_data + self.serial.encode())


def test_parts_complete_the_seed_in_their_order(request_: LaunchRequest) -> None:
    mounted = (_Mounted("a", 1, GIB), EMPTY, _Mounted("b", 3, GIB))
    plain = make_seed(request_).user_data
    assert make_seed(dataclasses.replace(request_, disks=mounted)).user_data == plain + b"ab"


def test_machine_that_writes_to_an_image_boots_from_its_beginning(
    request_: LaunchRequest, image: Path
) -> None:
    writing = FurtherDisk("a", 1, GIB, image, "raw", write=True)
    obstacle = find_obstacle(dataclasses.replace(request_, disks=(writing,)))
    assert obstacle == f"it writes to the image {image}"


def test_overlays_of_a_save_are_found_again(tmp_path: Path) -> None:
    rundir = RunDirectory(tmp_path)
    fresh = {"": tmp_path / f".{'0' * 16}.qcow2", "+a.b_c-D": tmp_path / f".{'f' * 16}.qcow2"}
    rundir.write_saving(fresh)
    assert rundir.find_fresh_overlays() == fresh
    (tmp_path / "saving").write_text(f".{'0' * 16}.qcow2\n../../etc/passwd\n.x.qcow2 +a\n")
    assert rundir.find_fresh_overlays() == {"": fresh[""]}


def test_what_info_tells_of_it(tmp_path: Path) -> None:
    told = EMPTY.tell(tmp_path / "vm.qcow2")
    assert told == {
        "disks": [
            {
                "serial": "disk1",
                "bytes": 20 * GIB,
                "used_bytes": 0,
                "image": "",
                "write": False,
                "device": "/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_disk1",
            }
        ]
    }
