"""Catalogs that are kept: fetched when they have changed, verified each time, never taken back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pycloudlib.errors import ImageBuildError, ImageVerificationError
from pycloudlib.images import download
from pycloudlib.images.catalog import find_entry
from pycloudlib.images.source import ImageSource, Stream
from tests.unit.imageserver import (
    ImageServer,
    new_signing_key,
)

OLD, NEW = "20240821", "20240822"
EARLIER, LATER = "Thu, 22 Aug 2024 03:28:23 +0000", "Fri, 23 Aug 2024 03:28:23 +0000"


@pytest.fixture(autouse=True)
def published(server: ImageServer) -> None:
    server.add_image(Stream.DAILY, "noble", OLD)


@pytest.fixture
def source(server: ImageServer, tmp_path: Path) -> ImageSource:
    return dataclasses.replace(server.source, cache_dir=tmp_path / "cache" / "catalogs")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Tell of each catalog whether it was sent."""
    told: list[bool] = []
    fetch = download.fetch_changed

    def fetch_changed(*arguments: object) -> object:
        content, version = fetch(*arguments)  # type: ignore[arg-type]
        told.append(content is not None)
        return content, version

    monkeypatch.setattr("pycloudlib.images.catalog.fetch_changed", fetch_changed)
    return told


def newest(source: ImageSource) -> str:
    return find_entry(source, Stream.DAILY, "noble").serial


def test_catalog_is_sent_when_it_has_changed(
    server: ImageServer, source: ImageSource, sent: list[bool]
) -> None:
    assert [newest(source), newest(source)] == [OLD, OLD]
    server.add_image(Stream.DAILY, "noble", NEW)
    assert [newest(source), newest(source)] == [NEW, NEW]
    assert sent == [True, False, True, False]


def test_server_that_tells_dates_sends_what_was_changed_since(
    server: ImageServer, source: ImageSource, sent: list[bool]
) -> None:
    server.changed = EARLIER
    assert [newest(source), newest(source)] == [OLD, OLD]
    server.changed = LATER
    server.add_image(Stream.DAILY, "noble", NEW)
    assert [newest(source), newest(source)] == [NEW, NEW]
    assert sent == [True, False, True, False]


def test_server_that_knows_no_versions_sends_it_each_time(
    server: ImageServer, source: ImageSource, sent: list[bool]
) -> None:
    server.knows_versions = False
    assert [newest(source), newest(source)] == [OLD, OLD]
    assert sent == [True, True]


def test_nothing_is_kept_where_nothing_may_be(
    server: ImageServer, source: ImageSource, sent: list[bool], tmp_path: Path
) -> None:
    without = dataclasses.replace(source, cache_dir=None)
    assert [newest(without), newest(without)] == [OLD, OLD]
    (tmp_path / "file").touch()
    unusable = dataclasses.replace(source, cache_dir=tmp_path / "file" / "catalogs")
    assert [newest(unusable), newest(unusable)] == [OLD, OLD]
    assert sent == [True] * 4


def spoil(message: bytes) -> bytes:
    return message.replace(OLD.encode(), b"20990101")


@pytest.mark.parametrize(
    "damage", [spoil, lambda message: message[:-300], lambda _: b"", lambda _: b"{}\n"]
)
def test_catalog_that_was_changed_where_it_is_kept_is_fetched_again(
    damage: object, source: ImageSource, sent: list[bool]
) -> None:
    assert callable(damage)
    newest(source)
    assert source.cache_dir is not None
    (kept,) = source.cache_dir.iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    assert newest(source) == OLD
    assert sent == [True, True]


def test_catalog_that_a_key_of_before_signed_is_not_believed(
    server: ImageServer, source: ImageSource, tmp_path: Path
) -> None:
    newest(source)
    with new_signing_key() as stranger:
        other = dataclasses.replace(source, keyring=stranger.write_keyring(tmp_path / "other.asc"))
        with pytest.raises(ImageVerificationError):
            newest(other)
    assert newest(source) == OLD


def test_catalog_that_is_not_signed_is_not_kept(server: ImageServer, source: ImageSource) -> None:
    path = server.catalog_path(Stream.DAILY)
    signed = server.files[path]
    server.files[path] = spoil(signed)
    with pytest.raises(ImageVerificationError):
        newest(source)
    assert source.cache_dir is not None
    assert not source.cache_dir.exists()
    server.files[path] = signed
    assert newest(source) == OLD


def test_older_catalog_does_not_take_newer_images_away(
    server: ImageServer, source: ImageSource, caplog: pytest.LogCaptureFixture
) -> None:
    path = server.catalog_path(Stream.DAILY)
    server.updated = EARLIER
    server.add_image(Stream.DAILY, "noble", OLD)
    of_before = server.files[path]
    server.updated = LATER
    server.add_image(Stream.DAILY, "noble", NEW)
    assert newest(source) == NEW
    assert caplog.text == ""
    server.files[path] = of_before
    assert newest(source) == NEW
    assert "older than what it was before" in caplog.text


def test_server_that_cannot_be_reached_is_told(server: ImageServer, source: ImageSource) -> None:
    newest(source)
    server.failures[server.catalog_path(Stream.DAILY)] = [503] * 5
    with pytest.raises(ImageBuildError, match="503"):
        newest(source)


def test_unverified_catalog_is_another(server: ImageServer, source: ImageSource) -> None:
    newest(source)
    unverified = dataclasses.replace(source, verified=False)
    path = server.catalog_path(Stream.DAILY).replace(".sjson", ".json")
    server.files[path] = spoil(server.files[path])
    assert newest(unverified) == "20990101"
    assert newest(source) == OLD
