"""The cache of machines that are kept ready, with machines that were really saved."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pycloudlib import Qemu
from pycloudlib.errors import CloudError
from pycloudlib.qemu.disk.layers import chain
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.launching.warmcache import WarmCache
from pycloudlib.qemu.saved import restoring
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.savedmachine import SavedMachine
from tests.qemu.conftest import CloudMaker
from tests.qemu.machines import SMALL, host_of, hurry, mode, runs, save, touch

pytestmark = pytest.mark.qemu

MIB = 1 << 20


@pytest.fixture
def cache(cloud: Qemu) -> WarmCache:
    return WarmCache(cloud.working_dir, 100 * MIB)


AddEntry = Callable[..., None]


@pytest.fixture
def add(cloud: Qemu, running: QemuInstance, cache: WarmCache) -> AddEntry:
    """Give a function that saves a machine and keeps only what is in the cache."""

    def add(key: str, *, used: float | None = None) -> None:
        saved = save(running)
        cache.add(key, saved)
        cloud.delete_image(str(saved.image))
        if used is not None:
            os.utime(cache.directory / key, (used, used))

    return add


def keys(cache: WarmCache) -> list[str]:
    return [entry.key for entry in cache.entries()]


def find(cloud: Qemu, cache: WarmCache, key: str) -> SavedMachine:
    saved = cache.find(key, host_of(cloud))
    assert saved is not None
    return saved


def finish(work: Callable[[], object]) -> bool:
    """Do something that might wait for ever; say whether it came to its end."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    return not thread.is_alive()


@pytest.fixture(autouse=True)
def emptied(cloud: Qemu, cache: WarmCache) -> Iterator[None]:
    """Leave no cache behind; what uses it is deleted before."""
    yield
    for instance in list(cloud.created_instances):
        instance.delete()
    for lock in cache.directory.glob("*.lock"):
        lock.unlink()  # a thread that hangs may hold it
    cache.prune(0)
    assert not cache.directory.exists()


def test_nothing_is_found_in_an_empty_cache(cloud: Qemu, cache: WarmCache) -> None:
    assert cache.find("key", host_of(cloud)) is None
    assert cache.entries() == []
    assert cache.prune(0) == []
    assert not cache.directory.exists()


def test_what_is_kept_is_found_and_runs(cloud: Qemu, cache: WarmCache, add: AddEntry) -> None:
    add("key")
    saved = find(cloud, cache, "key")
    assert runs(cloud.launch(str(saved.image)))
    assert cache.find("other", host_of(cloud)) is None


def test_it_is_listed(cache: WarmCache, add: AddEntry, tiny_image: Path) -> None:
    add("key", used=1000)
    (entry,) = cache.entries()
    assert entry.key == "key"
    assert entry.base == str(tiny_image)
    assert entry.instance_type == SMALL
    assert entry.last_used == 1000
    assert 0 < entry.size < 64 * MIB
    assert Path(entry.image_id).exists()


def test_it_outlives_its_source_and_its_cloud(
    make_cloud: CloudMaker, cloud: Qemu, running: QemuInstance, cache: WarmCache, add: AddEntry
) -> None:
    add("key")
    assert running.delete() == []
    assert cloud.clean() == []
    other = make_cloud("other")
    copy = other.launch(str(find(other, cache, "key").image), fresh_identity=True)
    assert runs(copy)
    assert all(file.exists() for file in chain(copy.instance_path))
    assert copy.delete() == []


def test_it_outlives_the_image_it_was_added_from(
    cloud: Qemu, running: QemuInstance, cache: WarmCache
) -> None:
    saved = save(running)
    cache.add("key", saved)
    assert runs(cloud.launch(str(saved.image)))
    assert runs(cloud.launch(str(find(cloud, cache, "key").image)))


def test_its_files_are_their_owners_alone(cache: WarmCache, add: AddEntry) -> None:
    before = os.umask(0)
    try:
        add("key")
    finally:
        os.umask(before)
    assert mode(cache.directory) == 0o700
    for file in cache.directory.rglob("*"):
        loose = mode(file) & 0o077
        assert not loose or file.suffix == ".pub", file


