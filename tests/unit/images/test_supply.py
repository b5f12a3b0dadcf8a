"""Released and daily images as the cloud gives them: from what is here, or from a server."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pycloudlib import Qemu
from pycloudlib.errors import ImageBuildError, ImageNotFoundError, ImageVerificationError
from pycloudlib.images import store
from pycloudlib.images.catalog import CatalogEntry, find_entry
from pycloudlib.images.lookup import ImageLookup
from pycloudlib.images.releases import image_path
from pycloudlib.images.source import Stream
from pycloudlib.progress import ignore_progress
from tests.unit.imageserver import QUICK, ImageServer, make_cloud

OLD, NEW = "20240821", "20240822.1"


@pytest.fixture
def image_dir(tmp_path: Path) -> Path:
    for name in ("images", "work"):
        (tmp_path / name).mkdir()
    return tmp_path / "images"


@pytest.fixture
def cloud(server: ImageServer, image_dir: Path) -> Qemu:
    return make_cloud(server, image_dir)


def fail(server: ImageServer) -> None:
    """Let the server answer nothing but failures from now on."""
    server.files.clear()


def serial_of(image_id: str) -> str:
    return Path(image_id).parent.name


def test_released_image_that_is_here_is_used_until_another_is_asked_for(
    cloud: Qemu, server: ImageServer
) -> None:
    server.add_image(Stream.RELEASED, "noble", OLD)
    first = cloud.released_image("noble")
    server.add_image(Stream.RELEASED, "noble", NEW)
    server.requests.clear()
    assert cloud.released_image("noble") == cloud.released_image("24.04") == first
    assert server.requests == []
    assert serial_of(cloud.released_image("noble", refresh=True)) == NEW
    assert serial_of(cloud.released_image("noble")) == NEW


def test_refresh_that_fails_is_told_and_nothing_is_lost(cloud: Qemu, server: ImageServer) -> None:
    server.add_image(Stream.RELEASED, "noble", OLD)
    first = cloud.released_image("noble")
    fail(server)
    with pytest.raises(ImageBuildError, match="404"):
        cloud.released_image("noble", refresh=True)
    assert cloud.released_image("noble") == first


def test_daily_image_is_the_servers_newest(cloud: Qemu, server: ImageServer) -> None:
    server.add_image(Stream.DAILY, "noble", OLD)
    assert serial_of(cloud.daily_image("noble")) == OLD
    server.add_image(Stream.DAILY, "noble", NEW)
    assert serial_of(cloud.daily_image("noble")) == NEW


@pytest.mark.parametrize("how", ["gone", "failing", "silent"])
def test_newest_daily_image_here_is_used_when_the_server_cannot_be_reached(
    how: str,
    cloud: Qemu,
    server: ImageServer,
    image_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.add_image(Stream.DAILY, "noble", OLD)
    image = cloud.daily_image("noble")
    source = server.source
    catalog = server.catalog_path(Stream.DAILY)
    if how == "gone":
        fail(server)
    elif how == "failing":
        server.failures[catalog] = [503] * 5
    else:
        source = replace(source, limits=replace(QUICK, timeout=0.1))
        server.stalled.add(catalog)
    lookup = ImageLookup(Stream.DAILY, "noble", False, image_dir, source)
    assert lookup.newest_or_stored(ignore_progress) == image
    assert "the newest that is here" in caplog.text
    assert image in caplog.text


def test_daily_image_of_a_server_that_lies_is_refused(cloud: Qemu, server: ImageServer) -> None:
    server.add_image(Stream.DAILY, "noble", OLD)
    cloud.daily_image("noble")
    server.add_image(Stream.DAILY, "noble", NEW)
    path = server.catalog_path(Stream.DAILY)
    server.files[path] = server.files[path].replace(NEW.encode(), b"20990101")
    with pytest.raises(ImageVerificationError):
        cloud.daily_image("noble")


def test_daily_image_cannot_be_had_where_there_is_none(cloud: Qemu, server: ImageServer) -> None:
    fail(server)
    with pytest.raises(ImageBuildError, match="404"):
        cloud.daily_image("noble")


def test_offline_nothing_is_asked_of_a_server(
    cloud: Qemu, server: ImageServer, image_dir: Path
) -> None:
    server.add_image(Stream.RELEASED, "noble", OLD)
    server.add_image(Stream.DAILY, "noble", OLD)
    released, daily = cloud.released_image("noble"), cloud.daily_image("noble")
    server.requests.clear()
    offline = make_cloud(server, image_dir, "offline = true")
    assert offline.released_image("noble", refresh=True) == released
    assert offline.daily_image("noble") == daily
    with pytest.raises(ImageNotFoundError) as caught:
        offline.released_image("jammy")
    for told in ("'jammy'", str(image_dir), "offline = true", f"noble {OLD}"):
        assert told in str(caught.value)
    assert server.requests == []


def forget_record(entry: CatalogEntry, server: ImageServer, image_dir: Path) -> Path:
    """Leave an image as the original pycloudlib does."""
    image = image_path(entry, image_dir)
    image.parent.mkdir(parents=True)
    image.write_bytes(server.files[server.path_of(entry.url)])
    return image


@pytest.mark.parametrize("stream", [Stream.RELEASED])
@pytest.mark.parametrize("name", ["noble", "24.04"])
def test_image_that_the_original_left_is_verified_and_used(
    stream: Stream, name: str, cloud: Qemu, server: ImageServer, image_dir: Path
) -> None:
    image = forget_record(server.add_image(stream, "noble", OLD), server, image_dir)
    server.add_image(stream, "noble", NEW)
    assert cloud.released_image(name) == str(image)
    record = store.find_record(image)
    assert record is not None
    assert record.sha256
    assert store.kernel_path(image).is_file()
    assert not any(path.endswith(".img") for path in server.requests)


def test_image_that_the_original_left_is_used_where_nothing_can_be_asked(
    server: ImageServer, image_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = forget_record(server.add_image(Stream.RELEASED, "noble", OLD), server, image_dir)
    fail(server)
    for more in ("", "offline = true"):
        caplog.clear()
        assert make_cloud(server, image_dir, more).released_image("noble") == str(image)
        assert "used unverified" in caplog.text
    assert store.find_record(image) is None


def test_changed_image_that_the_original_left_is_replaced(
    cloud: Qemu, server: ImageServer, image_dir: Path
) -> None:
    entry = server.add_image(Stream.RELEASED, "noble", OLD)
    image = forget_record(entry, server, image_dir)
    image.write_bytes(b"changed")
    assert cloud.released_image("noble") == str(image)
    assert image.stat().st_size == entry.size
    assert image.with_name(f"{image.name}.replaced").read_bytes() == b"changed"


def test_images_are_listed(cloud: Qemu, server: ImageServer, image_dir: Path) -> None:
    assert cloud.images() == []
    for stream, serial in ((Stream.RELEASED, OLD), (Stream.DAILY, OLD), (Stream.DAILY, NEW)):
        entry = server.add_image(stream, "noble", serial)
        if stream is Stream.RELEASED:
            cloud.released_image("noble")
        else:
            cloud.daily_image("noble")
    left = forget_record(server.add_image(Stream.RELEASED, "jammy", OLD), server, image_dir)
    (image_dir / "noble" / "not-a-serial").mkdir()
    (image_dir / "noble" / "not-a-serial" / "some.img").touch()
    listed = cloud.images()
    told = [(Path(image.image_id).parent.parent.name, image.serial) for image in listed]
    assert told == [("22.04", OLD), ("24.04", OLD), ("noble", NEW), ("noble", OLD)]
    assert listed[0].sha256 == ""
    assert listed[0].image_id == str(left)
    newest = listed[2]
    assert (newest.release, newest.sha256, newest.size) == ("noble", entry.sha256, entry.size)
    assert newest.source == entry.url
    assert abs(newest.last_used - time.time()) < 600


def test_launch_is_remembered_as_the_last_use(
    cloud: Qemu, server: ImageServer, image_dir: Path
) -> None:
    server.add_image(Stream.DAILY, "noble", OLD)
    image = Path(cloud.daily_image("noble"))
    os.utime(store.record_path(image), (1000, 1000))
    assert cloud.images()[0].last_used == 1000
    store.record_use(image)
    assert abs(cloud.images()[0].last_used - time.time()) < 600
    store.record_use(image_dir / "nothing.img")


def test_old_builds_are_pruned(cloud: Qemu, server: ImageServer, image_dir: Path) -> None:
    serials = ["20240820", OLD, NEW]
    for serial in serials:
        server.add_image(Stream.DAILY, "noble", serial)
        cloud.daily_image("noble")
    server.add_image(Stream.RELEASED, "noble", OLD)
    released = cloud.released_image("noble")
    partial = image_dir / "noble" / OLD / ".x.img.0123.part"
    fresh = image_dir / "noble" / NEW / ".x.img.0123.part"
    for file in (partial, fresh):
        file.touch()
    os.utime(partial, (1000, 1000))
    deleted = cloud.prune_images(keep=2)
    assert [serial_of(image_id) for image_id in deleted] == ["20240820"]
    assert [image.serial for image in cloud.images()] == [OLD, NEW, OLD]
    assert not partial.exists()
    assert fresh.exists()
    assert [serial_of(image_id) for image_id in cloud.prune_images()] == [OLD]
    assert [image.image_id for image in cloud.images()] == [released, cloud.images()[1].image_id]
    assert len(cloud.prune_images(keep=0)) == 2
    assert cloud.images() == []
    with pytest.raises(ValueError, match="keep is -1"):
        cloud.prune_images(keep=-1)


def test_build_that_something_is_built_on_is_not_pruned(
    cloud: Qemu, server: ImageServer, caplog: pytest.LogCaptureFixture
) -> None:
    for serial in (OLD, NEW):
        server.add_image(Stream.DAILY, "noble", serial)
        image = Path(cloud.daily_image("noble"))
        if serial == OLD:
            used = image
    from pycloudlib.qemu.disk.diskimage import BaseImage, create_overlay  # noqa: PLC0415

    snapshots = cloud.parent_dir / "snapshots"
    snapshots.mkdir(parents=True)
    create_overlay(
        BaseImage(used, "raw", used.stat().st_size), snapshots / "made.img", unopened=True
    )
    with caplog.at_level(logging.INFO):
        assert cloud.prune_images() == []
    assert used.exists()
    assert "made" in caplog.text


def test_verification_that_is_disabled_is_told_each_time(
    server: ImageServer, image_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry = server.add_image(Stream.DAILY, "noble", OLD)
    for path in list(server.files):
        if path.endswith((".sjson", ".gpg")):
            del server.files[path]
    cloud = make_cloud(server, image_dir, 'image_verification = "disabled"')
    for _ in range(2):
        caplog.clear()
        assert serial_of(cloud.daily_image("noble")) == OLD
        assert "NOTHING THAT" in caplog.text
        assert server.url in caplog.text
    # What the catalog says still has to be so.
    server.files[server.path_of(entry.url)] = bytes(entry.size)
    cloud.delete_image(cloud.images()[0].image_id)
    with pytest.raises(ImageVerificationError, match="not the file expected"):
        cloud.daily_image("noble")


@pytest.mark.parametrize("wrong", ["none", "off", False, 1])
def test_verification_is_disabled_by_one_word_only(
    wrong: object, server: ImageServer, image_dir: Path
) -> None:
    value = f'"{wrong}"' if isinstance(wrong, str) else str(wrong).lower()
    with pytest.raises(ValueError, match="image_verification"):
        make_cloud(server, image_dir, f"image_verification = {value}").images()


def test_catalog_is_kept_in_the_users_cache(cloud: Qemu, server: ImageServer) -> None:
    server.add_image(Stream.DAILY, "noble", OLD)
    cloud.daily_image("noble")
    kept = list((server.keyring.parent / "cache" / "pycloudlib" / "catalogs").iterdir())
    assert [file.suffix for file in kept] == [".catalog"]


@pytest.mark.parametrize("name", ["lts", "default", "n2"])
def test_alias_is_what_the_catalog_says(name: str, cloud: Qemu, server: ImageServer) -> None:
    server.add_image(Stream.DAILY, "jammy", NEW)
    server.add_image(Stream.DAILY, "noble", OLD, aliases="24.04,n,noble,lts,default")
    if name == "n2":
        with pytest.raises(ValueError, match="n2"):
            cloud.daily_image(name)
    else:
        assert cloud.daily_image(name) == cloud.daily_image("noble")


def test_certain_build_is_found_in_the_catalog(server: ImageServer) -> None:
    for serial in (OLD, NEW):
        server.add_image(Stream.DAILY, "noble", serial)
    assert find_entry(server.source, Stream.DAILY, "noble", serial=OLD).serial == OLD
    with pytest.raises(ImageNotFoundError, match=f"No build 20200101 .*{OLD}, {NEW}"):
        find_entry(server.source, Stream.DAILY, "noble", serial="20200101")


def test_image_is_found_by_its_name(cloud: Qemu, server: ImageServer, tmp_path: Path) -> None:
    for serial in (OLD, NEW):
        server.add_image(Stream.DAILY, "noble", serial)
        newest = cloud.daily_image("noble")
    cloud.created_images += [str(tmp_path / name) for name in ("web-1.img", "web-2.img")]

    assert serial_of(newest) == NEW
    assert cloud.get_image_id_from_name("noble-server-cloudimg-amd64.img") == newest
    assert cloud.get_image_id_from_name("noble-server-cloudimg-amd64") == newest
    assert cloud.get_image_id_from_name("web-1") == str(tmp_path / "web-1.img")
    with pytest.raises(ImageNotFoundError, match="No image is called 'noble'") as caught:
        cloud.get_image_id_from_name("noble")
    assert caught.value.resource_name == "noble"
    cloud.created_images.clear()
