from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pycloudlib.errors import CloudError
from pycloudlib.qemu import memory
from pycloudlib.qemu.accelerator import Accelerator
from pycloudlib.qemu.memory import ANONYMOUS, SHARED, choose_memory, find_shared_memory, keep

MIB = 1 << 20
PAGE = 4096


@pytest.fixture
def guest() -> Iterator[int]:
    """Give a memory of 16 MiB with nothing in it."""
    descriptor = os.memfd_create("pycloudlib-guest-memory", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, 16 * MIB)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "memory"


def content(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def taken(facts: os.stat_result) -> int:
    return facts.st_blocks * 512


def test_kept_memory_reads_the_same(guest: int, target: Path) -> None:
    os.pwrite(guest, b"first", 0)
    os.pwrite(guest, os.urandom(3 * PAGE), 5 * MIB - PAGE)
    os.pwrite(guest, b"last", 16 * MIB - 4)
    keep(guest, target)
    assert target.read_bytes() == content(guest)


def test_kept_memory_is_its_owners_alone(guest: int, target: Path) -> None:
    before = os.umask(0)
    try:
        keep(guest, target)
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("release", [False, True])
def test_what_has_nothing_in_it_is_left_out(guest: int, target: Path, release: bool) -> None:
    os.pwrite(guest, bytes(8 * MIB), 0)  # written to, and yet nothing
    os.pwrite(guest, b"x", 9 * MIB)
    keep(guest, target, release=release)
    assert target.stat().st_size == 16 * MIB
    assert taken(target.stat()) <= MIB
    assert target.read_bytes() == content(guest)


def test_memory_with_nothing_in_it_takes_nothing(guest: int, target: Path) -> None:
    keep(guest, target)
    assert target.stat().st_size == 16 * MIB
    assert taken(target.stat()) == 0


def test_nothing_is_given_back_to_the_host(guest: int, target: Path) -> None:
    os.pwrite(guest, bytes(12 * MIB), 0)
    os.pwrite(guest, b"x" * PAGE, 3 * MIB)
    before = content(guest)
    assert taken(os.fstat(guest)) >= 12 * MIB
    keep(guest, target, release=True)
    assert taken(os.fstat(guest)) <= MIB
    assert content(guest) == before


def test_memory_stays_as_it_is_unless_it_is_released(guest: int, target: Path) -> None:
    os.pwrite(guest, bytes(4 * MIB), 0)
    keep(guest, target)
    assert taken(os.fstat(guest)) >= 4 * MIB


def test_memory_of_an_odd_size_is_kept_whole(target: Path, tmp_path: Path) -> None:
    source = tmp_path / "odd"
    source.write_bytes(os.urandom(MIB + 12345))
    descriptor = os.open(source, os.O_RDONLY)
    try:
        keep(descriptor, target)
    finally:
        os.close(descriptor)
    assert target.read_bytes() == source.read_bytes()


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


def test_no_room_is_told_and_nothing_is_left(
    guest: int, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int, _data: bytes, _offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.pwrite(guest, b"x", 0)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CloudError, match="No room for the guest's memory"):
        keep(guest, target)
    assert not target.exists()


def test_interrupt_leaves_nothing(
    guest: int, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_descriptor: int, _data: bytes, _offset: int) -> int:
        raise KeyboardInterrupt

    os.pwrite(guest, b"x", 0)
    monkeypatch.setattr(os, "pwrite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        keep(guest, target)
    assert not target.exists()


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


def test_emulation_has_memory_that_can_be_saved_at_once() -> None:
    assert choose_memory(Accelerator.TCG) == SHARED


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("always within_size advise [never] deny force\n", ANONYMOUS),
        ("always within_size advise never [deny] force\n", ANONYMOUS),
        ("always within_size [advise] never deny force\n", SHARED),
        ("[always] within_size advise never deny force\n", SHARED),
        ("", ANONYMOUS),
        (None, ANONYMOUS),
    ],
)
def test_kvm_has_it_where_it_has_huge_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str | None, expected: object
) -> None:
    setting = tmp_path / "shmem_enabled"
    if words is not None:
        setting.write_text(words)
    monkeypatch.setattr(memory, "_HUGE_SHARED", setting)
    assert choose_memory(Accelerator.KVM) == expected


def test_memory_is_found_among_what_a_process_has_open(guest: int) -> None:
    found = find_shared_memory(os.getpid())
    assert found is not None
    os.pwrite(guest, b"me", 0)
    assert found.open("rb").read(2) == b"me"


def test_process_without_such_memory_has_none() -> None:
    assert find_shared_memory(os.getpid()) is None
