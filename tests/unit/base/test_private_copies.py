"""Copies of private files are private while they are being written."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import IO

import pytest

from pycloudlib._base.files import copy_private, create_directories, owner_opener


def test_copy_is_its_owners_alone_from_its_first_byte_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"secret")
    source.chmod(0o644)
    copy, modes = shutil.copyfileobj, []

    def look_and_copy(original: IO[bytes], written: IO[bytes]) -> None:
        modes.append(stat.S_IMODE(os.fstat(written.fileno()).st_mode))
        copy(original, written)

    monkeypatch.setattr(shutil, "copyfileobj", look_and_copy)
    copy_private(source, target)
    assert modes == [0o600]
    assert target.read_bytes() == b"secret"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_what_is_made_only_its_owner_can_write_to(umask: int, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    before = os.umask(umask)
    try:
        create_directories(place / "a" / "b")
        create_directories(place / "shared" / "noble", 0o755)
        create_directories(place / "a" / "b")
        with open(place / "image", "ab+", opener=owner_opener) as file:
            file.write(b"image")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in place.rglob("*")}
    assert modes == {
        place / "a": 0o700,
        place / "a" / "b": 0o700,
        place / "shared": 0o755 & ~umask,
        place / "shared" / "noble": 0o755 & ~umask,
        place / "image": 0o644 & ~umask,
    }
    with pytest.raises(FileExistsError):
        create_directories(place / "image")
