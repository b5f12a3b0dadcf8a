"""Directories and images whose names hold what ids, QEMU and its tools use as separators."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pycloudlib import Qemu
from pycloudlib.cli.machines import list_machines, open_machine
from pycloudlib.errors import ImageNotFoundError, InstanceNotFoundError
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.state.rundir import RunDirectory
from tests.qemu.conftest import UNSTARTED
from tests.qemu.machines import SMALL, qemus, run, runs, save

pytestmark = pytest.mark.qemu

ODD_NAMES = (
    "a::b",
    "x::18000::18001",
    "::",
    "a,b,,c=d,format=raw",
    "nbd:localhost:10809",
    'json:{"driver": "null-co"}',
    "new\nline\ttab 'single' \"double\" \\ %s %%",
    "[a-z]*?{b,c}",
    "-ü日本😀",
    " # ~ ; $( ",
)


@pytest.fixture(params=ODD_NAMES)
def odd(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def odd_cloud(odd: str, tmp_path: Path) -> Iterator[Qemu]:
    """Give a cloud that works, and keeps its images, in directories of an odd name."""
    directories = {key: tmp_path / key / odd for key in ("working_dir", "image_dir")}
    for directory in directories.values():
        directory.mkdir(parents=True)
    lines = [
        f"{key} = {json.dumps(str(path), ensure_ascii=False)}" for key, path in directories.items()
    ]
    config = "\n".join(["[qemu]", *lines, 'accelerator = "tcg"'])
    cloud = Qemu("t", timestamp_suffix=False, config_file=io.StringIO(config))
    yield cloud
    assert cloud.clean() == []
    assert list(directories["working_dir"].iterdir()) == []


def start(cloud: Qemu, image: Path | str) -> QemuInstance:
    return cloud.launch(str(image), SMALL, launch_args=UNSTARTED)


def test_machine_lives_in_an_odd_directory(odd_cloud: Qemu, tiny_image: Path) -> None:
    instance = run(odd_cloud, tiny_image)

    [listed] = list_machines(odd_cloud.working_dir, everywhere=True)
    assert listed.id == instance.id
    found = odd_cloud.get_instance(instance.id)
    assert found.instance_dir == instance.instance_dir
    assert found.id == instance.id
    assert runs(found)

    assert open_machine(odd_cloud, listed.full_name).delete() == []
    assert qemus(instance.instance_dir) == []
    assert not instance.instance_dir.exists()
    with pytest.raises(InstanceNotFoundError):
        odd_cloud.get_instance(instance.id)


def test_machine_is_saved_copied_and_rolled_back_in_an_odd_directory(
    odd_cloud: Qemu, tiny_image: Path
) -> None:
    instance = run(odd_cloud, tiny_image)
    saved = str(save(instance).image)

    copy = odd_cloud.launch(saved)
    odd_cloud.get_instance(instance.id).rollback(saved)

    assert runs(odd_cloud.get_instance(copy.id))
    assert runs(instance)


def test_image_of_an_odd_name(odd: str, odd_cloud: Qemu, tiny_image: Path) -> None:
    """The image's own name is odd, and its directory's: below `image_dir`, and named whole."""
    image = odd_cloud.image_dir / f"{odd}.img"
    shutil.copy(tiny_image, image)
    kernel = image.with_name(f"{image.stem}-vmlinuz-generic")
    kernel.write_text("kernel")

    for image_id in (image.name, image):
        snapshot = odd_cloud.snapshot(start(odd_cloud, image_id), clean=False)
        exported = image.with_name(f"{odd}.exported")
        odd_cloud.export_image(snapshot, exported)
        assert start(odd_cloud, exported).machine.pid is not None
        assert Path(snapshot).with_name(f"{Path(snapshot).stem}-vmlinuz-generic").samefile(kernel)
        for instance in list(odd_cloud.created_instances):
            instance.delete()
        exported.unlink()
        odd_cloud.delete_image(snapshot)
    odd_cloud.delete_image(str(image))

    assert list(odd_cloud.image_dir.iterdir()) == []


@pytest.mark.parametrize("name", ["L" * 255, "日" * 85, "😀" * 63])
def test_image_of_the_longest_name(name: str, cloud: Qemu, tiny_image: Path) -> None:
    """No file can stand beside it; none has to."""
    image = tiny_image.rename(tiny_image.with_name(name))

    snapshot = cloud.snapshot(start(cloud, image), clean=False)
    assert start(cloud, snapshot).machine.pid is not None
    exported = image.with_name(name[: len(name) - 5])
    cloud.export_image(str(image), exported)
    assert cloud.clean() == []

    cloud.delete_image(str(image))
    assert not image.exists()
    with pytest.raises(ImageNotFoundError):
        start(cloud, image)


def test_image_whose_path_no_disk_can_name_is_refused(cloud: Qemu, tiny_image: Path) -> None:
    directory = tiny_image.parent.joinpath(*["d" * 250] * 4)
    directory.mkdir(parents=True)
    image = tiny_image.rename(directory / "tiny.img")

    with pytest.raises(ValueError, match=r"path has [0-9]{4} bytes.*at most 1023"):
        start(cloud, image)

    assert RunDirectory.list_in(cloud.parent_dir) == []


def test_machine_that_cannot_be_saved_for_the_length_of_its_path_goes_on(
    tiny_image: Path, tmp_path: Path
) -> None:
    directory = tmp_path.joinpath(*["d" * 250] * 4)
    directory.mkdir(parents=True)
    config = io.StringIO(f'[qemu]\nworking_dir = "{directory}"\naccelerator = "tcg"\n')
    with Qemu("t", timestamp_suffix=False, config_file=config) as cloud:
        instance = run(cloud, tiny_image)

        with pytest.raises(ValueError, match=r"path has [0-9]{4} bytes.*at most 1023"):
            save(instance)

        assert runs(instance)
        assert [
            *cloud.parent_dir.glob("snapshots/*"),
            *cloud.parent_dir.glob("layers/*.qcow2"),
        ] == []


@pytest.mark.parametrize("name", ["keys-0123abcd", "warm", "cli", "keys"])
def test_machine_that_is_called_as_something_of_ours_is_listed(
    cloud: Qemu, tiny_image: Path, name: str
) -> None:
    instance = cloud.launch(str(tiny_image), SMALL, launch_args=UNSTARTED, name=name)

    assert [found.id for found in list_machines(cloud.working_dir, everywhere=True)] == [
        instance.id
    ]
    assert open_machine(cloud, f"t/{name}").delete() == []
    assert not instance.instance_dir.exists()
