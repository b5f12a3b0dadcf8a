"""Pinned images: that very build, everywhere, until the lock is updated.

A lock comes with a project, whoever wrote that: it chooses among what is signed, and adds nothing.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pycloudlib import Qemu
from pycloudlib.cloud import ImageType
from pycloudlib.errors import ImageBuildError, ImageNotFoundError, ImageVerificationError
from pycloudlib.images import releases, store
from pycloudlib.images.catalog import CatalogEntry, image_name
from pycloudlib.images.lookup import ImageLock
from pycloudlib.images.source import Stream
from tests.unit.imageserver import (
    ImageServer,
    make_cloud,
    new_signing_key,
    running_image_server,
)

OLD, NEW = "20240821", "20240822.1"


@pytest.fixture(autouse=True)
def published(server: ImageServer) -> None:
    server.add_image(Stream.DAILY, "noble", OLD)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the directory that programs run in."""
    for name in ("images", "work", "project"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture
def cloud(server: ImageServer, project: Path) -> Qemu:
    return make_cloud(server, project.parent / "images")


def serial_of(image_id: str) -> str:
    return Path(image_id).parent.name


def test_pinned_build_is_had_though_there_is_a_newer_one(
    cloud: Qemu, server: ImageServer, project: Path
) -> None:
    assert cloud.lock_image("noble", daily=True) == OLD
    server.add_image(Stream.DAILY, "noble", NEW)
    assert serial_of(cloud.daily_image("noble")) == OLD
    assert serial_of(cloud.daily_image("24.04")) == OLD
    assert cloud.update_image_lock() == [NEW]
    assert serial_of(cloud.daily_image("noble")) == NEW
    assert [path.name for path in project.iterdir()] == ["pycloudlib.lock"]


def test_pinned_build_is_had_on_another_machine(
    cloud: Qemu, server: ImageServer, project: Path
) -> None:
    cloud.lock_image("noble", daily=True)
    entry_path = next(path for path in server.files if path.endswith("amd64.img"))
    server.add_image(Stream.DAILY, "noble", NEW)
    cloud.daily_image("noble")
    shutil.rmtree(project.parent / "images")
    (project.parent / "images").mkdir()
    server.requests.clear()
    assert serial_of(cloud.daily_image("noble")) == OLD
    assert entry_path in server.requests
    assert server.catalog_path(Stream.DAILY) not in server.requests, "the one that was kept has it"
    shutil.rmtree(server.keyring.parent / "cache")
    shutil.rmtree(project.parent / "images")
    (project.parent / "images").mkdir()
    assert serial_of(cloud.daily_image("noble")) == OLD
    assert server.catalog_path(Stream.DAILY) in server.requests


def test_another_build_in_its_place_is_refused(cloud: Qemu, server: ImageServer) -> None:
    cloud.lock_image("noble", daily=True)
    path = next(path for path in server.files if path.endswith("amd64.img"))
    server.files[path] = b"x" * len(server.files[path])
    with pytest.raises(ImageVerificationError, match="not the file expected"):
        cloud.daily_image("noble")


def test_pinned_build_that_is_here_needs_no_server(
    cloud: Qemu, server: ImageServer, project: Path
) -> None:
    cloud.lock_image("noble", daily=True)
    image = cloud.daily_image("noble")
    server.requests.clear()
    for more in ("", "offline = true"):
        assert make_cloud(server, project.parent / "images", more).daily_image("noble") == image
    assert server.requests == []


def test_pinned_build_that_cannot_be_had_is_not_replaced_by_another(
    cloud: Qemu, server: ImageServer, project: Path
) -> None:
    other = cloud.daily_image("noble")
    server.add_image(Stream.DAILY, "noble", NEW)
    cloud.lock_image("noble", daily=True)
    server.files.clear()
    with pytest.raises(ImageBuildError, match="404"):
        cloud.daily_image("noble")
    with pytest.raises(ImageNotFoundError, match=f"build {NEW} of 'noble', which is pinned") as no:
        make_cloud(server, project.parent / "images", "offline = true").daily_image("noble")
    assert f"noble {OLD}" in str(no.value)
    assert Path(other).is_file()


def test_images_of_other_kinds_are_not_pinned_by_it(cloud: Qemu, server: ImageServer) -> None:
    server.add_image(Stream.RELEASED, "noble", OLD)
    server.add_image(Stream.DAILY, "noble", OLD, minimal=True)
    cloud.lock_image("noble", daily=True)
    server.add_image(Stream.RELEASED, "noble", NEW)
    server.add_image(Stream.DAILY, "noble", NEW, minimal=True)
    assert serial_of(cloud.released_image("noble")) == NEW
    assert serial_of(cloud.daily_image("noble", image_type=ImageType.MINIMAL)) == NEW
    assert cloud.lock_image("noble") == NEW
    assert cloud.lock_image("noble", daily=True, image_type=ImageType.MINIMAL) == NEW
    server.add_image(Stream.DAILY, "noble", NEW)
    assert cloud.update_image_lock() == [NEW, NEW, NEW]


def test_lock_is_readable_and_where_it_is_configured(
    cloud: Qemu, server: ImageServer, project: Path
) -> None:
    elsewhere = project / "locks" / "images.lock"
    elsewhere.parent.mkdir()
    configured = make_cloud(server, project.parent / "images", f'image_lock = "{elsewhere}"')
    configured.lock_image("noble", daily=True)
    document = json.loads(elsewhere.read_text())
    (pin,) = document["images"]
    assert set(pin) == {
        "stream", "release", "version", "minimal", "serial", "url", "sha256", "size",
    }  # fmt: skip
    assert (pin["release"], pin["version"], pin["serial"]) == ("noble", "24.04", OLD)
    assert not (project / "pycloudlib.lock").exists()
    server.add_image(Stream.DAILY, "noble", NEW)
    assert serial_of(configured.daily_image("noble")) == OLD
    assert serial_of(cloud.daily_image("noble")) == NEW


def test_update_that_fails_leaves_the_lock_as_it_was(
    cloud: Qemu, server: ImageServer, project: Path
) -> None:
    cloud.lock_image("noble", daily=True)
    before = (project / "pycloudlib.lock").read_bytes()
    server.files.clear()
    with pytest.raises(ImageBuildError):
        cloud.update_image_lock()
    with pytest.raises(ImageBuildError):
        cloud.lock_image("jammy")
    assert (project / "pycloudlib.lock").read_bytes() == before


def test_nothing_pinned_is_nothing_to_update(cloud: Qemu, project: Path) -> None:
    assert cloud.update_image_lock() == []


@pytest.mark.parametrize(
    "changes",
    [
        {"serial": "../../etc"},
        {"release": "../x"},
        {"url": "file:///etc/passwd"},
        {"url": "https://example.com/other-image.img"},
        {"sha256": "short"},
        {"size": -1},
        {"size": "1"},
        {"stream": "weekly"},
        {"more": 1},
        {"serial": None},
    ],
    ids=str,
)
def test_pin_that_is_none_is_told(changes: dict[str, Any], cloud: Qemu, project: Path) -> None:
    cloud.lock_image("noble", daily=True)
    lock = project / "pycloudlib.lock"
    document = json.loads(lock.read_text())
    document["images"][0] |= changes
    lock.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=str(lock)):
        cloud.daily_image("noble")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 2, "images": []}', "not JSON"])
