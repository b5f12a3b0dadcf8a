"""Machines that are kept ready, and are damaged, dropped or refused when they are to be used."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pycloudlib import Qemu
from pycloudlib.qemu.disk import diskimage
from pycloudlib.qemu.disk.layers import chain
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.launching import startingpoint
from pycloudlib.qemu.launching.beginning import Copy
from pycloudlib.qemu.launching.warmcache import WarmCache, WarmImage
from pycloudlib.qemu.saved import restoring
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.savedmachine import SavedMachine
from tests.qemu.machines import SMALL, host_of, hurry, qemus, runs, save
from tests.qemu.reader import begins_there, launch, prints, starts

pytestmark = pytest.mark.qemu


@pytest.fixture(autouse=True)
def ready_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no guest that could become ready; so it is taken for ready at once."""
    monkeypatch.setattr(QemuInstance, "wait_until_well", hurry)


@pytest.fixture
def cache(cloud: Qemu) -> Iterator[WarmCache]:
    cache = WarmCache(cloud.working_dir, cloud.settings.warm_cache_mib << 20)
    yield cache
    for instance in list(cloud.created_instances):
        instance.delete()
    cache.prune(0)
    assert not cache.directory.exists()


Launch = Callable[[], QemuInstance]


@pytest.fixture
def warm(cloud: Qemu, tiny_image: Path, cache: WarmCache) -> Launch:
    """Give a function that launches a machine that is kept ready after the first time."""
    return lambda: cloud.launch(str(tiny_image), SMALL, warm=True)


def entry_of(cloud: Qemu) -> WarmImage:
    (entry,) = cloud.warm_images()
    return entry


def find(cloud: Qemu) -> SavedMachine:
    return cloud.find_saved(entry_of(cloud).image_id)


def is_copy(instance: QemuInstance, entry: WarmImage) -> bool:
    return chain(instance.instance_path)[1] == Path(entry.image_id)


def make_unfit(saved: SavedMachine) -> None:
    """Make a state that QEMU refuses of one that looks as it was saved."""
    saved.state.write_bytes(saved.state.read_bytes()[: 1 << 12])
    savedmachine.write_facts(saved, saved.login)


