from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest

from pycloudlib.errors import ImageInUseError, ImageNotFoundError
from pycloudlib.images import uses


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = tmp_path / "images" / "noble" / "20260101" / "a.img"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"image")
    return image


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    disk = tmp_path / "work" / "vm" / "vm.qcow2"
    disk.parent.mkdir(parents=True)
    disk.touch()
    return disk


def try_removing(
    *files: Path, by_name: bool = False, limit: float = uses.REMOVAL_LIMIT
) -> list[str]:
    """Give who keeps files from being removed."""
    try:
        with uses.removing(*files, by_name=by_name, limit=limit):
            return []
    except ImageInUseError as error:
        return error.users


@pytest.fixture(params=["links", "no links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Say whether hard links lead from the disk to the image's file system."""
    if request.param == "no links":

        def link(source: Path, target: Path) -> None:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(target))

        monkeypatch.setattr(os, "link", link)
    return bool(request.param == "links")


@pytest.mark.usefixtures("links")
def test_use_ends_with_the_disk_however_that_goes(image: Path, disk: Path) -> None:
    uses.record(disk, [image])
    assert try_removing(image) == ["vm"]
    shutil.rmtree(disk.parent)
    assert try_removing(image) == []
    assert list(image.parent.iterdir()) == [image]


@pytest.mark.usefixtures("links")
def test_use_ends_when_it_is_forgotten(image: Path, disk: Path) -> None:
    uses.record(disk, [image])
    uses.forget(disk)
    assert list(image.parent.iterdir()) == [image]
    assert list(disk.parent.iterdir()) == [disk]


@pytest.mark.usefixtures("links")
def test_what_a_disk_is_built_on_by_now_counts_alone(image: Path, disk: Path) -> None:
    other = image.with_name("b.img")
    other.touch()
    uses.record(disk, [image])
    uses.record(disk, [other])
    assert (try_removing(image), try_removing(other)) == ([], ["vm"])


def test_use_counts_where_the_disk_is_not_seen(image: Path, disk: Path, tmp_path: Path) -> None:
    """As from another mount namespace: the same file system, by other paths."""
    uses.record(disk, [image])
    (tmp_path / "work").rename(tmp_path / "elsewhere")
    assert try_removing(image) == ["vm"]
    shutil.rmtree(tmp_path / "elsewhere")
    assert try_removing(image) == []


def test_use_counts_in_a_home_that_was_copied_without_its_links(
    image: Path, disk: Path, tmp_path: Path
) -> None:
    uses.record(disk, [image])
    shutil.copytree(image.parent, tmp_path / "backup")
    for directory in (tmp_path / "work", tmp_path / "images"):
        directory.rename(tmp_path / "old")
        shutil.copytree(tmp_path / "old", directory)
        shutil.rmtree(tmp_path / "old")
    assert try_removing(image) == ["vm"]
    assert try_removing(tmp_path / "backup" / image.name) == [], "a copy of images alone"
    uses.record(disk, [image])
    assert try_removing(image) == ["vm"]
    shutil.rmtree(disk.parent)
    # Another machine of that name is not the same.
    disk.parent.mkdir()
    disk.touch()
    assert try_removing(image) == []
    assert list(image.parent.iterdir()) == [image]


@pytest.mark.parametrize("damage", ["of another host", "unreadable"])
def test_use_that_cannot_be_judged_counts_for_a_month(
    image: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(target))

    monkeypatch.setattr(os, "link", link)
    uses.record(disk, [image])
    (record,) = [file for file in image.parent.iterdir() if file != image]
    if damage == "unreadable":
        record.write_text("{")
    else:
        # A container, perhaps, with the machine-id of its image, as others of that have it.
        monkeypatch.setattr(socket, "gethostname", lambda: "another")
    shutil.rmtree(disk.parent)
    assert len(try_removing(image)) == 1
    month_ago = time.time() - 31 * 86400
    os.utime(record, (month_ago, month_ago))
    assert try_removing(image) == []


def test_use_is_seen_by_every_path(image: Path, disk: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "images")
    alias = tmp_path / "alias.img"
    alias.symlink_to(link / image.relative_to(tmp_path / "images"))
    uses.record(disk, [alias])
    for path in (image, alias, alias.readlink(), image.parent / ".." / "20260101" / "a.img"):
        assert try_removing(path) == ["vm"]


def test_names_that_begin_alike_are_told_apart(image: Path, disk: Path) -> None:
    longer = image.with_name("a.img.b.img")
    longest = image.with_name("x" * 255)
    for file in (longer, longest):
        file.touch()
    uses.record(disk, [longer, longest])
    assert try_removing(image) == []
    assert try_removing(longer) == try_removing(longest) == ["vm"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_image_that_nothing_can_be_recorded_beside_can_be_used(
    image: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number), str(target))

    monkeypatch.setattr(os, "link", link)
    uses.record(disk, [image])
    assert try_removing(image) == []
    with uses.holding(image):
        assert try_removing(image) == [uses.LAUNCHING]


def test_record_that_names_another_file_removes_nothing(image: Path, disk: Path) -> None:
    uses.record(disk, [image])
    (kept,) = disk.with_name("vm.qcow2.uses").iterdir()
    kept.write_text(kept.read_text().replace(f".a.img.{kept.name}.used", "a.img"))
    uses.forget(disk)
    assert image.exists()


def test_directory_of_another_kind_is_left_alone(disk: Path) -> None:
    others = disk.with_name("vm.qcow2.uses")
    others.mkdir()
    (others / "notes").touch()
    uses.forget(disk)
    assert (others / "notes").exists()


def test_held_file_is_not_removed(image: Path) -> None:
    kernel = image.with_name("kernel")
    kernel.touch()
    with uses.holding(kernel), uses.holding(kernel):
        assert try_removing(image, kernel) == [uses.LAUNCHING]
    assert try_removing(image, kernel) == []


def test_names_of_one_file_are_held_by_themselves(image: Path) -> None:
    other = image.with_name("b.img")
    other.hardlink_to(image)
    with uses.holding(other):
        assert try_removing(image, by_name=True) == []
        assert try_removing(other, by_name=True) == [uses.LAUNCHING]
        assert try_removing(image) == [uses.LAUNCHING]


def test_hold_ends_with_its_block_though_a_child_has_the_file_open(image: Path) -> None:
    ours, childs = os.pipe()
    with uses.holding(image):
        child = os.fork()
        if not child:
            os.close(childs)
            os.read(ours, 1)
            os._exit(0)
    os.close(ours)
    try:
        assert try_removing(image) == []
    finally:
        os.close(childs)
        os.waitpid(child, 0)


def test_file_that_is_being_removed_is_not_held(image: Path) -> None:
    met: list[BaseException] = []

    def hold() -> None:
        try:
            with uses.holding_image(str(image), image.parent):
                pass
        except ImageNotFoundError as error:
            met.append(error)

    launch = threading.Thread(target=hold)
    with uses.removing(image):
        launch.start()
        image.unlink()
    launch.join(30)
    assert len(met) == 1


def test_file_that_is_replaced_meanwhile_is_held_as_it_is_then(image: Path) -> None:
    other = image.with_name("b.img")
    other.touch()
    with uses.removing(image):
        launch = threading.Thread(target=lambda: uses.holding(image).__enter__())
        launch.start()
        other.replace(image)
    launch.join(30)
    assert not launch.is_alive()


@pytest.mark.parametrize("by_name", [False, True])
def test_who_removes_a_file_that_another_removes_waits(
    image: Path, by_name: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = threading.Event()
    monkeypatch.setattr("pycloudlib.images.uses.time.sleep", lambda _seconds: waits.set())
    met: list[list[str]] = []
    second = threading.Thread(target=lambda: met.append(try_removing(image, by_name=by_name)))
    with uses.removing(image, by_name=by_name):
        second.start()
        assert waits.wait(30)
        image.unlink()
    second.join(30)
    assert met == [[]]


def test_file_that_is_replaced_by_another_is_removed_only_if_it_is_not_used_then(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = image.with_name("b.img")
    other.touch()
    waits = threading.Event()
    monkeypatch.setattr("pycloudlib.images.uses.time.sleep", lambda _seconds: waits.set())
    met: list[list[str]] = []
    second = threading.Thread(target=lambda: met.append(try_removing(image)))
    with contextlib.ExitStack() as stack:
        with uses.removing(image):
            second.start()
            assert waits.wait(30)
            stack.enter_context(uses.holding(other))
            other.replace(image)
        second.join(30)
    assert met == [[uses.LAUNCHING]]


def test_removal_that_does_not_end_is_not_waited_for_without_end(image: Path) -> None:
    with uses.removing(image):
        assert try_removing(image, limit=0) == [uses.REMOVING]


def test_missing_files_are_in_nobodys_use(tmp_path: Path) -> None:
    assert try_removing(tmp_path / "none" / "a.img") == []
    with pytest.raises(FileNotFoundError), uses.holding(tmp_path / "a.img"):
        pass
