"""What first boots begin at: kept in the warm cache, remade, refused, dropped."""

from __future__ import annotations

import logging
import shutil
import stat
import time
from pathlib import Path

import pytest

from pycloudlib import Qemu
from pycloudlib._base.deadline import Deadline
from pycloudlib.diagnosis import Cause
from pycloudlib.errors import CloudError, ImageInUseError
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.launching import startingpoint
from pycloudlib.qemu.launching.warmcache import WarmCache
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.vm.machine import Machine
from tests.conftest import MakeImage
from tests.qemu.conftest import CloudMaker
from tests.qemu.machines import host_of, mode, qemus, runs, touch
from tests.qemu.reader import begins_there, launch, machines_in, prints, starts

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("emptied")]


def test_what_is_kept_is_its_owners_alone(cloud: Qemu, reader_image: Path) -> None:
    launch(cloud, reader_image)
    (start,) = starts(cloud)
    directory = savedmachine.directory_of(Path(start.image_id))
    assert mode(directory) == 0o700
    files = [file for file in directory.parent.rglob("*") if stat.S_ISREG(file.lstat().st_mode)]
    assert {file.name for file in files} >= {"memory", "state", "seed.iso", "console.log"}
    assert {mode(file) & 0o077 for file in files} == {0}


def test_starting_point_stays_while_a_machine_is_built_on_it(
    cloud: Qemu, reader_image: Path
) -> None:
    instance = launch(cloud, reader_image)
    (start,) = starts(cloud)
    assert start.base == str(reader_image)
    assert cloud.prune_warm_images() == []
    instance.delete()
    assert cloud.prune_warm_images() == [start.key]


def test_starting_point_goes_with_its_image(cloud: Qemu, reader_image: Path) -> None:
    launch(cloud, reader_image).delete()
    cloud.delete_image(str(reader_image))
    assert starts(cloud) == []


def test_starting_point_is_no_machine_to_copy(cloud: Qemu, reader_image: Path) -> None:
    launch(cloud, reader_image)
    (start,) = starts(cloud)
    with pytest.raises(ValueError, match="fast_boot=True") as caught:
        cloud.launch(start.image_id)
    assert str(reader_image) in str(caught.value)


