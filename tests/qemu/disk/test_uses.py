"""Images are in use, whoever looks, from whichever directory, by whichever path."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pycloudlib import Qemu
from pycloudlib.errors import ImageInUseError, ImageNotFoundError
from pycloudlib.images import store, uses
from pycloudlib.qemu.disk import diskimage, layers
from pycloudlib.qemu.instance import QemuInstance
from tests.qemu.conftest import UNSTARTED

pytestmark = pytest.mark.qemu


@pytest.fixture
def image(tmp_path: Path, tiny_image: Path) -> Path:
    """Give an image in its place below `images`, with a kernel."""
    image = tmp_path / "images" / "noble" / "20260101" / "noble-server-cloudimg-amd64.img"
    image.parent.mkdir(parents=True, exist_ok=True)
    tiny_image.rename(image)
    # docs of Linux, x86/boot: one sector of setup, the mark of a kernel, version 2.06.
    kernel = bytearray(64 << 10)
    kernel[0x1F1] = 1
    kernel[0x1FE:0x200] = b"\x55\xaa"
    kernel[0x202:0x208] = b"HdrS\x06\x02"
    store.kernel_path(image).write_bytes(kernel)
    return image


@pytest.fixture
def clouds(tmp_path: Path, working_dir: Path) -> Iterator[Callable[..., Qemu]]:
    """Make clouds that work somewhere; all are cleaned afterwards."""
    (tmp_path / "images").mkdir()
    made: list[Qemu] = []

    def make(working: Path = working_dir, images: Path = tmp_path / "images") -> Qemu:
        working.mkdir(exist_ok=True)
        cloud = Qemu(
            f"t{len(made)}",
            timestamp_suffix=False,
            config_file=io.StringIO(
                f'[qemu]\nworking_dir = "{working}"\nimage_dir = "{images}"\naccelerator = "tcg"\n'
            ),
        )
        made.append(cloud)
        return cloud

    yield make
    assert [error for cloud in reversed(made) for error in cloud.clean()] == []


@pytest.fixture
def owner(clouds: Callable[..., Qemu]) -> Qemu:
    """Give a cloud whose machines are looked at."""
    return clouds()


@pytest.fixture
def other(clouds: Callable[..., Qemu], tmp_path: Path) -> Qemu:
    """Give a cloud that works elsewhere, and finds images behind a link."""
    (tmp_path / "link").symlink_to(tmp_path / "images")
    return clouds(tmp_path / "elsewhere", tmp_path / "link")


def forget_records(vm: QemuInstance) -> None:
    """Leave a machine as an older version made it."""
    uses.forget(vm.instance_path)


@pytest.mark.parametrize("running", [True, False])
def test_image_is_not_deleted_from_another_working_dir(
    owner: Qemu, other: Qemu, image: Path, running: bool
) -> None:
    vm = owner.launch(str(image), launch_args=UNSTARTED)
    if not running:
        vm.machine.kill()
    through_link = other.image_dir / image.relative_to(owner.image_dir)
    for looking in (owner, other):
        with pytest.raises(ImageInUseError) as refused:
            looking.delete_image(str(through_link))
        assert refused.value.users == [vm.name]
        assert looking.prune_images(keep=0) == []
    assert image.exists()
    vm.delete()
    assert [file.name for file in image.parent.iterdir() if file.name.startswith(".")] == []
    assert other.prune_images(keep=0) == [str(through_link)]


def test_image_behind_a_link_is_not_deleted_under_its_machine(
    clouds: Callable[..., Qemu], owner: Qemu, other: Qemu, image: Path
) -> None:
    through_link = other.image_dir / image.relative_to(owner.image_dir)
    vm = clouds(images=other.image_dir).launch(str(through_link), launch_args=UNSTARTED)
    vm.machine.kill()
    forget_records(vm)  # as older versions made it: it is found by what its disk is built on
    with pytest.raises(ImageInUseError) as refused:
        owner.delete_image(str(image))
    assert refused.value.users == [vm.name]


def test_machine_that_runs_keeps_its_image_without_a_record(
    owner: Qemu, other: Qemu, image: Path
) -> None:
    """As an image in a directory of another user, or a machine of an older version."""
    vm = owner.launch(str(image), launch_args=UNSTARTED)
    forget_records(vm)
    hard_link = image.with_name("other.img")
    hard_link.hardlink_to(image)
    for path in (image, hard_link):
        with pytest.raises(ImageInUseError) as refused:
            other.delete_image(str(path))
        assert refused.value.users == [uses.RUNNING]


def test_machines_of_older_versions_are_recorded_before_a_download(
    owner: Qemu, other: Qemu, image: Path
) -> None:
    vm = owner.launch(str(image), launch_args=UNSTARTED)
    vm.machine.kill()
    forget_records(vm)
    layers.record_missing_uses(owner.working_dir)
    with pytest.raises(ImageInUseError):
        other.delete_image(str(image))


def test_machine_of_a_directory_that_was_removed_keeps_nothing(
    owner: Qemu, other: Qemu, image: Path
) -> None:
    vm = owner.launch(str(image), launch_args=UNSTARTED)
    vm.machine.kill()
    shutil.rmtree(vm.instance_dir)
    other.delete_image(str(image))
    assert list(image.parent.iterdir()) == []


def test_image_is_not_deleted_while_a_launch_is_under_way(
    owner: Qemu, other: Qemu, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = diskimage.create_overlay
    met: list[list[str]] = []

    def create_after_a_deletion(base: diskimage.BaseImage, path: Path, **options: Any) -> None:
        with pytest.raises(ImageInUseError) as refused:
            other.delete_image(str(base.path))
        met.append(refused.value.users)
        create(base, path, **options)

    monkeypatch.setattr(diskimage, "create_overlay", create_after_a_deletion)
    owner.launch(str(image), launch_args=UNSTARTED)
    assert met == [[uses.LAUNCHING]]


def test_launch_from_an_image_that_was_deleted_just_before_leaves_nothing(
    owner: Qemu, other: Qemu, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = store.resolve

    def resolve_before_a_deletion(image_id: str, image_dir: Path) -> Path:
        found = resolve(image_id, image_dir)
        other.delete_image(image_id)
        return found

    monkeypatch.setattr(store, "resolve", resolve_before_a_deletion)
    with pytest.raises(ImageNotFoundError, match="deleted just now"):
        owner.launch(str(image), launch_args=UNSTARTED)
    assert owner.created_instances == []
    assert not owner.parent_dir.exists()


def test_image_whose_kernel_a_machine_boots_is_not_deleted(
    owner: Qemu, other: Qemu, image: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.img"
    shutil.copy(image, own)
    kernel = other.image_dir / store.kernel_path(image).relative_to(owner.image_dir)
    vm = owner.launch(str(own), kernel_path=kernel, kernel_cmdline="quiet", launch_args=UNSTARTED)
    for _ in range(2):
        for looking in (owner, other):
            with pytest.raises(ImageInUseError) as refused:
                looking.delete_image(str(image))
            assert refused.value.users == [vm.name]
        forget_records(vm)
        layers.record_missing_uses(owner.working_dir)
    vm.delete()
    other.delete_image(str(image))


def test_snapshots_keep_what_they_are_built_on(owner: Qemu, other: Qemu, image: Path) -> None:
    vm = owner.launch(str(image), launch_args=UNSTARTED)
    vm.machine.kill()
    first = owner.snapshot(vm, clean=False)
    vm.delete()
    again = owner.launch(first, launch_args=UNSTARTED)
    again.machine.kill()
    second = owner.snapshot(again, clean=False)
    again.delete()
    with pytest.raises(ImageInUseError) as refused:
        other.delete_image(str(image))
    assert refused.value.users == sorted([Path(first).stem, Path(second).stem])
    with pytest.raises(ImageInUseError):
        other.delete_image(first)
    for snapshot in (second, first):
        owner.delete_image(snapshot)
    other.delete_image(str(image))


def test_snapshot_can_be_deleted_while_its_source_runs_on_the_same_file(
    owner: Qemu, image: Path
) -> None:
    vm = owner.launch(str(image), launch_args=UNSTARTED)
    vm.machine.kill()
    snapshot = owner.snapshot(vm, clean=False)
    vm.machine.power_on()
    owner.delete_image(snapshot)
    assert not Path(snapshot).exists()
    assert all(file.exists() for file in layers.chain(vm.instance_path))


def test_layers_are_kept_though_their_machine_names_them_by_another_path(
    clouds: Callable[..., Qemu], owner: Qemu, image: Path, tmp_path: Path
) -> None:
    (tmp_path / "alias").symlink_to(owner.working_dir)
    alias = clouds(tmp_path / "alias")
    vm = owner.launch(str(image), launch_args=UNSTARTED)
    vm.machine.kill()
    owner.delete_image(owner.snapshot(vm, clean=False))
    layers.LayerStore(alias.working_dir / owner.parent_dir.name).collect()
    assert all(file.exists() for file in layers.chain(vm.instance_path))