@pytest.mark.parametrize("used", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_state_that_qemu_refuses_is_made_anew(cloud: Qemu, warm: Launch, used: bool) -> None:
    warm().delete()
    before = entry_of(cloud)
    other = warm() if used else None
    make_unfit(find(cloud))
    booted = warm()
    assert runs(booted)
    assert not is_copy(booted, before)
    entry = entry_of(cloud)
    assert runs(copy := warm())
    assert is_copy(copy, entry)
    if other is not None:
        assert entry.key == before.key
        other.machine.kill()
        other.start(wait=False)
        assert runs(other)


def empty(saved: SavedMachine, name: str) -> None:
    os.truncate(saved.directory / name, 0)


def replace(directory: Path, make: Callable[[Path], None]) -> None:
    shutil.rmtree(directory)
    make(directory)


DAMAGES: dict[str, Callable[[SavedMachine], object]] = {
    "empty state": lambda saved: empty(saved, "state"),
    "empty memory": lambda saved: empty(saved, "memory"),
    "empty facts": lambda saved: empty(saved, "saved.json"),
    "empty disk": lambda saved: os.truncate(saved.image, 0),
    "cut-off disk": lambda saved: os.truncate(saved.image, 1 << 12),
    "no disk": lambda saved: saved.image.unlink(),
    "no seed": lambda saved: saved.seed.unlink(),
    "no state": lambda saved: saved.state.unlink(),
    "nothing": lambda saved: replace(saved.image.parent, Path.mkdir),
    "a file": lambda saved: replace(saved.image.parent, Path.touch),
    "no cache": lambda saved: shutil.rmtree(saved.image.parent.parent),
}


# What needs a machine saved, and another after it, takes seconds.
@pytest.mark.parametrize(
    "damage",
    [
        damage if damage == "empty disk" else pytest.param(damage, marks=pytest.mark.thorough)
        for damage in DAMAGES
    ],
)
def test_damaged_one_is_made_anew(cloud: Qemu, warm: Launch, damage: str) -> None:
    first = warm()
    saved = find(cloud)
    first.delete()
    # So that the image and what it was made of are no longer one file.
    cloud.clean()
    DAMAGES[damage](saved)
    assert runs(warm())
    assert is_copy(warm(), entry_of(cloud))


@pytest.mark.thorough
def test_one_that_was_saved_by_an_older_version_is_used(cloud: Qemu, warm: Launch) -> None:
    warm()
    facts = find(cloud).directory / "saved.json"
    text = facts.read_text()
    start = text.index(',\n "disk_mark"')
    facts.write_text(text[:start] + "\n}\n")
    assert is_copy(warm(), entry_of(cloud))


def drop_first_found(cache: WarmCache, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Drop all that is kept once something is found, before it is used; return what was dropped."""
    look = WarmCache.find
    dropped: list[list[str]] = []

    def find_and_drop(self: WarmCache, *arguments: object) -> SavedMachine | None:
        found = look(self, *arguments)  # type: ignore[arg-type]
        if found is not None and not dropped:
            dropped.append(cache.prune(0))
        return found

    monkeypatch.setattr(WarmCache, "find", find_and_drop)
    return dropped


def test_one_that_is_dropped_before_it_is_used_is_made_anew(
    cloud: Qemu, warm: Launch, cache: WarmCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm()
    dropped = drop_first_found(cache, monkeypatch)
    assert runs(warm())
    assert len(dropped[0]) == 1
    assert is_copy(warm(), entry_of(cloud))


def test_one_that_is_just_used_is_not_dropped(
    cloud: Qemu, warm: Launch, cache: WarmCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm().delete()
    write = Copy.write_files
    dropped: list[str] = []

    def drop_and_write(*arguments: Any) -> None:
        dropped.extend(cache.prune(0))
        write(*arguments)

    monkeypatch.setattr(Copy, "write_files", drop_and_write)
    assert is_copy(warm(), entry_of(cloud))
    assert dropped == []


def test_one_that_goes_while_it_is_looked_at_is_not_there(
    cloud: Qemu, warm: Launch, cache: WarmCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just after its facts were read, as by another process that makes room."""
    warm()
    key, look = entry_of(cloud).key, savedmachine.find

    def find_and_drop(image: Path) -> SavedMachine | None:
        found = look(image)
        shutil.rmtree(image.parent)
        return found

    monkeypatch.setattr(savedmachine, "find", find_and_drop)
    assert cloud.warm_images() == []
    monkeypatch.undo()
    assert cache.find(key, host_of(cloud)) is None


@pytest.mark.parametrize("gone", ["entry", "cache"])
def test_one_that_goes_before_its_use_is_noted_is_not_there(
    cloud: Qemu, warm: Launch, cache: WarmCache, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    warm()
    key, look = entry_of(cloud).key, savedmachine.find

    def find_and_drop(image: Path) -> SavedMachine | None:
        found = look(image)
        shutil.rmtree(image.parent if gone == "entry" else cache.directory)
        return found

    monkeypatch.setattr(savedmachine, "find", find_and_drop)
    assert cache.find(key, host_of(cloud)) is None


@pytest.mark.thorough
def test_disk_that_is_full_while_one_is_kept_leaves_the_machine(
    cloud: Qemu, warm: Launch, cache: WarmCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(restoring, "copy_beside", fail)
        assert runs(warm())
    assert list(cache.directory.iterdir()) == []
    assert cloud.created_images == []
    warm()
    assert is_copy(warm(), entry_of(cloud))


@pytest.mark.thorough
def test_one_of_two_that_are_kept_alike_without_the_lock_is_whole(
    cloud: Qemu, running: QemuInstance, cache: WarmCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory, and with it the lock, was removed while both made theirs."""
    saved, second = save(running), save(running)
    copy = restoring.copy_beside

    def copy_and_add(*arguments: object) -> None:
        monkeypatch.setattr(restoring, "copy_beside", copy)
        cache.add("key", second)
        copy(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(restoring, "copy_beside", copy_and_add)
    with pytest.raises(OSError, match="No such file"):
        cache.add("key", saved)
    found = cache.find("key", host_of(cloud))
    assert found is not None
    assert runs(cloud.launch(str(found.image)))
    assert [file.name for file in cache.directory.iterdir()] == ["key"]


@pytest.mark.thorough
def test_machine_is_kept_though_the_cache_was_removed_meanwhile(
    cloud: Qemu, warm: Launch, cache: WarmCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove(instance: QemuInstance) -> QemuInstance:
        shutil.rmtree(cache.directory)
        return hurry(instance)

    with monkeypatch.context() as patch:
        patch.setattr(QemuInstance, "wait_until_well", remove)
        assert runs(warm())
    assert is_copy(warm(), entry_of(cloud))


# -- where first boots begin ----------------------------------------------------------------------


def test_start_that_qemu_refuses_is_made_anew(
    cloud: Qemu, cache: WarmCache, reader_image: Path
) -> None:
    launch(cloud, reader_image).delete()
    (start,) = starts(cloud)
    saved = savedmachine.find(Path(start.image_id))
    assert saved is not None
    make_unfit(saved)
    instance = launch(cloud, reader_image, "first")
    assert prints(instance, "first")
    assert starts(cloud) == []
    again = launch(cloud, reader_image, "second")
    assert prints(again, "second")
    assert begins_there(again, starts(cloud)[0])
    assert set(qemus(cloud.parent_dir)) == {instance.machine.pid, again.machine.pid}


def test_start_that_never_works_is_made_once(
    cloud: Qemu, cache: WarmCache, reader_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = startingpoint.save_start
    made: list[SavedMachine] = []

    def make_unfit_one(*arguments: object) -> SavedMachine:
        saved = make(*arguments)  # type: ignore[arg-type]
        made.append(saved)
        saved.state.write_bytes(saved.state.read_bytes()[: 1 << 12])
        return savedmachine.write_facts(saved, saved.login)

    monkeypatch.setattr(startingpoint, "save_start", make_unfit_one)
    for word in ("first", "second"):
        assert prints(launch(cloud, reader_image, word), word)
    assert len(made) == 1


def test_start_that_is_dropped_before_it_is_used_is_made_anew(
    cloud: Qemu, cache: WarmCache, reader_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(cloud, reader_image).delete()
    dropped = drop_first_found(cache, monkeypatch)
    instance = launch(cloud, reader_image, "mine")
    assert len(dropped[0]) == 1
    assert begins_there(instance, starts(cloud)[0])


@pytest.mark.thorough
def test_start_that_is_just_used_is_not_dropped(
    cloud: Qemu, cache: WarmCache, reader_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(cloud, reader_image).delete()
    create = diskimage.create_overlay
    dropped: list[str] = []

    def drop_and_create(*arguments: object, **options: object) -> None:
        dropped.extend(cache.prune(0))
        create(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(diskimage, "create_overlay", drop_and_create)
    instance = launch(cloud, reader_image, "mine")
    assert dropped == []
    assert begins_there(instance, starts(cloud)[0])


@pytest.mark.thorough
def test_full_disk_is_no_obstacle_where_first_boots_cannot_begin(
    cloud: Qemu, cache: WarmCache, reader_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def give_up(*_arguments: object) -> None:
        raise startingpoint.UnfitImageError("did not open the seed", timed_out=False)

    monkeypatch.setattr(startingpoint, "wait_for_seed", give_up)
    monkeypatch.setattr("pycloudlib.qemu.launching.warmcache.write_private", fail)
    assert prints(launch(cloud, reader_image, "mine"), "mine")
