from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from pycloudlib.guest.access.hostkeys import HostKey, HostKeyPool
from pycloudlib.guest.data.seed import (
    VOLUME_UNIT,
    Document,
    Seed,
    build_seed,
    read_iso,
    rename,
    write_iso,
)
from tests.unit.guest.data.test_seed import merge_as_cloud_init

FIRST_KEY, SECOND_KEY, THIRD_KEY = (
    HostKey("ed25519", f"-----BEGIN {name}-----\n", f"ssh-ed25519 AAAA{name} root@{name}")
    for name in ("first", "second", "third")
)


def make_seed(
    user_data: str | bytes | None = None,
    meta_data: Document = None,
    vendor_data: Document = None,
    network_config: Document = None,
    host_keys: Sequence[HostKey] = (FIRST_KEY,),
) -> Seed:
    return build_seed(
        instance_id="iid-first",
        hostname="first",
        public_key="ssh-ed25519 AAAA me",
        host_keys=host_keys,
        user_data=user_data,
        meta_data=meta_data,
        vendor_data=vendor_data,
        network_config=network_config,
    )


def make_second(seed: Seed) -> Seed:
    return rename(seed, instance_id="iid-second", hostname="second", host_keys=[SECOND_KEY])


def vendor_config(seed: Seed) -> dict[str, Any]:
    assert seed.vendor_data is not None
    return merge_as_cloud_init(seed.vendor_data)


SEEDS = {
    "all four": Seed(b"#!/bin/sh\r\n", b"instance-id: a\n", b"\x1f\x8b\0\xff", b"version: 2\n"),
    "two": Seed(b"#cloud-config\n", b"instance-id: a\n"),
    "three": Seed(b"u", b"m", None, b"n"),
    "empty user-data": Seed(b"", b"instance-id: a\n", b"v"),
    "all empty": Seed(b"", b"", b"", b""),
    "every byte": Seed(bytes(range(256)) * 9, b"m", bytes(range(255, -1, -1)), b"\n\n"),
    "whole sectors": Seed(bytes(4096), bytes(2048), b"x" * 2049, b"x" * 2047),
    "large": Seed(b"#" * (3 << 20), b"m", b"v", b"n"),
}


@pytest.mark.parametrize("kind", SEEDS)
def test_what_is_written_is_read_byte_for_byte(kind: str, tmp_path: Path) -> None:
    write_iso(SEEDS[kind], tmp_path / "seed.iso")
    assert read_iso(tmp_path / "seed.iso") == SEEDS[kind]


@pytest.mark.parametrize("kind", SEEDS)
def test_volume_is_a_whole_number_of_units(kind: str, tmp_path: Path) -> None:
    volume = tmp_path / "seed.iso"
    write_iso(SEEDS[kind], volume)
    assert volume.stat().st_size % VOLUME_UNIT == 0
    assert volume.stat().st_size >= VOLUME_UNIT
    assert volume.stat().st_mode & 0o777 == 0o600


def test_volume_is_written_anew_only(tmp_path: Path) -> None:
    volume = tmp_path / "seed.iso"
    volume.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write_iso(SEEDS["two"], volume)
    assert volume.read_bytes() == b"mine"


