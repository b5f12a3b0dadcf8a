"""Pinned images: that very build, everywhere, until the lock is updated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pycloudlib import Qemu
from pycloudlib.cloud import ImageType
from pycloudlib.errors import ImageBuildError, ImageNotFoundError, ImageVerificationError
from pycloudlib.images.source import Stream
from tests.unit.imageserver import ImageServer, make_cloud

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
    assert server.catalog_path(Stream.DAILY) not in server.requests, "the lock says it all"


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
