"""Volumes of seeds: alike where a guest may have read one and goes on with another."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pycloudlib.guest.access.hostkeys import HostKey
from pycloudlib.guest.data.seed import (
    ROOT_DIRECTORY_SECTOR,
    VOLUME_UNIT,
    Seed,
    build_seed,
    read_iso,
    write_iso,
)
from tests.unit.guest.data.test_seed import merge_as_cloud_init, read_as_cloud_init

BLOCK = 2048
EMPTY = Seed(b"", b"")
FULL = Seed(b"u" * 70_000, b"m" * 5000, b"v" * 9000, b"n" * 3000)


def head(path: Path) -> bytes:
    """Give what comes before the root directory."""
    with path.open("rb") as file:
        return file.read(ROOT_DIRECTORY_SECTOR * 512)


def test_volumes_of_one_length_differ_from_the_root_directory_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_iso(EMPTY, tmp_path / "empty")
    monkeypatch.setattr("time.time", lambda: 2_000_000_000.0)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    write_iso(FULL, tmp_path / "full")
    assert head(tmp_path / "empty") == head(tmp_path / "full")
    assert (tmp_path / "empty").stat().st_size == (tmp_path / "full").stat().st_size


def test_root_directory_is_where_it_is_said_to_be(tmp_path: Path) -> None:
    write_iso(FULL, tmp_path / "seed")
    volume = (tmp_path / "seed").read_bytes()
    directory = volume[ROOT_DIRECTORY_SECTOR * 512 :][:BLOCK]
    for name in FULL.files:
        assert name.encode() in directory, "Rock Ridge tells the names there"
    descriptor = volume[16 * BLOCK : 17 * BLOCK]
    assert int.from_bytes(descriptor[158:162], "little") * 4 == ROOT_DIRECTORY_SECTOR


@pytest.mark.parametrize("seed", [EMPTY, FULL], ids=["empty", "full"])
def test_volume_is_as_long_as_it_says(seed: Seed, tmp_path: Path) -> None:
    write_iso(seed, tmp_path / "seed")
    volume = (tmp_path / "seed").read_bytes()
    for block in (16, 17):
        blocks = volume[block * BLOCK + 80 :][:8]
        assert int.from_bytes(blocks[:4], "little") * BLOCK == len(volume)
        assert int.from_bytes(blocks[4:], "big") * BLOCK == len(volume)
    assert read_iso(tmp_path / "seed") == seed


@pytest.mark.parametrize("size", [0, 1, 2047, 2048, 1 << 20, VOLUME_UNIT - (129 << 10), 5 << 20])
def test_length_that_is_told_beforehand_is_enough(size: int, tmp_path: Path) -> None:
    seed = Seed(b"x" * size, b"meta", b"vendor", b"network")
    write_iso(seed, tmp_path / "seed")
    assert (tmp_path / "seed").stat().st_size == seed.volume_length
    assert seed.volume_length % VOLUME_UNIT == 0
    assert seed.volume_length >= size + (64 << 10)


@pytest.mark.skipif(shutil.which("blkid") is None, reason="the host has no blkid")
def test_it_is_recognised_as_what_cloud_init_looks_for(tmp_path: Path) -> None:
    write_iso(FULL, tmp_path / "seed")
    told = subprocess.run(
        ["blkid", "-p", "-o", "export", tmp_path / "seed"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert "LABEL=cidata" in told
    assert "TYPE=iso9660" in told


HOOK = b"#cloud-boothook\n#!/bin/sh\n"


@pytest.mark.parametrize("vendor_data", [None, "#cloud-config\na: 1\n", "#!/bin/sh\n", {"a": 1}])
def test_boothook_comes_last_and_the_rest_takes_effect(vendor_data: object) -> None:
    def make(boothook: bytes | None) -> bytes:
        seed = build_seed(
            instance_id="iid",
            hostname="vm",
            public_key="ssh-ed25519 AAAA me",
            host_keys=[HostKey("ed25519", "private", "ssh-ed25519 public")],
            vendor_data=vendor_data,  # type: ignore[arg-type]
            boothook=boothook,
        )
        assert seed.vendor_data is not None
        return seed.vendor_data

    *others, last = read_as_cloud_init(make(HOOK))
    assert last == ("text/cloud-boothook", HOOK)
    assert others == list(read_as_cloud_init(make(None)))
    config = merge_as_cloud_init(make(HOOK))
    assert config["ssh_keys"]["ed25519_public"] == "ssh-ed25519 public"
