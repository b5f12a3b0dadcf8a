from __future__ import annotations

import dataclasses
import gzip
import logging
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pycloudlib._base.files import owner_opener
from pycloudlib.errors import (
    ImageBuildError,
    ImageInUseError,
    ImageNotFoundError,
    ImageVerificationError,
)
from pycloudlib.images import download, store, uses
from pycloudlib.images.catalog import CatalogEntry, find_entry
from pycloudlib.images.download import Limits
from pycloudlib.images.releases import fetch_image, find_stored, image_path
from pycloudlib.images.source import ImageSource, Stream
from pycloudlib.progress import Progress
from tests.unit.imageserver import (
    QUICK,
    ImageServer,
    forget_proxies,
    list_files,
    new_signing_key,
    running_image_server,
)


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
        vouchers=(server.source.voucher,),
        names=("noble", "24.04"),
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
    of_kernel = [report for report in reports if report.detail == names[0]]
    assert of_kernel[-1] == Progress("downloading", names[0], kernel_size, kernel_size, "B")


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


@pytest.mark.parametrize("name", [lambda image: image, store.kernel_path])
def test_wrong_file_that_is_in_use_is_not_replaced(
    server: ImageServer,
    entry: CatalogEntry,
    image_dir: Path,
    tmp_path: Path,
    name: Callable[[Path], Path],
) -> None:
    image = fetch_image(entry, server.source, image_dir)
    file = name(image)
    file.write_bytes(b"changed")
    store.record_path(image).unlink()
    disk = tmp_path / "vm" / "vm.qcow2"
    disk.parent.mkdir()
    disk.touch()
    uses.record(disk, [file])
    with pytest.raises(ImageInUseError, match="vm built on it"):
        fetch_image(entry, server.source, image_dir)
    assert file.read_bytes() == b"changed"
    shutil.rmtree(disk.parent)
    fetch_image(entry, server.source, image_dir)
    assert file.read_bytes() != b"changed"