def test_file_that_is_no_lock_is_told(text: str, cloud: Qemu, project: Path) -> None:
    lock = project / "pycloudlib.lock"
    lock.write_text(text)
    for ask in (cloud.daily_image, cloud.released_image, cloud.lock_image):
        with pytest.raises(ValueError, match=f"{lock} is not a lock of images"):
            ask("noble")
    assert lock.read_text() == text


def test_lock_is_a_small_regular_file(cloud: Qemu, project: Path) -> None:
    lock = project / "pycloudlib.lock"
    os.mkfifo(lock)
    with pytest.raises(ValueError, match=r"is not a lock of images: .* not a regular file"):
        cloud.daily_image("noble")
    lock.unlink()
    lock.touch()
    os.truncate(lock, 1 << 40)
    with pytest.raises(ValueError, match=r"is not a lock of images: .* longer than"):
        cloud.daily_image("noble")


# -- hostile locks --------------------------------------------------------------------------------


DISABLED = 'image_verification = "disabled"'


@pytest.fixture
def released(server: ImageServer) -> CatalogEntry:
    """Publish a build that is released."""
    return server.add_image(Stream.RELEASED, "noble", OLD)


def host_image(server: ImageServer, serial: str) -> CatalogEntry:
    """Put an image of an attacker's on a server, in no catalog that anybody has signed."""
    name = image_name(Stream.RELEASED, "24.04", minimal=False)
    directory = f"/attack/{serial}"
    content, kernel = b"hostile image " * 1000, b"hostile kernel"
    server.files[f"{directory}/{name}.img"] = content
    server.files[f"{directory}/unpacked/{name}-vmlinuz-generic"] = kernel
    # A list that was signed once, of another build, will not do; the attacker has none of this one.
    sums = f"{hashlib.sha256(kernel).hexdigest()} *{name}-vmlinuz-generic\n".encode()
    server.files[f"{directory}/unpacked/SHA256SUMS"] = sums
    return CatalogEntry(
        release="noble",
        version="24.04",
        serial=serial,
        url=f"{server.url}{directory}/{name}.img",
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        stream=Stream.RELEASED,
        minimal=False,
    )