def test_damaged_one_is_made_anew(
    cloud: Qemu, reader_image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    launch(cloud, reader_image).delete()
    (start,) = starts(cloud)
    touch(savedmachine.directory_of(Path(start.image_id)) / "memory")
    instance = launch(cloud, reader_image, "mine")
    assert "was changed since" in caplog.text
    assert prints(instance, "mine")
    (anew,) = starts(cloud)
    assert begins_there(instance, anew)


def test_state_that_does_not_fit_ends_in_an_ordinary_boot(
    cloud: Qemu, reader_image: Path, cache: WarmCache, caplog: pytest.LogCaptureFixture
) -> None:
    launch(cloud, reader_image).delete()
    (start,) = starts(cloud)
    saved = cache.find(start.key, host_of(cloud))
    assert saved is not None
    saved.state.write_bytes(saved.state.read_bytes()[: 1 << 16])
    savedmachine.write_facts(saved, saved.login)
    instance = launch(cloud, reader_image, "mine")
    assert "cannot begin at cloud-init" in caplog.text
    assert prints(instance, "mine")
    assert not begins_there(instance, start)
    assert qemus(cloud.parent_dir) == [instance.machine.pid]


def test_nothing_is_kept_where_nothing_may_be(
    make_cloud: CloudMaker, reader_image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cloud = make_cloud("none", more='accelerator = "tcg"\nwarm_cache_mib = 0\n')
    with caplog.at_level(logging.INFO):
        instance = launch(cloud, reader_image, "mine")
    assert "warm_cache_mib = 0" in caplog.text
    assert prints(instance, "mine")
    instance.delete()


def test_guest_that_never_opens_its_seed_is_waited_for_once(
    cloud: Qemu,
    tiny_image: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wait_for_seed = startingpoint.wait_for_seed

    def wait_shortly(machine: Machine, _deadline: Deadline) -> None:
        wait_for_seed(machine, Deadline.after(1.0))

    monkeypatch.setattr(startingpoint, "wait_for_seed", wait_shortly)
    first = launch(cloud, tiny_image)
    assert "did not open the seed within 1 s" in caplog.text
    assert runs(first)
    waits: list[object] = []
    monkeypatch.setattr(startingpoint, "wait_for_seed", lambda *arguments: waits.append(arguments))
    caplog.clear()
    second = launch(cloud, tiny_image)
    assert waits == []
    assert "did not open the seed" in caplog.text, "each launch says why it is slow"
    assert runs(second)
    for instance in (first, second):
        instance.delete()
    cloud.prune_warm_images()
    assert not (cloud.working_dir / "warm").exists(), "it is forgotten"


def test_making_that_fails_ends_in_an_ordinary_boot(
    cloud: Qemu,
    reader_image: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WarmCache, "add", full)
    instance = launch(cloud, reader_image, "mine")
    assert "No space left" in caplog.text
    assert prints(instance, "mine")
    assert qemus(cloud.parent_dir) == [instance.machine.pid]
    assert machines_in(cloud) == [instance.name]


def test_too_large_one_is_made_once(
    make_cloud: CloudMaker, reader_image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else each machine would boot twice."""
    small = make_cloud("small", more='accelerator = "tcg"\nwarm_cache_mib = 1\n')
    with caplog.at_level(logging.INFO):
        first, second = (launch(small, reader_image, text) for text in ("one", "two"))
    assert caplog.text.count("up to cloud-init once") == 1
    assert caplog.text.count("warm machines may take 1 MiB in all") == 2, "each says why"
    assert prints(first, "one")
    assert prints(second, "two")
    assert starts(small) == []
    large = make_cloud("large")
    third = launch(large, reader_image, "three")
    (start,) = starts(large)
    assert begins_there(third, start), "there is room now"
    for instance in (first, second, third):
        instance.delete()
    large.prune_warm_images()


def test_guest_that_took_too_long_is_tried_again_later(
    cloud: Qemu, tiny_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Machine] = []
    wait_for_seed = startingpoint.wait_for_seed

    def wait_shortly(machine: Machine, _deadline: Deadline) -> None:
        made.append(machine)
        wait_for_seed(machine, Deadline.after(0.2))

    monkeypatch.setattr(startingpoint, "wait_for_seed", wait_shortly)
    launch(cloud, tiny_image).delete()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 25 * 3600)
    launch(cloud, tiny_image).delete()
    assert len(made) == 2


def test_guest_whose_boot_fails_is_tried_again_at_once(
    cloud: Qemu,
    make_image: MakeImage,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It may have been chance, as a kernel's panic may; and nobody waits for it to the limit."""
    instance = launch(cloud, make_image(content=b""))
    assert "boots from its beginning" in caplog.text
    assert Cause.NO_BOOTABLE_DISK.value in caplog.text
    assert "did not open the seed" not in caplog.text
    assert [*cloud.working_dir.glob("warm/**/*unfit*")] == []
    instance.delete()


def test_machine_is_not_rolled_back_to_one(cloud: Qemu, reader_image: Path) -> None:
    instance = launch(cloud, reader_image, "mine")
    assert prints(instance, "mine")
    (start,) = starts(cloud)
    with pytest.raises(CloudError, match="where first boots begin"):
        instance.rollback(start.image_id)
    assert runs(instance)


def test_exported_one_is_not_launched(cloud: Qemu, reader_image: Path, tmp_path: Path) -> None:
    launch(cloud, reader_image)
    (start,) = starts(cloud)
    exported = tmp_path / "exported.img"
    cloud.export_image(start.image_id, exported)
    with pytest.raises(ValueError, match="the image that it was made from") as caught:
        cloud.launch(str(exported))
    assert str(caught.value).count(str(exported)) == 1


def test_deleting_one_leaves_nothing_of_it(
    cloud: Qemu, cache: WarmCache, reader_image: Path
) -> None:
    instance = launch(cloud, reader_image)
    (start,) = starts(cloud)
    with pytest.raises(ImageInUseError, match=instance.name):
        cloud.delete_image(start.image_id)
    assert starts(cloud) == [start]
    instance.delete()
    cloud.delete_image(start.image_id)
    assert [entry for entry in cache.directory.glob("*") if entry.is_dir()] == []


def test_one_that_a_warm_machine_is_built_on_stays(
    cloud: Qemu, cache: WarmCache, reader_image: Path
) -> None:
    instance = launch(cloud, reader_image, "mine")
    assert prints(instance, "mine")
    (start,) = starts(cloud)
    image = cloud.snapshot(instance, memory=True)
    cache.add("0" * 40, cloud.find_saved(image))
    cloud.delete_image(image)
    instance.delete()
    warm = cache.directory / ("0" * 40) / "disk.img"
    assert Path(start.image_id) in layers.chain(warm)
    assert not cache.drop(start.key)
    assert cache.drop(warm.parent.name)
    assert cache.drop(start.key)


@pytest.mark.parametrize("damage", ["format", "disk", "facts"])
def test_what_is_of_no_use_makes_room(
    damage: str, cloud: Qemu, cache: WarmCache, reader_image: Path
) -> None:
    launch(cloud, reader_image).delete()
    (start,) = starts(cloud)
    directory = savedmachine.directory_of(Path(start.image_id))
    facts = directory / "saved.json"
    if damage == "format":
        facts.write_text(facts.read_text().replace('"format": ', '"format": 1'))
    elif damage == "facts":
        facts.write_text("{")
    else:
        shutil.rmtree(directory)
    instance = launch(cloud, reader_image, "mine")
    assert prints(instance, "mine")
    (anew,) = starts(cloud)
    assert begins_there(instance, anew)
    instance.delete()
    facts.write_text("{")
    cloud.prune_warm_images(keep_mib=1000)
    assert not cache.directory.exists()
