from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import pytest

from pycloudlib.errors import ImageInUseError
from pycloudlib.files import create_private_directory
from pycloudlib.qemu import layers
from pycloudlib.qemu.disk import create_overlay, inspect_image
from pycloudlib.qemu.layers import LayerStore, chain, check_unused


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
    """It comes just when one of them has been made; it waits, if it has to, for the snapshot."""
    disk = make_disk(parent_dir, "vm", tiny_image)
    other = threading.Thread(target=made.remove_if_empty)

    def create(directory: Path) -> None:
        create_private_directory(directory)
        if directory.name == moment and not other.ident:
            other.start()
            other.join(30 if moment == "layers" else 0.1)

    monkeypatch.setattr(layers, "create_private_directory", create)
    image = made.freeze(disk, "first.img")
    other.join(30)
    assert chain(disk)[1].samefile(image)


def test_empty_directories_are_removed(parent_dir: Path, made: LayerStore) -> None:
    made.snapshots.mkdir()
    made.remove_if_empty()
    made.remove_if_empty()
    assert list(parent_dir.iterdir()) == []


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

    monkeypatch.setattr("pycloudlib.qemu.disk.create_overlay", fail)
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
