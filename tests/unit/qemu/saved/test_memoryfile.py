"""A guest's memory comes into a file again and again, and is what it is at the last time."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pycloudlib.errors import CloudError
from pycloudlib.qemu.saved import memoryfile
from pycloudlib.qemu.saved.guestmemory import Mapping, list_own, open_shared
from pycloudlib.qemu.saved.memoryfile import MemoryFile, list_data

MIB = 1 << 20
PAGE = 4096
SIZE = 16 * MIB


@pytest.fixture
def guest() -> Iterator[int]:
    """Give a memory of 16 MiB with nothing in it."""
    descriptor = os.memfd_create("pycloudlib-guest-memory", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, SIZE)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "memory"


def content(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def keep(descriptor: int, target: Path) -> int:
    """Write a memory to a new file, once."""
    size = os.fstat(descriptor).st_size
    with MemoryFile(target, size) as kept:
        return kept.update(open_shared(descriptor, size))


def taken(facts: os.stat_result) -> int:
    return facts.st_blocks * 512


def test_kept_memory_reads_the_same(guest: int, target: Path) -> None:
    os.pwrite(guest, b"first", 0)
    os.pwrite(guest, os.urandom(3 * PAGE), 5 * MIB - PAGE)
    os.pwrite(guest, b"last", SIZE - 4)
    keep(guest, target)
    assert target.read_bytes() == content(guest)


def test_kept_memory_is_its_owners_alone(guest: int, target: Path) -> None:
    before = os.umask(0)
    try:
        keep(guest, target)
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == 0o600


def test_what_has_nothing_in_it_is_left_out(guest: int, target: Path) -> None:
    os.pwrite(guest, bytes(8 * MIB), 0)  # written to, and yet nothing
    os.pwrite(guest, b"x", 9 * MIB)
    keep(guest, target)
    assert target.stat().st_size == SIZE
    assert taken(target.stat()) <= MIB
    assert target.read_bytes() == content(guest)


def test_memory_with_nothing_in_it_takes_nothing(guest: int, target: Path) -> None:
    assert keep(guest, target) == 0
    assert target.stat().st_size == SIZE
    assert taken(target.stat()) == 0


def test_memory_of_an_odd_size_is_kept_whole(target: Path, tmp_path: Path) -> None:
    source = tmp_path / "odd"
    source.write_bytes(os.urandom(MIB + 12345))
    descriptor = os.open(source, os.O_RDONLY)
    try:
        keep(descriptor, target)
    finally:
        os.close(descriptor)
    assert target.read_bytes() == source.read_bytes()


def test_what_has_changed_is_written_and_nothing_else(guest: int, target: Path) -> None:
    os.pwrite(guest, os.urandom(4 * MIB), 2 * MIB)
    memory = open_shared(guest, SIZE)
    with MemoryFile(target, SIZE) as kept:
        assert kept.update(memory) == 4 * MIB
        assert kept.update(memory) == 0
        os.pwrite(guest, b"changed", 3 * MIB)
        os.pwrite(guest, bytes(PAGE), 4 * MIB)  # given back
        os.pwrite(guest, b"new", 12 * MIB)
        written = kept.update(memory)
        assert 0 < written < MIB
    assert target.read_bytes() == content(guest)


def test_pages_that_are_given_back_have_nothing_in_them(guest: int, target: Path) -> None:
    """Those of a memory that has become shorter, too."""
    os.pwrite(guest, b"x" * (2 * MIB), 0)
    memory = open_shared(guest, SIZE)
    with MemoryFile(target, SIZE) as kept:
        kept.update(memory)
        os.ftruncate(guest, 0)
        os.ftruncate(guest, SIZE)
        kept.update(memory)
    assert target.read_bytes() == bytes(SIZE)


@pytest.mark.parametrize("ranges", [True, False])
def test_file_begins_with_what_another_has(
    guest: int, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: bool
) -> None:
    """Also where the file system copies no ranges by itself."""
    if not ranges:

        def refuse(*_arguments: object) -> int:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        monkeypatch.setattr(os, "copy_file_range", refuse)
    os.pwrite(guest, os.urandom(3 * MIB), 5 * MIB)
    base = tmp_path / "base"
    keep(guest, base)
    os.pwrite(guest, b"changed", 6 * MIB)
    with base.open("rb") as file, MemoryFile(target, SIZE) as kept:
        kept.begin_with(file.fileno())
        assert 0 < kept.update(open_shared(guest, SIZE)) < MIB
    assert target.read_bytes() == content(guest)
    assert taken(target.stat()) <= 4 * MIB


def test_any_change_is_noticed(guest: int, target: Path) -> None:
    chance = random.Random(4711)
    memory = open_shared(guest, SIZE)
    with MemoryFile(target, SIZE) as kept:
        for _ in range(30):
            for _ in range(chance.randrange(20)):
                length = chance.choice((1, 5, PAGE, 300_000))
                data = chance.choice((bytes(length), chance.randbytes(length)))
                os.pwrite(guest, data, chance.randrange(SIZE - length))
            kept.update(memory)
            assert target.read_bytes() == content(guest)


def test_file_that_is_there_already_is_refused_and_stays(guest: int, target: Path) -> None:
    target.write_text("mine")
    with pytest.raises(FileExistsError):
        keep(guest, target)
    assert target.read_text() == "mine"


def test_link_to_somewhere_else_is_not_followed(guest: int, target: Path, tmp_path: Path) -> None:
    target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="memory"):
        keep(guest, target)
    assert not (tmp_path / "elsewhere").exists()


def test_no_room_is_told(guest: int, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int, _data: bytes, _offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.pwrite(guest, b"x", 0)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CloudError, match="No space for the guest's memory"):
        keep(guest, target)


def test_what_a_write_leaves_over_is_written_too(
    guest: int, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may write less than it was given, as when the file system is nearly full."""
    pwrite = os.pwrite
    pwrite(guest, os.urandom(MIB), 0)
    monkeypatch.setattr(
        os,
        "pwrite",
        lambda descriptor, data, offset: pwrite(descriptor, data[: len(data) // 2 + 1], offset),
    )
    keep(guest, target)
    assert target.read_bytes() == content(guest)


def test_data_of_a_sparse_file_is_listed(guest: int) -> None:
    assert list(list_data(guest)) == []
    os.pwrite(guest, b"x", 3 * MIB)
    assert list(list_data(guest)) == [(3 * MIB, 3 * MIB + PAGE)]


def test_runs_are_cut_at_the_multiples_of_a_length() -> None:
    assert list(memoryfile.cut_runs([(3, 25), (30, 31)], 10)) == [
        (3, 10),
        (10, 20),
        (20, 25),
        (30, 31),
    ]
    assert list(memoryfile.cut_runs([], 10)) == []


def test_page_table_that_ends_early_is_not_believed(tmp_path: Path) -> None:
    """As that of a process that has just ended: pages of the guest's would be left out."""
    table = tmp_path / "pagemap"
    table.write_bytes((b"\0" * 7 + b"\x80") * 3)
    mapping, longer = Mapping(0, 3 * PAGE), Mapping(0, 4 * PAGE)
    descriptor = os.open(table, os.O_RDONLY)
    try:
        assert list_own(descriptor, mapping, 1) == [(0, 3 * PAGE)]
        with pytest.raises(CloudError, match="3 pages of a guest's 4"):
            list_own(descriptor, longer, 1)
    finally:
        os.close(descriptor)
