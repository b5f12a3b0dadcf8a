"""What people call images, turned into ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pycloudlib import Qemu
from pycloudlib.cli.common import Session
from pycloudlib.errors import ImageNotFoundError
from pycloudlib.images import store
from pycloudlib.images.store import ImageRecord
from pycloudlib.qemu import imagenames
from tests.unit.clirun import make_machine, run


@pytest.fixture
def cloud() -> Qemu:
    return Session().cloud


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Note which images are asked for, instead of getting them."""
    asked: list[tuple[str, str]] = []

    def note(kind: str) -> Any:
        def get(_self: Qemu, release: str, *_more: object, **_options: object) -> str:
            asked.append((kind, release))
            return f"/images/{release}.img"

        return get

    for kind in ("released_image", "daily_image", "build_image"):
        monkeypatch.setattr(Qemu, kind, note(kind))
    return asked


def record(source: str = "built", serial: str = "20260930") -> ImageRecord:
    return ImageRecord("bookworm", serial, "", 1, source)


@pytest.fixture
def stored(cloud: Qemu) -> Path:
    image = cloud.image_dir / "bookworm" / "20260930" / "bookworm.img"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"image")
    store.write_record(image, record())
    return image


def make_snapshot(cloud: Qemu, name: str, source: str) -> Path:
    image = cloud.parent_dir / "snapshots" / f"{name}.img"
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes(b"QFI\xfb")
    store.write_record(image, record(source))
    return image


def get(cloud: Qemu, text: str, *, daily: bool = False) -> str:
    return imagenames.get_image(cloud, text, daily=daily, on_progress=None)


@pytest.mark.parametrize(
    ("text", "daily", "kind"),
    [
        ("noble", False, "released_image"),
        ("24.04", False, "released_image"),
        ("lts", False, "released_image"),
        ("noble", True, "daily_image"),
        ("bookworm", False, "build_image"),
        ("trixie", True, "build_image"),
        ("zzzzzz", False, "released_image"),  # a release to come: the server decides
        ("29.10", False, "released_image"),
    ],
)
def test_releases_are_got(
    cloud: Qemu, asked: list[tuple[str, str]], text: str, daily: bool, kind: str
) -> None:
    assert get(cloud, text, daily=daily) == f"/images/{text}.img"
    assert asked == [(kind, text)]


@pytest.mark.parametrize("text", ["nobel", "24.4", "x y", "", "UBUNTU", "../noble"])
def test_what_cannot_be_a_release_asks_no_server(
    cloud: Qemu, asked: list[tuple[str, str]], text: str
) -> None:
    with pytest.raises(ImageNotFoundError, match="There is no image"):
        get(cloud, text)

    assert asked == []


def test_paths_builds_and_snapshots_are_found_here(
    cloud: Qemu,
    asked: list[tuple[str, str]],
    stored: Path,
    tiny_image: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    snapshot = make_snapshot(cloud, "web-0a1b2c3d", "snapshot of web")
    monkeypatch.chdir(tiny_image.parent)

    assert get(cloud, str(tiny_image)) == str(tiny_image)
    assert get(cloud, tiny_image.name) == str(tiny_image)
    assert get(cloud, f"./{tiny_image.name}") == str(tiny_image)
    assert get(cloud, str(stored.relative_to(cloud.image_dir))) == str(stored)
    assert get(cloud, "bookworm/20260930") == str(stored)
    assert get(cloud, "web-0a1b2c3d") == get(cloud, "web-0a1b2c3d.img") == str(snapshot)
    assert asked == []


@pytest.mark.parametrize(
    ("text", "prefix"),
    [
        ("noble", "noble"),
        ("24.04", "noble"),
        ("bookworm", "bookworm"),
        ("web-0a1b2c3d", "web"),
        ("my-web-0a1b2c3d.img", "my-web"),
        ("/srv/Image.qcow2", "vm"),
        ("bookworm/20260930", "vm"),
    ],
)
def test_made_up_names_begin_with_what_is_known(text: str, prefix: str) -> None:
    assert imagenames.name_prefix(text) == prefix


def test_latest_saved_machine_is_what_a_rollback_goes_to(cloud: Qemu) -> None:
    make_snapshot(cloud, "web-00000001", "snapshot of web")
    make_snapshot(cloud, "web-00000002", "saved from web")

    # Its memory is gone: it is what a fork was built on.
    assert imagenames.find_saved_of(cloud.working_dir, "web") is None
    assert [path.stem for path in imagenames.fork_bases(cloud.working_dir)] == ["web-00000002"]


def test_what_forks_were_built_on_goes_with_the_last_of_them(
    cloud: Qemu, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_snapshot(cloud, "web-00000002", "saved from web")
    make_machine(cloud.working_dir, "web-1", base=base)
    make_machine(cloud.working_dir, "web-2", base=base)

    assert run(capsys, "delete", "web-1").code == 0
    assert base.exists()
    assert run(capsys, "delete", "web-2").code == 0
    assert not base.exists()


def test_images_are_listed_with_the_names_that_name_them(
    cloud: Qemu, stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_snapshot(cloud, "web-00000001", "snapshot of web")
    make_snapshot(cloud, "web-00000002", "saved from web")

    table = run(capsys, "images", "list").out
    told = json.loads(run(capsys, "images", "list", "--json").out)

    assert "bookworm/20260930  image" in table
    assert [image["name"] for image in told] == ["bookworm/20260930", "web-00000001"]
    assert told[0] == {
        "name": "bookworm/20260930",
        "kind": "image",
        "id": str(stored),
        "release": "bookworm",
        "serial": "20260930",
        "size_bytes": 5,
        "source": "built",
        "last_used": told[0]["last_used"],
    }
    assert told[1]["kind"] == "snapshot"


def test_image_in_use_is_not_deleted(
    cloud: Qemu, stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_machine(cloud.working_dir, "web", base=stored)

    refused = run(capsys, "images", "delete", "bookworm/20260930")
    assert refused.code == 1
    assert "web built on it" in refused.err
    assert run(capsys, "delete", "web").code == 0
    assert run(capsys, "images", "delete", "bookworm").code == 0
    assert not stored.exists()


def test_old_builds_are_pruned(
    cloud: Qemu, stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = cloud.image_dir / "bookworm" / "20261001" / "bookworm.img"
    newer.parent.mkdir()
    newer.write_bytes(b"image")
    store.write_record(newer, record(serial="20261001"))

    done = run(capsys, "images", "prune")

    assert done.out.split() == [str(stored)]
    assert newer.exists()