@pytest.mark.parametrize("content", [b"", b"no volume", bytes(1 << 20)])
def test_other_files_are_no_volume(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "other.iso"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.iso is not a NoCloud volume"):
        read_iso(file)


def test_volume_that_lost_its_end_is_refused(tmp_path: Path) -> None:
    volume = tmp_path / "seed.iso"
    write_iso(SEEDS["all four"], volume)
    with volume.open("r+b") as file:
        file.truncate(40 << 10)
    with pytest.raises(ValueError, match="is not a NoCloud volume"):
        read_iso(volume)


def test_copy_differs_in_who_it_is_alone() -> None:
    first = make_seed("#!/bin/sh\n", {"hobby": "chess"}, None, {"version": 2})
    second = make_second(first)
    assert second.user_data == first.user_data
    assert second.network_config == first.network_config
    before, after = yaml.safe_load(first.meta_data), yaml.safe_load(second.meta_data)
    assert after == {**before, "instance-id": "iid-second", "local-hostname": "second"}
    assert list(after) == list(before)


def test_copy_of_a_machine_with_a_name_of_the_callers_has_its_own() -> None:
    given = {"instance-id": "iid-mine", "local-hostname": "mine"}
    after = yaml.safe_load(make_second(make_seed(meta_data=given)).meta_data)
    assert (after["instance-id"], after["local-hostname"]) == ("iid-second", "second")


@pytest.mark.parametrize(
    "vendor_data",
    [None, {"timezone": "UTC"}, "#!/bin/sh\necho\n", b"#cloud-config\nruncmd: [ls]\n"],
    ids=["none", "mapping", "script", "cloud-config"],
)
def test_new_host_key_wins(vendor_data: Document) -> None:
    config = vendor_config(make_second(make_seed(vendor_data=vendor_data)))
    assert config["ssh_keys"]["ed25519_private"] == SECOND_KEY.private
    assert config["ssh_keys"]["ed25519_public"] == SECOND_KEY.public


def test_vendor_data_of_the_caller_stays_in_effect() -> None:
    config = vendor_config(make_second(make_seed(vendor_data={"timezone": "UTC"})))
    assert config["timezone"] == "UTC"


def test_copy_of_a_copy_is_somebody_else_again() -> None:
    second = make_second(make_seed(vendor_data={"timezone": "UTC"}))
    third = rename(second, instance_id="iid-third", hostname="third", host_keys=[THIRD_KEY])
    config = vendor_config(third)
    assert config["ssh_keys"]["ed25519_private"] == THIRD_KEY.private
    assert config["timezone"] == "UTC"
    assert yaml.safe_load(third.meta_data)["instance-id"] == "iid-third"


@pytest.mark.parametrize("vendor_data", [None, "#!/bin/sh\n"])
def test_copy_of_a_machine_that_makes_its_host_keys_makes_its_own(
    vendor_data: str | None,
) -> None:
    first = make_seed(vendor_data=vendor_data, host_keys=())
    assert make_second(first).vendor_data == first.vendor_data


def size_of(seed: Seed, path: Path, length: int = 0) -> int:
    write_iso(seed, path, length)
    return path.stat().st_size


@pytest.mark.parametrize("size", [0, 100 << 10, 3 << 20])
def test_copys_volume_is_as_long_as_the_first(size: int, tmp_path: Path) -> None:
    """The guest knows the disk's size already."""
    first = make_seed(b"#" * size)
    second = make_second(first)
    assert size_of(second, tmp_path / "2.iso") == size_of(first, tmp_path / "1.iso")


def test_copys_volume_is_as_long_even_where_the_first_is_nearly_full(tmp_path: Path) -> None:
    pool = HostKeyPool(tmp_path / "keys")
    host_keys = pool.take("root@first")
    vendor_data = {"final_message": "x" * 1500}

    def first_of(size: int) -> Seed:
        return make_seed(b"#" * size, vendor_data=vendor_data, host_keys=host_keys)

    def fits(size: int) -> bool:
        volume = tmp_path / f"{size}.iso"
        return size_of(first_of(size), volume) == VOLUME_UNIT

    largest = next(size for size in range(VOLUME_UNIT, 0, -2048) if fits(size))
    second = rename(
        first_of(largest),
        instance_id="iid-second",
        hostname="second",
        host_keys=pool.take("root@second"),
    )
    assert size_of(second, tmp_path / "2.iso", length=VOLUME_UNIT) == VOLUME_UNIT
    assert read_iso(tmp_path / "2.iso") == second


def test_damaged_gzip_in_vendor_data_is_refused() -> None:
    with pytest.raises(ValueError, match="damaged gzip"):
        make_seed(vendor_data=b"\x1f\x8b\x08\0\0\0\0\0\0\3" + b"\xff" * 20)
