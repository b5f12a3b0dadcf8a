"""Volumes of seeds as other programs read them, after what was written into their descriptors."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pycloudlib.guest.seed import VOLUME_UNIT, Seed, read_iso, write_iso

SEED = Seed(b"#!/bin/sh\r\n" * 1000, b"instance-id: a\n", b"#cloud-config\n", b"version: 2\n")
LARGE = Seed(b"#" * (5 << 20), b"instance-id: a\n")


def run(*argv: str | Path) -> bytes:
    return subprocess.run(argv, check=True, capture_output=True, timeout=60).stdout


def by_isoinfo(volume: Path, name: str, tree: str) -> bytes:
    return run("isoinfo", tree, "-x", f"/{name}", "-i", volume)


def by_7z(volume: Path, name: str) -> bytes:
    return run("7z", "e", "-so", volume, name)


def by_bsdtar(volume: Path, name: str) -> bytes:
    return run("bsdtar", "-xOf", volume, name)


READERS: dict[str, tuple[str, Callable[[Path, str], bytes]]] = {
    "isoinfo of Rock Ridge": ("isoinfo", lambda volume, name: by_isoinfo(volume, name, "-R")),
    "isoinfo of Joliet": ("isoinfo", lambda volume, name: by_isoinfo(volume, name, "-J")),
    "7z": ("7z", by_7z),
    "bsdtar": ("bsdtar", by_bsdtar),
}


@pytest.mark.parametrize("length", [0, 3 * VOLUME_UNIT], ids=["own length", "given length"])
@pytest.mark.parametrize("seed", [SEED, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("reader", READERS)
def test_volume_is_read_by(reader: str, seed: Seed, length: int, tmp_path: Path) -> None:
    program, read = READERS[reader]
    if shutil.which(program) is None:
        pytest.skip(f"this host has no {program}")
    write_iso(seed, tmp_path / "seed.iso", length)
    assert {name: read(tmp_path / "seed.iso", name) for name in seed.files} == seed.files


def test_volume_is_labelled_for_isoinfo(tmp_path: Path) -> None:
    if shutil.which("isoinfo") is None:
        pytest.skip("this host has no isoinfo")
    write_iso(SEED, tmp_path / "seed.iso", 2 * VOLUME_UNIT)
    told = run("isoinfo", "-d", "-i", tmp_path / "seed.iso").decode().splitlines()
    assert "Volume id: cidata" in told
    assert f"Volume size is: {2 * VOLUME_UNIT // 2048}" in told


@pytest.mark.parametrize("length", [VOLUME_UNIT, VOLUME_UNIT + 2048, 3 * VOLUME_UNIT])
def test_volume_of_a_given_length_has_it_and_is_read_again(length: int, tmp_path: Path) -> None:
    write_iso(SEED, tmp_path / "seed.iso", length)
    assert (tmp_path / "seed.iso").stat().st_size == length
    assert read_iso(tmp_path / "seed.iso") == SEED


def test_length_that_is_too_short_is_not_kept_to(tmp_path: Path) -> None:
    write_iso(LARGE, tmp_path / "seed.iso", VOLUME_UNIT)
    assert (tmp_path / "seed.iso").stat().st_size == LARGE.volume_length == 2 * VOLUME_UNIT
    assert read_iso(tmp_path / "seed.iso") == LARGE
