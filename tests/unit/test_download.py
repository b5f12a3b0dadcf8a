from __future__ import annotations

import dataclasses
import logging
import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pycloudlib.errors import ImageBuildError, ImageNotFoundError, ImageVerificationError
from pycloudlib.images import download, store
from pycloudlib.images.catalog import CatalogEntry, ImageSource, Stream, find_entry
from pycloudlib.images.releases import fetch_image, find_stored, image_path
from pycloudlib.progress import Progress
from tests.unit.imageserver import (
    ImageServer,
    SigningKey,
    forget_proxies,
    list_files,
    new_signing_key,
    running_image_server,
)


@pytest.fixture(scope="module")
def key() -> Iterator[SigningKey]:
    with new_signing_key() as made:
        yield made


@pytest.fixture
def server(
    key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ImageServer]:
    forget_proxies(monkeypatch)
    with running_image_server(key, tmp_path) as running:
        yield running


@pytest.fixture
def image_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "images"
    directory.mkdir()
    return directory


@pytest.fixture
def entry(server: ImageServer) -> CatalogEntry:
    return server.add_image(Stream.RELEASED, "noble", "20240821")


def boot_file_path(server: ImageServer, entry: CatalogEntry, name: str) -> str:
    return f"{server.path_of(entry.url).rpartition('/')[0]}/unpacked/{name}"


@pytest.mark.parametrize(
    ("stream", "minimal", "path"),
    [
        (Stream.RELEASED, False, "24.04/20240821.1/ubuntu-24.04-server-cloudimg-amd64"),
        (Stream.RELEASED, True, "24.04/20240821.1/ubuntu-24.04-minimal-cloudimg-amd64"),
        (Stream.DAILY, False, "noble/20240821.1/noble-server-cloudimg-amd64"),
        (Stream.DAILY, True, "noble/20240821.1/noble-minimal-cloudimg-amd64"),
    ],
)
def test_image_is_fetched_with_kernel_initrd_and_record(
    server: ImageServer, image_dir: Path, stream: Stream, minimal: bool, path: str
) -> None:
    server.add_image(stream, "noble", "20240821.1", minimal=minimal)
    entry = find_entry(server.source, stream, "noble", minimal=minimal)
    image = fetch_image(entry, server.source, image_dir)
    assert image == image_dir / f"{path}.img"
    assert image.read_bytes() == server.files[server.path_of(entry.url)]
    for boot_file in (store.kernel_path(image), store.initrd_path(image)):
        published = server.files[boot_file_path(server, entry, boot_file.name)]
        assert boot_file.read_bytes() == published
    assert store.find_record(image) == store.ImageRecord(
        release="noble",
        serial="20240821.1",
        sha256=entry.sha256,
        size=entry.size,
        source=entry.url,
    )
    assert [name for name in list_files(image_dir) if name.startswith(path)] == [
        f"{path}-initrd-generic",
        f"{path}-vmlinuz-generic",
        f"{path}.img",
        f"{path}.img.json",
    ]


def test_missing_image_dir_is_made(
    server: ImageServer, entry: CatalogEntry, tmp_path: Path
) -> None:
    assert fetch_image(entry, server.source, tmp_path / "new" / "images").is_file()