def write_lock(project: Path, *pins: CatalogEntry) -> None:
    """Write a lock as an attacker may."""
    (project / "pycloudlib.lock").unlink(missing_ok=True)
    ImageLock(project / "pycloudlib.lock").write_with(pins)


def leave(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in another directory from now on, which has no lock."""
    monkeypatch.chdir(project.parent / "work")


@pytest.mark.parametrize("serial", ["20991231", "20240901", OLD])
def test_what_a_lock_says_is_not_believed(
    serial: str,
    cloud: Qemu,
    server: ImageServer,
    released: CatalogEntry,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hostile = host_image(server, serial)
    write_lock(project, hostile)
    for ask in (cloud.released_image, lambda name: cloud.released_image(name, refresh=True)):
        with pytest.raises((ImageVerificationError, ImageNotFoundError)) as refused:
            ask("noble")
        assert f"{project}/pycloudlib.lock pins 'noble' to the build {serial}" in str(refused.value)
    assert not any(path.startswith("/attack") for path in server.requests), "nobody was asked"
    leave(project, monkeypatch)
    image = Path(cloud.released_image("noble"))
    assert image.parent.name == OLD
    assert image.read_bytes() == server.files[server.path_of(released.url)]


@pytest.mark.parametrize(
    "changes",
    [{"sha256": "0" * 64}, {"size": 5}, {"version": "22.04"}, {"release": "jammy"}],
    ids=str,
)
def test_pin_has_to_be_found_in_the_signed_catalog_as_it_is(
    changes: dict[str, Any],
    cloud: Qemu,
    server: ImageServer,
    released: CatalogEntry,
    project: Path,
) -> None:
    cloud.released_image("noble")
    server.add_image(Stream.RELEASED, "jammy", NEW)
    pin = dataclasses.replace(released, **changes)
    url = f"http://127.0.0.1:9/ubuntu-{pin.version}-server-cloudimg-amd64.img"
    write_lock(project, dataclasses.replace(pin, url=url))
    with pytest.raises(
        (ImageVerificationError, ImageNotFoundError), match=r"pycloudlib\.lock pins"
    ):
        cloud.released_image(pin.version)
    with pytest.raises(
        (ImageVerificationError, ImageNotFoundError), match=r"pycloudlib\.lock pins"
    ):
        cloud.released_image(pin.release)


def test_path_comes_from_the_catalog_and_the_host_from_the_mirror(
    cloud: Qemu, server: ImageServer, released: CatalogEntry, project: Path
) -> None:
    elsewhere = "http://127.0.0.1:9/ubuntu-24.04-server-cloudimg-amd64.img"
    write_lock(project, dataclasses.replace(released, url=elsewhere))
    assert serial_of(cloud.released_image("noble")) == OLD
    record = store.find_record(Path(cloud.released_image("noble")))
    assert record is not None
    assert record.source == released.url


def test_serial_of_the_future_is_refused_even_from_a_signed_catalog(
    cloud: Qemu, server: ImageServer, project: Path
) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    soon, later = (f"{now + datetime.timedelta(days=days):%Y%m%d}" for days in (1, 3))
    assert not store.is_future_serial(soon), "it may be tomorrow already where it was built"
    write_lock(project, server.add_image(Stream.RELEASED, "noble", later))
    with pytest.raises(ImageVerificationError, match=f"build {later} .*day is still to come"):
        cloud.released_image("noble")


def test_only_disabled_verification_lifts_that_and_says_so(
    cloud: Qemu,
    server: ImageServer,
    released: CatalogEntry,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hostile = host_image(server, "20991231")
    write_lock(project, hostile)
    disabled = make_cloud(server, project.parent / "images", DISABLED)
    for more in ("", "offline = true\n"):
        caplog.clear()
        trusting = make_cloud(server, project.parent / "images", more + DISABLED)
        assert serial_of(trusting.released_image("noble")) == "20991231"
        warnings = [record.getMessage() for record in caplog.records if record.levelno >= 30]
        assert any(
            f"{project}/pycloudlib.lock" in text and hostile.url in text for text in warnings
        )
    # What came so is nobody's release, also where nothing is verified.
    with pytest.raises(ImageVerificationError, match="20991231"):
        cloud.released_image("noble")
    leave(project, monkeypatch)
    for other in (cloud, disabled):
        assert serial_of(other.released_image("noble")) == OLD
    with pytest.raises(ImageNotFoundError):
        make_cloud(server, project.parent / "images", "offline = true").released_image("jammy")


def test_false_image_that_was_believed_once_is_replaced_by_the_signed_one(
    cloud: Qemu, server: ImageServer, released: CatalogEntry, project: Path
) -> None:
    write_lock(project, host_image(server, OLD))
    image = Path(make_cloud(server, project.parent / "images", DISABLED).released_image("noble"))
    assert image.read_bytes().startswith(b"hostile")
    (project / "pycloudlib.lock").unlink()
    offline = make_cloud(server, project.parent / "images", "offline = true")
    with pytest.raises(ImageNotFoundError):
        offline.released_image("noble")
    assert cloud.released_image("noble") == str(image)
    assert image.read_bytes() == server.files[server.path_of(released.url)]
    assert store.kernel_path(image).read_bytes().startswith(b"kernel of")
    assert offline.released_image("noble") == str(image)


def test_signed_image_is_not_replaced_by_what_is_not(
    cloud: Qemu, server: ImageServer, released: CatalogEntry, project: Path
) -> None:
    image = Path(cloud.released_image("noble"))
    kernel = store.kernel_path(image).read_bytes()
    write_lock(project, host_image(server, OLD))
    disabled = make_cloud(server, project.parent / "images", DISABLED)
    with pytest.raises(ImageVerificationError, match="for which trusted keys have vouched"):
        disabled.released_image("noble")
    with new_signing_key() as theirs, running_image_server(theirs, project) as hostile:
        path = hostile.path_of(hostile.add_image(Stream.RELEASED, "noble", OLD).url)
        hostile.files[path] += b"hostile"
        hostile.sign_again(Stream.RELEASED, "noble", OLD, hostile.files[path])
        (project / "pycloudlib.lock").unlink()
        with pytest.raises(ImageVerificationError, match="for which trusted keys have vouched"):
            make_cloud(hostile, project.parent / "images").released_image("noble", refresh=True)
    assert image.read_bytes() == server.files[server.path_of(released.url)]
    assert store.kernel_path(image).read_bytes() == kernel
    assert cloud.released_image("noble") == str(image)


def test_what_nobody_signed_is_no_release_for_those_who_verify(
    cloud: Qemu, server: ImageServer, released: CatalogEntry, project: Path
) -> None:
    disabled = make_cloud(server, project.parent / "images", DISABLED)
    image = disabled.released_image("noble")
    offline = make_cloud(server, project.parent / "images", "offline = true")
    with pytest.raises(ImageNotFoundError):
        offline.released_image("noble")
    server.requests.clear()
    assert disabled.released_image("noble") == image
    assert server.requests == []
    assert cloud.released_image("noble") == image
    assert not any(path.endswith(".img") for path in server.requests), "it was the signed one"
    assert offline.released_image("noble") == image


def test_what_nobody_signed_gives_no_names_to_what_is_signed(
    cloud: Qemu, server: ImageServer, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jammy = server.add_image(Stream.RELEASED, "jammy", OLD, aliases="lts")
    image = cloud.released_image("jammy")
    offline = make_cloud(server, project.parent / "images", "offline = true")
    disabled = make_cloud(server, project.parent / "images", DISABLED)
    server.add_image(Stream.RELEASED, "jammy", OLD, aliases="noble")
    assert disabled.released_image("noble") == image
    write_lock(project, dataclasses.replace(jammy, aliases=("noble",)))
    assert disabled.released_image("noble") == image
    leave(project, monkeypatch)
    assert offline.released_image("lts") == image
    with pytest.raises(ImageNotFoundError):
        offline.released_image("noble")


def test_pin_is_told_of(
    cloud: Qemu, released: CatalogEntry, project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_lock(project, released)
    with caplog.at_level(logging.INFO):
        cloud.released_image("noble")
    assert f"{project}/pycloudlib.lock pins 'noble' to the build {OLD}" in caplog.text


def test_old_build_that_a_lock_chose_is_nobody_elses_newest(
    cloud: Qemu,
    server: ImageServer,
    released: CatalogEntry,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.add_image(Stream.RELEASED, "noble", NEW)
    write_lock(project, released)
    pinned = cloud.released_image("noble")
    assert serial_of(pinned) == OLD
    leave(project, monkeypatch)
    offline = make_cloud(server, project.parent / "images", "offline = true")
    assert offline.released_image("noble") == pinned, "there is nothing else"
    served = server.files.copy()
    server.files.clear()
    assert cloud.released_image("noble") == pinned, "there is nothing else"
    server.files.update(served)
    newest = cloud.released_image("noble")
    assert serial_of(newest) == NEW
    assert offline.released_image("noble") == newest
    monkeypatch.chdir(project)
    server.requests.clear()
    assert cloud.released_image("noble") == pinned
    assert server.requests == []


@pytest.mark.parametrize("first", ["lock", "user"])
def test_build_that_others_chose_too_is_found_by_them(
    first: str,
    cloud: Qemu,
    server: ImageServer,
    released: CatalogEntry,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def use_lock() -> str:
        monkeypatch.chdir(project)
        return cloud.released_image("noble")

    def use_none() -> str:
        leave(project, monkeypatch)
        return cloud.released_image("noble")

    write_lock(project, released)
    steps = (use_lock, use_none) if first == "lock" else (use_none, use_lock)
    assert len({step() for step in steps}) == 1
    server.add_image(Stream.RELEASED, "noble", NEW)
    server.requests.clear()
    assert serial_of(use_none()) == OLD
    assert server.requests == []


# -- other names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("locked", ["lts", "noble", "24.04"])
def test_alias_is_pinned_like_its_release(
    locked: str, cloud: Qemu, server: ImageServer, project: Path
) -> None:
    server.add_image(Stream.RELEASED, "noble", OLD, aliases="24.04,n,noble,lts,default")
    assert cloud.lock_image(locked) == OLD
    assert json.loads((project / "pycloudlib.lock").read_text())["images"][0]["aliases"] == [
        "lts",
        "default",
    ]
    server.add_image(Stream.RELEASED, "noble", NEW, aliases="24.04,n,noble,lts,default")
    image = cloud.released_image("lts")
    assert serial_of(image) == OLD
    assert cloud.released_image("noble") == cloud.released_image("default") == image
    offline = make_cloud(server, project.parent / "images", "offline = true")
    assert offline.released_image("lts") == image


def test_alias_that_has_moved_is_followed_by_an_update_alone(
    cloud: Qemu, server: ImageServer, project: Path
) -> None:
    server.add_image(Stream.RELEASED, "noble", OLD, aliases="lts,devel")
    cloud.lock_image("lts")
    image = cloud.released_image("lts")
    server.add_image(Stream.RELEASED, "jammy", NEW, aliases="lts")
    server.forget_aliases(Stream.RELEASED, "noble")
    assert cloud.released_image("lts") == image
    assert cloud.update_image_lock() == [OLD, NEW]
    assert serial_of(cloud.released_image("lts")) == NEW
    assert serial_of(cloud.released_image("noble")) == OLD


def test_lock_does_not_decide_what_an_alias_means(
    cloud: Qemu, server: ImageServer, project: Path
) -> None:
    server.add_image(Stream.RELEASED, "noble", NEW, aliases="lts")
    old = server.add_image(Stream.RELEASED, "jammy", OLD)
    write_lock(project, dataclasses.replace(old, aliases=("lts",)))
    assert serial_of(cloud.released_image("jammy")) == OLD
    with pytest.raises(ImageVerificationError, match=r"calls jammy, 22\.04, not 'lts'"):
        cloud.released_image("lts")


@pytest.mark.parametrize("ask", [Qemu.released_image, Qemu.daily_image])
def test_other_names_are_found_on_disk(
    ask: Callable[..., str], cloud: Qemu, server: ImageServer, project: Path
) -> None:
    for stream in Stream:
        server.add_image(stream, "noble", OLD, aliases="24.04,n,noble,lts,default")
    images = {ask(cloud, name) for name in ("noble", "24.04", "lts", "default")}
    server.requests.clear()
    offline = make_cloud(server, project.parent / "images", "offline = true")
    images |= {ask(offline, name) for name in ("noble", "24.04", "lts", "default")}
    assert len(images) == 1
    assert server.requests == []
    if ask is Qemu.released_image:
        assert ask(cloud, "lts") in images
        assert server.requests == []


def test_name_that_a_release_was_given_later_is_found_too(
    cloud: Qemu, server: ImageServer, project: Path
) -> None:
    server.add_image(Stream.RELEASED, "noble", OLD)
    image = cloud.released_image("noble")
    server.add_image(Stream.RELEASED, "noble", OLD, aliases="lts")
    assert cloud.released_image("lts") == image
    offline = make_cloud(server, project.parent / "images", "offline = true")
    assert offline.released_image("lts") == offline.released_image("noble") == image


# -- poisoned stores ------------------------------------------------------------------------------


def put_image(images: Path, serial: str, record: store.ImageRecord | None) -> Path:
    image = images / "24.04" / serial / "ubuntu-24.04-server-cloudimg-amd64.img"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"image")
    store.kernel_path(image).write_bytes(b"kernel")
    if record is not None:
        store.write_record(image, record)
    return image


def test_record_of_which_nobody_is_known_is_no_release(
    cloud: Qemu, server: ImageServer, released: CatalogEntry, project: Path
) -> None:
    images = project.parent / "images"
    digest = hashlib.sha256(b"image").hexdigest()
    record = store.ImageRecord("noble", "20991231", digest, 5, "https://cloud-images.ubuntu.com/x")
    for serial, left in (("20991231", record), ("20991230", None)):
        put_image(images, serial, left)
    offline = make_cloud(server, images, "offline = true")
    with pytest.raises(ImageNotFoundError):
        offline.released_image("noble")
    assert serial_of(cloud.released_image("noble")) == OLD


def make_older(image: str, **changes: str) -> None:
    """Give an image the record that versions without vouchers wrote."""
    path = store.record_path(Path(image))
    fields = ("release", "serial", "sha256", "size", "source", "default_user")
    record = json.loads(path.read_text())
    path.write_text(json.dumps({name: record[name] for name in fields} | changes))


@pytest.mark.parametrize("more", ["", "offline = true", DISABLED, f"offline = true\n{DISABLED}"])
def test_image_of_an_older_version_is_used_without_any_network(
    more: str, cloud: Qemu, server: ImageServer, released: CatalogEntry, project: Path
) -> None:
    images = project.parent / "images"
    image, daily = cloud.released_image("noble"), cloud.daily_image("noble")
    make_older(image)
    make_older(daily)
    server.files.clear()
    server.requests.clear()
    later = make_cloud(server, images, more)
    assert later.released_image("noble") == later.released_image("24.04") == image
    assert server.requests == []
    assert later.daily_image("noble") == daily


def test_image_of_an_older_version_is_the_pinned_one_though_it_is_offered_no_more(
    cloud: Qemu, server: ImageServer, released: CatalogEntry, project: Path
) -> None:
    write_lock(project, released)
    image = cloud.released_image("noble")
    make_older(image)
    server.files.clear()
    for more in ("", "offline = true"):
        later = make_cloud(server, project.parent / "images", more)
        assert later.released_image("noble") == later.released_image("24.04") == image
        with pytest.raises((ImageNotFoundError, ImageBuildError)):
            later.released_image("lts")


def test_image_of_an_older_version_is_used_where_nothing_can_be_written(
    cloud: Qemu,
    server: ImageServer,
    released: CatalogEntry,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image, daily = cloud.released_image("noble"), cloud.daily_image("noble")
    make_older(image)
    make_older(daily)

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise PermissionError("another user's")

    for module, name in ((releases, "exclusive_lock"), (store, "write_record")):
        monkeypatch.setattr(module, name, refuse)
    assert cloud.released_image("noble") == image
    assert cloud.released_image("noble", refresh=True) == image
    assert cloud.daily_image("noble") == daily


@pytest.mark.parametrize(
    "source",
    [
        "https://elsewhere.example.com/releases/server/releases/noble/release-{0}/{1}",
        "{2}/releases/server/releases/noble/release-20240101/{1}",
        "{2}/../{0}/{1}",
        "{2}.example.com/{0}/{1}",
        "{2}@example.com/{0}/{1}",
        "built 1234",
    ],
)
def test_image_that_a_lock_brought_to_an_older_version_is_no_release(
    source: str, cloud: Qemu, server: ImageServer, released: CatalogEntry, project: Path
) -> None:
    image = cloud.released_image("noble")
    file = Path(image).name
    make_older(image, source=source.format(OLD, file, server.url))
    offline = make_cloud(server, project.parent / "images", "offline = true")
    with pytest.raises(ImageNotFoundError):
        offline.released_image("noble")
    assert cloud.released_image("noble") == image
    assert offline.released_image("noble") == image, "it was verified"


def test_build_of_the_future_is_no_release_of_an_older_version(
    cloud: Qemu, server: ImageServer, released: CatalogEntry, project: Path
) -> None:
    image = Path(cloud.released_image("noble"))
    source = released.url.replace(OLD, "20991231")
    make_older(str(image), serial="20991231", source=source)
    image.parent.rename(image.parent.with_name("20991231"))
    assert cloud.released_image("noble") == str(image)


def test_keys_of_another_configuration_do_not_vouch_for_this_one(
    cloud: Qemu, server: ImageServer, released: CatalogEntry, project: Path
) -> None:
    images = project.parent / "images"
    genuine = server.files.copy()
    with new_signing_key() as theirs, running_image_server(theirs, project) as hostile:
        hostile.add_image(Stream.RELEASED, "noble", NEW)
        hostile.add_image(Stream.RELEASED, "noble", OLD)
        trusting = make_cloud(hostile, images)
        assert serial_of(trusting.released_image("noble")) == NEW
        offline = make_cloud(server, images, "offline = true")
        with pytest.raises(ImageNotFoundError):
            offline.released_image("noble")
        image = cloud.released_image("noble")
        assert serial_of(image) == OLD
        assert Path(image).read_bytes() == genuine[server.path_of(released.url)]
        assert serial_of(trusting.released_image("noble")) == NEW


def test_image_for_which_two_vouch_is_found_by_both(
    cloud: Qemu, server: ImageServer, released: CatalogEntry, project: Path
) -> None:
    images = project.parent / "images"
    image = cloud.released_image("noble")
    with new_signing_key() as company, running_image_server(company, project) as mirror:
        mirror.add_image(Stream.RELEASED, "noble", OLD)
        both = make_cloud(mirror, images), cloud
        assert both[0].released_image("noble") == image
        assert not any(path.endswith(".img") for path in mirror.requests), "it is the same"
        server.requests.clear()
        mirror.requests.clear()
        assert {each.released_image("noble") for each in both} == {image}
        assert server.requests == mirror.requests == []


def test_image_in_the_place_of_another_build_is_not_taken_for_it(
    cloud: Qemu, server: ImageServer, released: CatalogEntry, project: Path
) -> None:
    image = Path(cloud.released_image("noble"))
    image.parent.rename(image.parent.with_name("20991231"))
    assert cloud.released_image("noble") == str(image)


@pytest.mark.parametrize("part", ["directory", "image", "record", "kernel"])
def test_image_that_others_could_change_is_not_used(
    part: str, server: ImageServer, released: CatalogEntry, project: Path, cloud: Qemu
) -> None:
    image = Path(cloud.released_image("noble"))
    paths = {
        "directory": image.parent,
        "image": image,
        "record": store.record_path(image),
        "kernel": store.kernel_path(image),
    }
    paths[part].chmod(0o777)
    with pytest.raises(ImageBuildError, match=f"{paths[part]} .*can be written by all"):
        cloud.released_image("noble")
    offline = make_cloud(server, project.parent / "images", "offline = true")
    with pytest.raises(ImageNotFoundError):
        offline.released_image("noble")
    paths[part].chmod(0o755 if part == "directory" else 0o644)
    assert offline.released_image("noble") == str(image)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_image_of_another_user_is_not_used(
    server: ImageServer, released: CatalogEntry, project: Path, cloud: Qemu
) -> None:
    image = Path(cloud.released_image("noble"))
    images = project.parent / "images"
    offline = make_cloud(server, images, "offline = true")
    os.chown(store.record_path(image), 4711, 4711)
    with pytest.raises(ImageNotFoundError):
        offline.released_image("noble")
    # Whose directory it is may keep images in it.
    os.chown(images, 4711, 4711)
    assert offline.released_image("noble") == str(image)


GROUP = 4712


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_a_member_of_the_group_downloaded_is_used_where_that_is_shared(
    server: ImageServer, released: CatalogEntry, project: Path, cloud: Qemu
) -> None:
    images = project.parent / "images"
    os.chown(images, 4711, GROUP)
    images.chmod(0o2775)
    image = Path(cloud.released_image("noble"))
    below = [image.parent.parent, image.parent, *image.parent.iterdir()]
    for path in below:
        assert path.stat().st_gid == GROUP
        os.chown(path, 4713, GROUP)
    for directory in below[:2]:
        assert directory.stat().st_mode & 0o7777 == 0o2775, "others of the group add builds"
        directory.chmod(0o2775)
    offline = make_cloud(server, images, "offline = true")
    assert offline.released_image("noble") == str(image)
    # What somebody else could have made is not of the group, or in a directory of all.
    for changed, mode, group in (
        (image, 0o644, 4713),
        (images, 0o2755, GROUP),
        (images, 0o775, GROUP),
        (images, 0o3777, GROUP),
        (image.parent.parent, 0o2777, GROUP),
    ):
        os.chown(changed, -1, group)
        changed.chmod(mode)
        with pytest.raises(ImageNotFoundError):
            offline.released_image("noble")
        os.chown(image, -1, GROUP)
        for directory in (images, image.parent.parent):
            directory.chmod(0o2775)
        assert offline.released_image("noble") == str(image)


def test_nobody_else_may_write_what_was_downloaded_whatever_the_umask(
    server: ImageServer, released: CatalogEntry, project: Path, cloud: Qemu
) -> None:
    before = os.umask(0)
    try:
        image = Path(cloud.released_image("noble"))
    finally:
        os.umask(before)
    below = [image.parent.parent, image.parent, *image.parent.iterdir()]
    assert [path for path in below if path.stat().st_mode & 0o022] == []