def test_memory_is_not_copied(running: QemuInstance, cache: WarmCache, cloud: Qemu) -> None:
    saved = save(running)
    cache.add("key", saved)
    assert find(cloud, cache, "key").memory.samefile(saved.memory)


def test_it_is_used_when_it_is_found(cloud: Qemu, cache: WarmCache, add: AddEntry) -> None:
    add("first", used=1000)
    add("second", used=2000)
    assert keys(cache) == ["second", "first"]
    find(cloud, cache, "first")
    assert keys(cache) == ["first", "second"]


def test_least_used_goes_first(cache: WarmCache, add: AddEntry) -> None:
    for number, key in enumerate(["b", "a", "c"]):
        add(key, used=1000 + number)
    size = max(entry.size for entry in cache.entries())
    assert cache.prune(2 * size) == ["b"]
    assert keys(cache) == ["c", "a"]
    assert set(cache.prune(0)) == {"a", "c"}


def test_room_is_made_for_a_new_one(
    cloud: Qemu, running: QemuInstance, cache: WarmCache, add: AddEntry
) -> None:
    add("old", used=1000)
    add("newer", used=2000)
    size = max(entry.size for entry in cache.entries())
    small = dataclasses.replace(cache, bound=2 * size + size // 2)
    small.add("new", save(running))
    assert set(keys(cache)) == {"newer", "new"}


def test_one_that_is_larger_than_the_cache_is_refused(
    running: QemuInstance, cache: WarmCache, add: AddEntry
) -> None:
    add("old")
    saved = save(running)
    with pytest.raises(CloudError, match="warm_cache_mib"):
        dataclasses.replace(cache, bound=4096).add("new", saved)
    assert keys(cache) == ["old"]
    assert saved.find_obstacle(saved.host) is None


def test_one_in_use_stays(cloud: Qemu, cache: WarmCache, add: AddEntry) -> None:
    add("used", used=1000)
    add("unused", used=2000)
    copy = cloud.launch(str(find(cloud, cache, "used").image))
    assert cache.prune(0) == ["unused"]
    assert runs(copy)
    assert runs(cloud.launch(str(find(cloud, cache, "used").image)))


def test_one_that_does_not_fit_is_dropped_with_a_warning(
    cloud: Qemu, cache: WarmCache, add: AddEntry, caplog: pytest.LogCaptureFixture
) -> None:
    add("key")
    touch(find(cloud, cache, "key").state)
    with caplog.at_level(logging.WARNING):
        assert cache.find("key", host_of(cloud)) is None
    assert "state was changed since" in caplog.text
    assert not (cache.directory / "key").exists()
    add("key")
    find(cloud, cache, "key")


def test_one_of_another_qemu_is_not_found(
    cloud: Qemu, cache: WarmCache, add: AddEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("key")
    monkeypatch.setattr(savedmachine, "host_fingerprint", lambda *_: "another")
    assert cache.find("key", host_of(cloud)) is None


def test_one_whose_image_is_gone_is_not_found(
    cloud: Qemu, cache: WarmCache, add: AddEntry, tiny_image: Path
) -> None:
    add("key")
    tiny_image.unlink()
    assert cache.find("key", host_of(cloud)) is None
    assert keys(cache) == []


def test_deleting_an_image_drops_what_is_built_on_it(
    cloud: Qemu, running: QemuInstance, cache: WarmCache, add: AddEntry, tiny_image: Path
) -> None:
    add("key")
    assert running.delete() == []
    cloud.delete_image(str(tiny_image))
    assert keys(cache) == []


def test_deleting_another_image_drops_nothing(
    cloud: Qemu, cache: WarmCache, add: AddEntry, tmp_path: Path
) -> None:
    add("key")
    other = tmp_path / "other.img"
    other.write_bytes(bytes(1024))
    cache.forget(other)
    cloud.delete_image(str(other))
    assert keys(cache) == ["key"]


def test_one_is_kept_while_others_wait_for_it(
    cloud: Qemu, running: QemuInstance, cache: WarmCache
) -> None:
    """As a launch does: who makes it holds its lock when it is added."""
    saved = save(running)

    def make() -> None:
        with cache.making("key", lambda _holder: None):
            cache.add("key", saved)

    assert finish(make)
    find(cloud, cache, "key")


def test_pruning_does_not_wait_for_one_that_is_being_made(cache: WarmCache, add: AddEntry) -> None:
    add("old")
    made = threading.Event()
    making = threading.Event()

    def make() -> None:
        with cache.making("new", lambda _holder: None):
            making.set()
            made.wait(60)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(make)
        assert making.wait(60)
        in_time = finish(lambda: cache.prune(0))
        made.set()
    assert in_time
    assert keys(cache) == []


def test_locks_of_what_is_gone_go_too(cache: WarmCache) -> None:
    with cache.making("key", lambda _holder: None):
        assert list(cache.directory.iterdir()) != []
    assert list(cache.directory.iterdir()) == []
    assert cache.prune(0) == []
    assert not cache.directory.exists()


def test_others_wait_while_one_is_made(cache: WarmCache) -> None:
    waiting = threading.Event()
    order: list[str] = []

    def second() -> None:
        with cache.making("key", lambda _holder: waiting.set()):
            order.append("second")

    with ThreadPoolExecutor(1) as thread, cache.making("key", lambda _holder: None):
        thread.submit(second)
        assert waiting.wait(60)
        order.append("first")
    assert order == ["first", "second"]


def test_one_that_is_used_and_does_not_fit_any_more_stays_for_who_uses_it(
    cloud: Qemu, running: QemuInstance, cache: WarmCache, add: AddEntry
) -> None:
    """Another launch finds nothing, boots, and wants to keep its own under the same key."""
    add("key")
    saved = find(cloud, cache, "key")
    copy = cloud.launch(str(saved.image))
    touch(saved.state)
    assert cache.find("key", host_of(cloud)) is None
    with contextlib.suppress(CloudError, OSError):  # it need not be kept
        cache.add("key", save(running))
    assert all(file.exists() for file in chain(copy.instance_path))
    copy.machine.kill()
    copy.start(wait=False)
    assert runs(copy)


def test_one_that_was_cut_off_while_it_was_added_is_no_obstacle_and_is_pruned(
    running: QemuInstance, cloud: Qemu, cache: WarmCache
) -> None:
    """Its process was killed before all files were there."""
    saved = save(running)
    left = cache.directory / ".key.new"
    left.mkdir(parents=True, mode=0o700)
    os.link(saved.image, left / "disk.img")
    assert cache.find("key", host_of(cloud)) is None
    cache.add("key", saved)
    find(cloud, cache, "key")
    assert not left.exists()
    left.mkdir(mode=0o700)
    os.utime(left, (2000, 2000))
    cache.prune(0)
    assert not left.exists()


def test_interrupted_adding_leaves_nothing(
    running: QemuInstance, cache: WarmCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = save(running)

    def interrupt(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(restoring, "copy_beside", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.add("key", saved)
    assert not (cache.directory / "key").exists()


def test_cloud_lists_and_prunes_them(cloud: Qemu, add: AddEntry) -> None:
    add("key")
    assert [entry.key for entry in cloud.warm_images()] == ["key"]
    assert cloud.prune_warm_images(100) == []
    assert cloud.prune_warm_images() == ["key"]
    assert cloud.warm_images() == []


def test_warm_launch_starts_copies_of_the_first(
    cloud: Qemu,
    tiny_image: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """There is no guest that could become ready; so it is taken for ready at once."""
    monkeypatch.setattr(QemuInstance, "wait_until_well", hurry)
    launched: list[QemuInstance] = []

    def launch() -> None:
        launched.append(cloud.launch(str(tiny_image), SMALL, warm=True))

    assert finish(launch)
    (entry,) = cloud.warm_images()
    assert cloud.created_images == []
    assert finish(launch)
    assert finish(launch)
    assert [chain(instance.instance_path)[1] for instance in launched[1:]] == [
        Path(entry.image_id)
    ] * 2
    assert all(runs(instance) for instance in launched)
    assert len({(i.instance_dir / "known_hosts").read_text() for i in launched}) == 3


def test_one_that_is_never_ready_is_not_kept(
    cloud: Qemu, tiny_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(instance: QemuInstance) -> None:
        raise CloudError("cloud-init failed")

    monkeypatch.setattr(QemuInstance, "wait_until_well", fail)
    assert runs(cloud.launch(str(tiny_image), SMALL, warm=True))
    assert cloud.warm_images() == []
