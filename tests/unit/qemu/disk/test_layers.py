from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pycloudlib._base.files import create_private_directory
from pycloudlib.errors import ImageInUseError
from pycloudlib.images import uses
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.disk.diskimage import create_overlay, inspect_image
from pycloudlib.qemu.disk.layers import LayerStore, chain, deleting
from pycloudlib.qemu.host.ownership import disown
from pycloudlib.qemu.state.rundir import RunDirectory


def write(disk: Path, pattern: int, offset: int = 0) -> None:
    """Write a megabyte as a guest would."""
    command = f"write -P {pattern} {offset}M 1M"
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, disk], check=True, capture_output=True)


def holds(disk: Path, pattern: int, offset: int = 0) -> bool:
    """Say whether a megabyte reads as it was written."""
    command = f"read -P {pattern} {offset}M 1M"
    found = subprocess.run(
        ["qemu-io", "-f", "qcow2", "-r", "-c", command, disk], check=False, capture_output=True
    )
    return found.returncode == 0 and b"verification failed" not in found.stdout


def check_unused(image: Path, working_dir: Path) -> None:
    """Raise an error if an instance or a snapshot is built on an image."""
    with deleting(image, working_dir):
        pass


@pytest.fixture
def working_dir(tmp_path: Path) -> Path:
    return tmp_path / "work"


@pytest.fixture
def parent_dir(working_dir: Path) -> Path:
    parent = working_dir / "pycl-qemu-t"
    parent.mkdir(parents=True)
    return parent


@pytest.fixture
def made(parent_dir: Path) -> LayerStore:
    return LayerStore(parent_dir)


def make_disk(parent_dir: Path, name: str, image: Path) -> Path:
    """Make what an instance's directory has."""
    directory = parent_dir / name
    directory.mkdir()
    (directory / "machine.json").write_text("{}")
    disk = directory / f"{name}.qcow2"
    create_overlay(inspect_image(image, parent_dir.parent), disk)
    return disk


def test_snapshot_holds_what_the_disk_held_and_the_disk_goes_on(
    parent_dir: Path, made: LayerStore, tiny_image: Path
) -> None:
    disk = make_disk(parent_dir, "vm", tiny_image)
    write(disk, 1)
    image = made.freeze(disk, "first.img")
    write(disk, 2)
    assert holds(image, 1)
    assert holds(disk, 2)
    assert chain(image)[1:] == [tiny_image]
    assert len(chain(disk)) == 3