def test_wrong_image_stays_when_the_right_one_cannot_be_had(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    image = fetch_image(entry, server.source, image_dir)
    image.write_bytes(b"somebody's changed image")
    before = finished_files(image_dir)
    del server.files[server.path_of(entry.url)]
    with pytest.raises(ImageBuildError):
        fetch_image(entry, server.source, image_dir)
    assert image.read_bytes() == b"somebody's changed image"
    assert finished_files(image_dir) == before


def finished_files(image_dir: Path) -> list[str]:
    """List the files that are there but for those that are on their way."""
    files = [path for path in image_dir.rglob("*") if path.is_file()]
    return [path.name for path in files if not path.name.endswith(".part")]


PARTS = ["", "-vmlinuz-generic", "-initrd-generic", "SHA256SUMS", "SHA256SUMS.gpg"]


def part_path(server: ImageServer, entry: CatalogEntry, part: str) -> str:
    if not part:
        return server.path_of(entry.url)
    return boot_file_path(server, entry, part if part.startswith("SHA") else entry.name + part)


@pytest.mark.parametrize("part", PARTS)
def test_missing_file_is_told(
    server: ImageServer, entry: CatalogEntry, image_dir: Path, part: str
) -> None:
    path = part_path(server, entry, part)
    del server.files[path]
    with pytest.raises(ImageBuildError, match=f"{server.url}{path} failed: .* 404 Not Found"):
        fetch_image(entry, server.source, image_dir)
    assert finished_files(image_dir) == []


@pytest.mark.parametrize("part", PARTS)
def test_file_that_always_ends_early_is_told(
    server: ImageServer, entry: CatalogEntry, image_dir: Path, part: str
) -> None:
    path = part_path(server, entry, part)
    server.cut_short.add(path)
    server.knows_ranges = False
    size = len(server.files[path])
    message = f"{server.url}{path} failed: RemoteProtocolError: .*expected {size}"
    with pytest.raises(ImageBuildError, match=message):
        fetch_image(entry, server.source, image_dir)
    assert server.requests.count(path) == 5
    assert finished_files(image_dir) == []


@pytest.mark.parametrize("part", PARTS)
def test_silently_truncated_file_is_refused(
    server: ImageServer, entry: CatalogEntry, image_dir: Path, part: str
) -> None:
    path = part_path(server, entry, part)
    server.cut_silently.add(path)
    # Only of the image the length is known beforehand.
    error = ImageVerificationError if part else ImageBuildError
    with pytest.raises(error, match=f"{server.url}{path.removesuffix('.gpg')}"):
        fetch_image(entry, server.source, image_dir)
    assert finished_files(image_dir) == []


@pytest.mark.parametrize("part", PARTS)
def test_changed_file_is_refused(
    server: ImageServer, entry: CatalogEntry, image_dir: Path, part: str
) -> None:
    path = part_path(server, entry, part)
    changed = bytearray(server.files[path])
    changed[100] ^= 1
    server.files[path] = bytes(changed)
    with pytest.raises(ImageVerificationError, match=f"{server.url}{path.removesuffix('.gpg')}"):
        fetch_image(entry, server.source, image_dir)
    assert finished_files(image_dir) == []


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
    assert finished_files(image_dir) == []


def test_endless_kernel_is_given_up(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    source = replace(server.source, limits=Limits(file_bytes=100))
    with pytest.raises(ImageVerificationError, match="vmlinuz-generic is longer than expected"):
        fetch_image(entry, source, image_dir)
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
def test_interrupted_download_is_gone_on_with(
    server: ImageServer, entry: CatalogEntry, image_dir: Path, error: type[BaseException]
) -> None:
    def interrupt(report: Progress) -> None:
        if report.detail.endswith(".img"):
            raise error

    with pytest.raises(error):
        fetch_image(entry, server.source, image_dir, on_progress=interrupt)
    assert finished_files(image_dir) == []
    path = server.path_of(entry.url)
    reports: list[Progress] = []
    image = fetch_image(entry, server.source, image_dir, on_progress=reports.append)
    (asked,) = server.ranges[path]
    begun = int(asked.removeprefix("bytes=").removesuffix("-"))
    assert 0 < begun < entry.size
    done = [report.done or 0 for report in reports if report.detail == image.name]
    assert min(done) > begun
    assert image.read_bytes() == server.files[path]
    assert [file for file in list_files(image_dir) if file.endswith(".part")] == []
    # Kernel and initrd had come whole.
    for part in PARTS[1:3]:
        assert server.requests.count(part_path(server, entry, part)) == 1


def leave_partial(entry: CatalogEntry, image_dir: Path, content: bytes) -> Path:
    image = image_path(entry, image_dir)
    image.parent.mkdir(parents=True)
    partial = image.with_name(f".{image.name}.{entry.sha256[:16]}.part")
    partial.write_bytes(content)
    return partial


@pytest.mark.parametrize("knows_ranges", [True, False])
@pytest.mark.parametrize("wrong", [False, True])
def test_what_came_before_is_used_only_if_it_fits(
    knows_ranges: bool, wrong: bool, server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    server.knows_ranges = knows_ranges
    content = server.files[server.path_of(entry.url)]
    leave_partial(entry, image_dir, bytes(1000) if wrong else content[:1000])
    image = fetch_image(entry, server.source, image_dir)
    assert image.read_bytes() == content
    assert server.ranges == ({server.path_of(entry.url): ["bytes=1000-"]} if knows_ranges else {})


def test_whole_file_that_was_not_renamed_is_not_transferred_again(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    path = server.path_of(entry.url)
    leave_partial(entry, image_dir, server.files[path])
    assert fetch_image(entry, server.source, image_dir).is_file()
    assert path not in server.requests


def test_partial_file_of_another_member_of_the_group_is_no_obstacle(
    server: ImageServer, entry: CatalogEntry, image_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.cut_short.add(server.path_of(entry.url))
    with pytest.raises(ImageBuildError):
        fetch_image(entry, replace(server.source, limits=Limits(pauses=())), image_dir)
    theirs = {path.stat().st_ino for path in image_dir.glob("*/*/.*.part")}
    assert len(theirs) == 3

    def open_own(path: str, flags: int) -> int:
        if Path(path).exists() and Path(path).stat().st_ino in theirs:
            raise PermissionError(path)
        return owner_opener(path, flags)

    monkeypatch.setattr(download, "owner_opener", open_own)
    server.cut_short.clear()
    image = fetch_image(entry, server.source, image_dir)
    assert image.read_bytes() == server.files[server.path_of(entry.url)]


@pytest.mark.parametrize("length", [1, 3])
def test_partial_file_that_is_too_long_is_no_obstacle(
    length: int, server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    leave_partial(entry, image_dir, bytes(entry.size + length))
    assert fetch_image(entry, server.source, image_dir).stat().st_size == entry.size


def test_line_that_breaks_is_taken_up_again(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    path = server.path_of(entry.url)
    server.cut_short.add(path)  # each answer ends in the middle of what was left
    with pytest.raises(ImageBuildError, match="failed"):
        fetch_image(entry, server.source, image_dir)
    asked = [int(each.removeprefix("bytes=").removesuffix("-")) for each in server.ranges[path]]
    assert asked == sorted(set(asked))
    assert len(asked) == 4
    server.cut_short.clear()
    assert fetch_image(entry, server.source, image_dir).is_file()
    assert int(server.ranges[path][-1][6:-1]) > asked[-1]


@pytest.fixture
def aging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ImageServer]:
    """Give a server whose key is of 2024, and signs in July of that year."""
    forget_proxies(monkeypatch)
    with (
        new_signing_key(faked_time="20240701T000000!") as key,
        running_image_server(key, tmp_path) as server,
    ):
        key.move_clock("20240722T120000!")
        yield server


def test_kernel_of_an_older_signed_build_is_refused(aging: ImageServer, image_dir: Path) -> None:
    old = aging.add_image(Stream.RELEASED, "noble", "20240721")
    aging.key.move_clock("20240821T000001!")
    new = aging.add_image(Stream.RELEASED, "noble", "20240821.1")
    of_old, of_new = (
        f"{aging.path_of(entry.url).rpartition('/')[0]}/unpacked/" for entry in (old, new)
    )
    genuine = dict(aging.files)
    aging.files |= {
        of_new + path.removeprefix(of_old): content
        for path, content in genuine.items()
        if path.startswith(of_old)
    }
    with pytest.raises(
        ImageVerificationError, match=r"signed on 2024-07-22, before the build 20240821\.1 "
    ):
        fetch_image(new, aging.source, image_dir)
    assert list_files(image_dir) == []
    assert fetch_image(old, aging.source, image_dir).is_file(), "beside its own image it is right"
    aging.files = genuine
    assert fetch_image(new, aging.source, image_dir).is_file(), "signed on the day of the build"


def test_build_that_is_named_by_a_day_of_the_far_east_has_its_kernel(
    aging: ImageServer, image_dir: Path
) -> None:
    aging.key.move_clock("20240820T110000!")
    today = aging.add_image(Stream.RELEASED, "noble", "20240821")
    assert fetch_image(today, aging.source, image_dir).is_file()
    tomorrow = aging.add_image(Stream.RELEASED, "noble", "20240822")
    with pytest.raises(ImageVerificationError, match="signed on 2024-08-20, before the build"):
        fetch_image(tomorrow, aging.source, image_dir)


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_passing_failure_of_the_server_is_survived(
    status: int, server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    for part in PARTS:
        server.failures[part_path(server, entry, part)] = [status, status]
    assert fetch_image(entry, server.source, image_dir).is_file()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_lasting_failure_is_told_at_once(
    status: int, server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    path = server.path_of(entry.url)
    server.failures[path] = [status]
    with pytest.raises(ImageBuildError, match=f"the server answered {status}"):
        fetch_image(entry, server.source, image_dir)
    assert server.requests.count(path) == 1


def test_redirect_to_elsewhere_brings_nothing_else(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    path = server.path_of(entry.url)
    server.files["/elsewhere"] = bytes(entry.size)
    server.redirects[path] = f"{server.url}/elsewhere"
    with pytest.raises(ImageVerificationError, match="not the file expected"):
        fetch_image(entry, server.source, image_dir)
    server.files["/elsewhere"] = server.files[path]
    assert fetch_image(entry, server.source, image_dir).is_file()


def test_server_that_stalls_is_told(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    source = replace(server.source, limits=replace(QUICK, timeout=0.1))
    server.stalled.add(server.path_of(entry.url))
    with pytest.raises(ImageBuildError, match="ReadTimeout"):
        fetch_image(entry, source, image_dir)


def test_want_of_room_is_told_before_anything_is_transferred(
    server: ImageServer, entry: CatalogEntry, image_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(image_dir)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=10 << 20))
    with pytest.raises(ImageBuildError, match=r"No room for .* MiB are needed, 10 MiB are free"):
        fetch_image(entry, server.source, image_dir)
    assert server.path_of(entry.url) not in server.requests
    assert list_files(image_dir) == []


def test_two_images_are_transferred_side_by_side(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    other = server.add_image(Stream.DAILY, "noble", "20240822")
    server.stalled.add(server.path_of(entry.url))
    waits = threading.Event()

    def tell(report: Progress) -> None:
        if report.activity == (
            "waiting for another process that downloads this image: another thread of this process"
        ):
            waits.set()

    with ThreadPoolExecutor(2) as threads:
        held_up = threads.submit(fetch_image, entry, server.source, image_dir)
        while server.path_of(entry.url) not in server.requests:
            time.sleep(0.01)
        assert fetch_image(other, server.source, image_dir).is_file()
        assert not held_up.done()
        waiting = threads.submit(fetch_image, entry, server.source, image_dir, on_progress=tell)
        assert waits.wait(60), "who waits for the same image is told so"
        server.stalled.clear()
        server.closing.set()
        assert held_up.result(60) == waiting.result(60)


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
    assert finished_files(image_dir) == []


def test_image_dir_that_is_a_file_is_told(
    server: ImageServer, entry: CatalogEntry, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OSError, match=str(file)):
        fetch_image(entry, server.source, file)
    assert file.read_text() == "mine"


def test_nothing_is_stored_at_first(server: ImageServer, image_dir: Path) -> None:
    assert find_stored(server.source, image_dir, Stream.RELEASED, "noble", False) is None
    assert (
        find_stored(server.source, image_dir / "missing", Stream.RELEASED, "noble", False) is None
    )


def test_newest_stored_image_is_found(server: ImageServer, image_dir: Path) -> None:
    for serial in ("20260930.2", "20260930.10", "20260101"):
        entry = server.add_image(Stream.RELEASED, "noble", serial)
        fetch_image(entry, server.source, image_dir)
    server.requests.clear()
    newest = image_dir / "24.04/20260930.10/ubuntu-24.04-server-cloudimg-amd64.img"
    assert find_stored(server.source, image_dir, Stream.RELEASED, "noble", False) == newest
    assert find_stored(server.source, image_dir, Stream.RELEASED, "24.04", False) == newest
    assert server.requests == []


def test_stored_image_of_another_kind_is_not_found(server: ImageServer, image_dir: Path) -> None:
    released = server.add_image(Stream.RELEASED, "noble", "20240821")
    daily_minimal = server.add_image(Stream.DAILY, "jammy", "20240821", minimal=True)
    for entry in (released, daily_minimal):
        fetch_image(entry, server.source, image_dir)
    assert find_stored(server.source, image_dir, Stream.DAILY, "noble", False) is None
    assert find_stored(server.source, image_dir, Stream.RELEASED, "noble", True) is None
    assert find_stored(server.source, image_dir, Stream.RELEASED, "jammy", False) is None
    assert find_stored(server.source, image_dir, Stream.DAILY, "jammy", False) is None
    found = find_stored(server.source, image_dir, Stream.DAILY, "jammy", True)
    assert found == image_path(daily_minimal, image_dir)


def test_stored_image_that_is_not_whole_is_not_found(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    image = fetch_image(entry, server.source, image_dir)
    os.truncate(image, entry.size - 1)
    assert find_stored(server.source, image_dir, Stream.RELEASED, "noble", False) is None
    image.unlink()
    assert find_stored(server.source, image_dir, Stream.RELEASED, "noble", False) is None


def test_stored_image_without_record_is_not_found(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    image = fetch_image(entry, server.source, image_dir)
    store.record_path(image).unlink()
    assert find_stored(server.source, image_dir, Stream.RELEASED, "noble", False) is None


def test_malformed_release_is_not_looked_for(server: ImageServer, image_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"Invalid release '\.\./x'"):
        find_stored(server.source, image_dir, Stream.RELEASED, "../x", False)


def test_deleted_image_is_gone_with_all_beside_it(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    store.delete(fetch_image(entry, server.source, image_dir), image_dir)
    assert list_files(image_dir) == ["24.04"]


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br", "deflate"])
def test_what_is_compressed_on_the_way_is_undone_within_bounds(
    encoding: str, server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    server.unasked_encoding = encoding
    catalog = server.catalog_path(Stream.RELEASED)
    message = server.files[catalog]
    server.files[catalog] = gzip.compress(message)
    if encoding == "gzip":
        assert find_entry(server.source, Stream.RELEASED, "noble") == entry
    else:
        with pytest.raises(ImageBuildError, match=f"has the encoding '{encoding}'"):
            find_entry(server.source, Stream.RELEASED, "noble")
    server.files[catalog] = gzip.compress(bytes(80 << 20))
    with pytest.raises(ImageBuildError, match=r"stands for more than|has the encoding"):
        find_entry(server.source, Stream.RELEASED, "noble")


def test_image_that_was_compressed_on_the_way_is_not_the_file_expected(
    server: ImageServer, entry: CatalogEntry, image_dir: Path
) -> None:
    path = server.path_of(entry.url)
    fetch_image(entry, server.source, image_dir).unlink()
    server.unasked_encoding = "gzip"
    server.files[path] = gzip.compress(bytes(entry.size))
    for name in ("SHA256SUMS", "SHA256SUMS.gpg"):
        sums = boot_file_path(server, entry, name)
        server.files[sums] = gzip.compress(server.files[sums])
    with pytest.raises((ImageBuildError, ImageVerificationError)):
        fetch_image(entry, server.source, image_dir)
