"""Copies of private files are private while they are being written."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import IO

import pytest

from pycloudlib.files import copy_private


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