@pytest.mark.parametrize("moment", ["layers", "snapshots"])
def test_snapshot_is_made_though_another_program_removes_empty_directories(
    parent_dir: Path,
    made: LayerStore,
    tiny_image: Path,
    moment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It comes just when one of them has been made, and waits for the snapshot."""
    disk = make_disk(parent_dir, "vm", tiny_image)
    other = threading.Thread(target=made.remove_if_empty)

    def create(directory: Path, *, parents: bool) -> None:
        create_private_directory(directory, parents=parents)
        if directory.name == moment and other.ident is None:
            other.start()
            other.join(0.1)

    monkeypatch.setattr(layers, "create_private_directory", create)
    image = made.freeze(disk, "first.img")
    other.join(30)
    assert chain(disk)[1].samefile(image)


def test_empty_directories_are_removed(parent_dir: Path, made: LayerStore) -> None:
    made.snapshots.mkdir()
    made.remove_if_empty()
    made.remove_if_empty()
    assert list(parent_dir.iterdir()) == []


def test_directories_of_earlier_versions_are_removed(parent_dir: Path, made: LayerStore) -> None:
    made.layers.mkdir()
    (made.layers / ".lock").touch()
    made.remove_if_empty()
    assert list(parent_dir.iterdir()) == []


@pytest.mark.parametrize("act", [LayerStore.collect, LayerStore.remove_if_empty])
def test_nothing_is_made_anew_by_another_program_that_removes(
    parent_dir: Path,
    made: LayerStore,
    tiny_image: Path,
    act: Callable[[LayerStore], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It comes just before each step of a removal, and just after the last one."""
    disk = make_disk(parent_dir, "vm", tiny_image)
    made.freeze(disk, "first.img").unlink()
    RunDirectory(disk.parent).remove()
    uses.forget_gone(made.snapshots)
    disown(made.snapshots / "first.img")
    made.collect()
    others: list[threading.Thread] = []

    def come(path: Path) -> None:
        if path.is_relative_to(parent_dir):
            others.append(threading.Thread(target=act, args=[made]))
            others[-1].start()
            others[-1].join(0.05)  # it may have to wait

    before(monkeypatch, Path, "unlink", come)
    before(monkeypatch, Path, "rmdir", come)
    made.remove_if_empty()
    for other in others:
        other.join(30)
    act(made)
    parent_dir.rmdir()
    assert others


def before(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, act: Callable[..., object]
) -> None:
    """Do something each time just before a function of the main thread's is called."""
    real = getattr(owner, name)

    def called(*arguments: Any, **options: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            act(arguments[0])
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, called)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(layers, "chain"), (uses, "create_private_directory"), (os, "link"), (os.path, "lexists")],
)
def test_machine_that_is_deleted_while_another_program_records_it_leaves_nothing(
    working_dir: Path,
    parent_dir: Path,
    tiny_image: Path,
    owner: object,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = make_disk(parent_dir, "vm", tiny_image)

    def delete(*_arguments: object) -> None:
        monkeypatch.undo()
        RunDirectory(disk.parent).remove()
        parent_dir.rmdir()

    before(monkeypatch, owner, name, delete)
    layers.record_missing_uses(working_dir)
    assert not parent_dir.exists()
    assert find_records(tiny_image) == []


@pytest.mark.parametrize(
    ("owner", "name"),
    [(uses, "forget"), (Path, "unlink"), (os, "scandir"), (Path, "rmdir")],
)
def test_machine_that_another_program_records_while_it_is_deleted_leaves_nothing(
    parent_dir: Path,
    tiny_image: Path,
    owner: object,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = make_disk(parent_dir, "vm", tiny_image)
    layers.record_uses(disk)
    recorded: list[object] = []
    recording = False

    def record(argument: object) -> None:
        nonlocal recording
        if not recording:
            recording = True
            layers.record_uses(disk)
            recorded.append(argument)
            recording = False

    before(monkeypatch, owner, name, record)
    RunDirectory(disk.parent).remove()
    assert recorded
    assert list(parent_dir.iterdir()) == []
    assert find_records(tiny_image) == []


def find_records(image: Path) -> list[Path]:
    return list(image.parent.glob(f".{image.name}.*"))


def test_nothing_is_copied(parent_dir: Path, made: LayerStore, tiny_image: Path) -> None:
    disk = make_disk(parent_dir, "vm", tiny_image)
    before = disk.stat().st_ino
    image = made.freeze(disk, "first.img")
    assert image.stat().st_ino == before


def test_image_can_be_deleted_while_its_source_lives_on(
    working_dir: Path, parent_dir: Path, made: LayerStore, tiny_image: Path
) -> None:
    disk = make_disk(parent_dir, "vm", tiny_image)
    write(disk, 1)
    image = made.freeze(disk, "first.img")
    check_unused(image, working_dir)
    image.unlink()
    made.collect()
    assert holds(disk, 1)
    assert len(list(made.layers.glob("*.qcow2"))) == 1


def test_images_outlive_their_source_and_layers_go_with_their_last_user(
    parent_dir: Path, made: LayerStore, tiny_image: Path
) -> None:
    disk = make_disk(parent_dir, "vm", tiny_image)
    write(disk, 1)
    first = made.freeze(disk, "first.img")
    write(disk, 2, offset=1)
    second = made.freeze(disk, "second.img")
    disk.unlink()
    (disk.parent / "machine.json").unlink()
    made.collect()
    first.unlink()
    made.collect()
    assert holds(second, 1)
    assert holds(second, 2, offset=1)
    second.unlink()
    made.collect()
    assert list(made.layers.glob("*.qcow2")) == []


def test_image_that_others_are_built_on_is_kept_with_their_names(
    working_dir: Path, parent_dir: Path, made: LayerStore, tiny_image: Path
) -> None:
    disk = make_disk(parent_dir, "vm", tiny_image)
    first = made.freeze(disk, "first.img")
    elsewhere = working_dir / "pycl-qemu-other"
    elsewhere.mkdir()
    copy = make_disk(elsewhere, "copy", first)
    with pytest.raises(ImageInUseError, match="copy") as raised:
        check_unused(first, working_dir)
    assert raised.value.users == ["copy"]
    LayerStore(elsewhere).freeze(copy, "second.img")
    with pytest.raises(ImageInUseError) as raised:
        check_unused(first, working_dir)
    assert raised.value.users == ["copy", "second"]
    with pytest.raises(ImageInUseError):
        check_unused(tiny_image, working_dir)


def test_long_chains_are_merged_and_keep_their_content(
    parent_dir: Path, made: LayerStore, tiny_image: Path
) -> None:
    disk = make_disk(parent_dir, "vm", tiny_image)
    for number in range(layers.MAXIMUM_DEPTH + 5):
        write(disk, number + 1, offset=number)
        made.freeze(disk, f"{number}.img")
        assert len(chain(disk)) <= layers.MAXIMUM_DEPTH + 2
    assert all(holds(disk, number + 1, number) for number in range(layers.MAXIMUM_DEPTH + 5))
    assert holds(made.snapshots / "3.img", 4, offset=3)


def test_failure_in_the_middle_leaves_the_disk_as_it_was(
    parent_dir: Path, made: LayerStore, tiny_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = make_disk(parent_dir, "vm", tiny_image)
    write(disk, 1)
    before = disk.stat().st_ino

    def fail(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pycloudlib.qemu.disk.diskimage.create_overlay", fail)
    with pytest.raises(KeyboardInterrupt):
        made.freeze(disk, "first.img")
    assert disk.stat().st_ino == before
    assert list(made.snapshots.iterdir()) == []
    assert list(made.layers.glob("*.qcow2")) == []


def test_broken_disk_elsewhere_is_no_obstacle(
    working_dir: Path, parent_dir: Path, made: LayerStore, tiny_image: Path
) -> None:
    disk = make_disk(parent_dir, "vm", tiny_image)
    image = made.freeze(disk, "first.img")
    tiny_image.unlink()
    assert chain(image) == [image, tiny_image]
    made.collect()
    check_unused(image, working_dir)
