"""Machines whose names and disks are chosen by the caller."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pycloudlib import Qemu
from pycloudlib.errors import InstanceExistsError
from pycloudlib.guest.data.seed import read_iso
from pycloudlib.qemu.disk import diskimage
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.state.savedmachine import SavedMachine
from tests.qemu.conftest import UNSTARTED
from tests.qemu.machines import SMALL, run, runs

pytestmark = pytest.mark.qemu


def names(cloud: Qemu) -> list[str]:
    return [rundir.path.name for rundir in RunDirectory.list_in(cloud.parent_dir)]


def start(cloud: Qemu, image: Path, name: str) -> QemuInstance:
    return cloud.launch(str(image), SMALL, launch_args=UNSTARTED, name=name)


def test_chosen_name_is_the_instance_s_and_its_guest_s(cloud: Qemu, tiny_image: Path) -> None:
    instance = start(cloud, tiny_image, "web")

    assert instance.name == "web"
    assert instance.instance_dir == cloud.parent_dir / "web"
    assert b"local-hostname: web" in read_iso(instance.machine.rundir.seed).meta_data
    assert cloud.get_instance(instance.id).name == "web"


def test_name_in_use_is_refused_and_its_user_stays(cloud: Qemu, tiny_image: Path) -> None:
    first = start(cloud, tiny_image, "web")

    with pytest.raises(InstanceExistsError, match="'web' is in use") as caught:
        start(cloud, tiny_image, "web")

    assert caught.value.directory == first.instance_dir
    assert names(cloud) == ["web"]
    assert first.machine.pid is not None


def test_name_is_free_again_after_a_delete(cloud: Qemu, tiny_image: Path) -> None:
    start(cloud, tiny_image, "web").delete()

    assert start(cloud, tiny_image, "web").name == "web"


def test_only_one_of_several_launches_gets_a_name(cloud: Qemu, tiny_image: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        attempts = [threads.submit(start, cloud, tiny_image, "web") for _ in range(4)]
    errors = [attempt.exception() for attempt in attempts if attempt.exception() is not None]

    assert [type(error) for error in errors] == [InstanceExistsError] * 3
    assert names(cloud) == ["web"]


@pytest.mark.parametrize("name", ["layers", "snapshots", "../web", "Web", ""])
def test_name_that_cannot_be_is_refused(cloud: Qemu, tiny_image: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name is"):
        start(cloud, tiny_image, name)

    assert names(cloud) == []


def test_disk_has_the_size_that_is_asked_for(cloud: Qemu, tiny_image: Path) -> None:
    instance = cloud.launch(str(tiny_image), SMALL, launch_args=UNSTARTED, disk_size_gib=3)

    assert diskimage.read_layer(instance.instance_path).virtual_size == 3 << 30


def test_copy_of_a_saved_machine_has_a_name_but_no_other_disk(
    cloud: Qemu, saved: SavedMachine
) -> None:
    copy = cloud.launch(str(saved.image), name="copy")

    assert copy.name == "copy"
    assert runs(copy)
    with pytest.raises(ValueError, match="disk_size_gib"):
        cloud.launch(str(saved.image), disk_size_gib=20)
    with pytest.raises(InstanceExistsError):
        cloud.launch(str(saved.image), name="copy")


def test_forks_have_the_names_that_are_chosen(cloud: Qemu, tiny_image: Path) -> None:
    machine = run(cloud, tiny_image)

    first, second = machine.fork(2, names=["one", "two"])

    assert {first.name, second.name} == {"one", "two"}
    before = names(cloud)
    for wrong in (["one"], ["a", "a"], ["three", "one"]):
        with pytest.raises((ValueError, InstanceExistsError)):
            machine.fork(2, names=wrong)
    assert names(cloud) == before