def test_complete_image_is_given_without_network(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    image = fetch_image(entry, server.source, image_dir)
    server.requests.clear()
    assert fetch_image(entry, server.source, image_dir) == image
    elsewhere = dataclasses.replace(entry, url=entry.url.replace("127.0.0.1", "mirror.invalid"))
    assert fetch_image(elsewhere, server.source, image_dir) == image
    assert server.requests == []


def test_progress_is_told_in_bytes(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    reports: list[Progress] = []
    image = fetch_image(entry, server.source, image_dir, on_progress=reports.append)
    names = list(dict.fromkeys(report.detail for report in reports))
    assert names == [store.kernel_path(image).name, store.initrd_path(image).name, image.name]
    of_image = [report for report in reports if report.detail == image.name]
    assert len(of_image) > 1
    assert of_image[-1] == Progress("downloading", image.name, entry.size, entry.size, "B")
    done = [report.done or 0 for report in of_image]
    assert done == sorted(done)
    kernel_size = store.kernel_path(image).stat().st_size
    assert reports[0] == Progress("downloading", names[0], kernel_size, kernel_size, "B")


def test_image_without_initrd_is_fetched(server: ImageServer, image_dir: Path) -> None:
    entry = server.add_image(Stream.RELEASED, "noble", "20240821", initrd=False)
    image = fetch_image(entry, server.source, image_dir)
    assert store.kernel_path(image).is_file()
    assert not store.initrd_path(image).exists()


def test_image_that_many_ask_for_at_once_is_transferred_once(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(fetch_image, entry, server.source, image_dir) for _ in range(4)]
    assert len({future.result() for future in asked}) == 1
    assert server.requests.count(server.path_of(entry.url)) == 1
    assert not list(image_dir.rglob("*.replaced"))
    assert not list(image_dir.glob(".*"))


def test_lost_kernel_is_fetched_alone(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    image = fetch_image(entry, server.source, image_dir)
    written = (image.stat().st_ino, image.stat().st_mtime_ns)
    store.kernel_path(image).unlink()
    server.requests.clear()
    fetch_image(entry, server.source, image_dir)
    assert store.kernel_path(image).is_file()
    assert (image.stat().st_ino, image.stat().st_mtime_ns) == written
    assert server.path_of(entry.url) not in server.requests


def test_right_image_without_record_is_adopted(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    image = image_path(entry, image_dir)
    image.parent.mkdir(parents=True)
    image.write_bytes(server.files[server.path_of(entry.url)])
    assert fetch_image(entry, server.source, image_dir) == image
    assert server.path_of(entry.url) not in server.requests
    assert store.find_record(image) is not None


def test_wrong_image_is_replaced_and_kept_aside(
    server: ImageServer,
    entry: CatalogEntry,
    image_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    image = fetch_image(entry, server.source, image_dir)
    image.write_bytes(b"somebody's changed image")
    with caplog.at_level(logging.WARNING):
        fetch_image(entry, server.source, image_dir)
    assert image.stat().st_size == entry.size
    kept = image.with_name(f"{image.name}.replaced")
    assert kept.read_bytes() == b"somebody's changed image"
    assert str(kept) in caplog.text


def test_wrong_image_stays_when_the_right_one_cannot_be_had(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    image = fetch_image(entry, server.source, image_dir)
    image.write_bytes(b"somebody's changed image")
    before = list_files(image_dir)
    del server.files[server.path_of(entry.url)]
    with pytest.raises(ImageBuildError):
        fetch_image(entry, server.source, image_dir)
    assert image.read_bytes() == b"somebody's changed image"
    assert list_files(image_dir) == before


PARTS = ["", "-vmlinuz-generic", "-initrd-generic", "SHA256SUMS", "SHA256SUMS.gpg"]


def part_path(server: ImageServer, entry: CatalogEntry, part: str) -> str:
    if not part:
        return server.path_of(entry.url)
    return boot_file_path(server, entry, part if part.startswith("SHA") else entry.name + part)


@pytest.mark.parametrize("part", PARTS)
def test_missing_file_leaves_nothing(
    server: ImageServer, entry: CatalogEntry, image_dir: Path, part: str
) -> None:
    path = part_path(server, entry, part)
    del server.files[path]
    with pytest.raises(ImageBuildError, match=f"{server.url}{path} failed: .* 404 Not Found"):
        fetch_image(entry, server.source, image_dir)
    assert list_files(image_dir) == []


@pytest.mark.parametrize("part", PARTS)
def test_truncated_file_leaves_nothing(
    server: ImageServer, entry: CatalogEntry, image_dir: Path, part: str
) -> None:
    path = part_path(server, entry, part)
    server.cut_short.add(path)
    size = len(server.files[path])
    message = f"{server.url}{path} failed: RemoteProtocolError: .*expected {size}"
    with pytest.raises(ImageBuildError, match=message):
        fetch_image(entry, server.source, image_dir)
    assert list_files(image_dir) == []


@pytest.mark.parametrize("part", PARTS)
def test_silently_truncated_file_leaves_nothing(
    server: ImageServer, entry: CatalogEntry, image_dir: Path, part: str
) -> None:
    path = part_path(server, entry, part)
    server.cut_silently.add(path)
    with pytest.raises(ImageVerificationError, match=f"{server.url}{path.removesuffix('.gpg')}"):
        fetch_image(entry, server.source, image_dir)
    assert list_files(image_dir) == []


@pytest.mark.parametrize("part", PARTS)
def test_changed_file_leaves_nothing(
    server: ImageServer, entry: CatalogEntry, image_dir: Path, part: str
) -> None:
    path = part_path(server, entry, part)
    changed = bytearray(server.files[path])
    changed[100] ^= 1
    server.files[path] = bytes(changed)
    with pytest.raises(ImageVerificationError, match=f"{server.url}{path.removesuffix('.gpg')}"):
        fetch_image(entry, server.source, image_dir)
    assert list_files(image_dir) == []


def test_wrong_checksum_is_told_with_the_expected_one(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    path = server.path_of(entry.url)
    server.files[path] = bytes(entry.size)
    with pytest.raises(ImageVerificationError) as caught:
        fetch_image(entry, server.source, image_dir)
    for told in (entry.url, entry.sha256, str(entry.size)):
        assert told in str(caught.value)


def test_endless_image_is_given_up_early(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    server.files[server.path_of(entry.url)] *= 3
    with pytest.raises(ImageVerificationError, match=f"longer than expected: {entry.size} bytes"):
        fetch_image(entry, server.source, image_dir)
    assert list_files(image_dir) == []


def test_endless_kernel_is_given_up(
    server: ImageServer, entry: CatalogEntry, image_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_FILE_LIMIT", 100)
    with pytest.raises(ImageVerificationError, match="vmlinuz-generic is longer than expected"):
        fetch_image(entry, server.source, image_dir)
    assert list_files(image_dir) == []


def test_checksums_of_a_stranger_are_refused(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    with pytest.raises(ImageVerificationError, match="unpacked/SHA256SUMS has no good signature"):
        fetch_image(entry, ImageSource(server.url), image_dir)
    assert list_files(image_dir) == []


def test_checksums_that_name_no_kernel_are_told(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    directory = boot_file_path(server, entry, "x").rpartition("/")[0]
    server.sign_sums(directory, {"another-vmlinuz-generic": b"kernel"})
    with pytest.raises(ImageNotFoundError, match="unpacked/SHA256SUMS does not name 'ubuntu-24"):
        fetch_image(entry, server.source, image_dir)
    assert list_files(image_dir) == []


def test_unreachable_server_leaves_nothing(
    server: ImageServer, entry: CatalogEntry, tmp_path: Path
) -> None:
    gone = dataclasses.replace(entry, url=entry.url.replace(server.url, "http://127.0.0.1:1"))
    with pytest.raises(ImageBuildError, match=r"http://127\.0\.0\.1:1/.* failed: ConnectError"):
        fetch_image(gone, server.source, tmp_path / "new" / "images")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interruption_leaves_nothing(
    server: ImageServer, entry: CatalogEntry, image_dir: Path, error: type[BaseException]
) -> None:
    def interrupt(report: Progress) -> None:
        if report.detail.endswith(".img"):
            raise error

    with pytest.raises(error):
        fetch_image(entry, server.source, image_dir, on_progress=interrupt)
    assert list_files(image_dir) == []


def test_disk_that_takes_no_more_is_told(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    # As a full disk does, the limit stops a write in the middle of the image.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(ImageBuildError, match=r"cannot be written after \d+ bytes: File too"):
            fetch_image(entry, server.source, image_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list_files(image_dir) == []


def test_image_dir_that_is_a_file_is_told(
    server: ImageServer, entry: CatalogEntry, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OSError, match=str(file)):
        fetch_image(entry, server.source, file)
    assert file.read_text() == "mine"


def test_password_of_a_mirror_is_not_stored(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    url = entry.url.replace("http://", "http://me:secret@")
    image = fetch_image(dataclasses.replace(entry, url=url), server.source, image_dir)
    record = store.find_record(image)
    assert record is not None
    assert record.source == entry.url


def test_nothing_is_stored_at_first(image_dir: Path) -> None:
    assert find_stored(image_dir, Stream.RELEASED, "noble", False) is None
    assert find_stored(image_dir / "missing", Stream.RELEASED, "noble", False) is None


def test_newest_stored_image_is_found(server: ImageServer, image_dir: Path) -> None:
    for serial in ("20260930.2", "20260930.10", "20260101"):
        entry = server.add_image(Stream.RELEASED, "noble", serial)
        fetch_image(entry, server.source, image_dir)
    server.requests.clear()
    newest = image_dir / "24.04/20260930.10/ubuntu-24.04-server-cloudimg-amd64.img"
    assert find_stored(image_dir, Stream.RELEASED, "noble", False) == newest
    assert find_stored(image_dir, Stream.RELEASED, "24.04", False) == newest
    assert server.requests == []


def test_stored_image_of_another_kind_is_not_found(server: ImageServer, image_dir: Path) -> None:
    released = server.add_image(Stream.RELEASED, "noble", "20240821")
    daily_minimal = server.add_image(Stream.DAILY, "jammy", "20240821", minimal=True)
    for entry in (released, daily_minimal):
        fetch_image(entry, server.source, image_dir)
    assert find_stored(image_dir, Stream.DAILY, "noble", False) is None
    assert find_stored(image_dir, Stream.RELEASED, "noble", True) is None
    assert find_stored(image_dir, Stream.RELEASED, "jammy", False) is None
    assert find_stored(image_dir, Stream.DAILY, "jammy", False) is None
    found = find_stored(image_dir, Stream.DAILY, "jammy", True)
    assert found == image_path(daily_minimal, image_dir)


def test_stored_image_that_is_not_whole_is_not_found(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    image = fetch_image(entry, server.source, image_dir)
    os.truncate(image, entry.size - 1)
    assert find_stored(image_dir, Stream.RELEASED, "noble", False) is None
    image.unlink()
    assert find_stored(image_dir, Stream.RELEASED, "noble", False) is None


def test_stored_image_without_record_is_not_found(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    image = fetch_image(entry, server.source, image_dir)
    store.record_path(image).unlink()
    assert find_stored(image_dir, Stream.RELEASED, "noble", False) is None


def test_malformed_release_is_not_looked_for(image_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"Invalid release '\.\./x'"):
        find_stored(image_dir, Stream.RELEASED, "../x", False)


def test_deleted_image_is_gone_with_all_beside_it(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    store.delete(fetch_image(entry, server.source, image_dir), image_dir)
    assert list_files(image_dir) == ["24.04"]
