"""Whatever an image server, a host program or a file beside an image says is used or refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pycloudlib import Qemu
from pycloudlib.errors import ImageVerificationError
from pycloudlib.images import catalog, store
from pycloudlib.images.catalog import (
    CachedCatalog,
    CatalogEntry,
    find_entry,
    is_usable,
    parse_catalog,
)
from pycloudlib.images.download import Version, shown_url
from pycloudlib.images.lookup import ImageLock
from pycloudlib.images.releases import find_stored, find_unverified
from pycloudlib.images.source import (
    ImageSource,
    Stream,
    dearmor_keys,
    load_trusted_keys,
    parse_sums,
)
from pycloudlib.images.store import ImageRecord
from pycloudlib.qemu.disk import diskimage
from tests.unit.hostile import PLAIN, STRANGE, TOO_DEEP, damaged, damaged_json, put
from tests.unit.imageserver import ImageServer, SigningKey

SHA256 = "0123456789abcdef" * 4
SOURCE = ImageSource("http://server")
ENTRY = CatalogEntry(
    "noble",
    "24.04",
    "20240821",
    "http://server/releases/ubuntu-24.04-server-cloudimg-amd64.img",
    SHA256,
    1000,
    Stream.RELEASED,
    False,
)
DISK = {
    "ftype": "disk1.img",
    "path": "x/ubuntu-24.04-server-cloudimg-amd64.img",
    "sha256": SHA256,
    "size": 5,
}
CATALOG = {
    "updated": "Wed, 21 Aug 2024 10:00:00 +0000",
    "products": {
        "a": {
            "arch": "amd64",
            "release": "noble",
            "version": "24.04",
            "aliases": "lts,n",
            "versions": {"20240821": {"label": "release", "items": {"disk1.img": DISK}}},
        }
    },
}
CATALOG_TEXT = json.dumps(CATALOG).encode()


@given(damaged_json(CATALOG_TEXT))
@example(b"[" * TOO_DEEP)
@example(CATALOG_TEXT.replace(b'"size": 5', b'"size": true'))
def test_catalog_is_read_or_refused(text: bytes) -> None:
    try:
        entries = parse_catalog(text, SOURCE, Stream.RELEASED, minimal=False)
    except ImageVerificationError as error:
        assert "http://server/releases/streams/v1/" in str(error)
    else:
        assert all(is_usable(entry) and type(entry.size) is int for entry in entries)


@pytest.fixture
def published(server: ImageServer, tmp_path: Path) -> ImageSource:
    server.add_image(Stream.DAILY, "noble", "20240821")
    cache = tmp_path / "catalogs"
    return dataclasses.replace(server.source, verified=False, cache_dir=cache)


def newest(source: ImageSource) -> str:
    return find_entry(source, Stream.DAILY, "noble").serial


@settings(max_examples=20)
@given(st.none() | st.integers(0, 500))
@example(20)
def test_catalog_that_was_damaged_where_it_is_kept_is_fetched_again(
    published: ImageSource, cut_off: int | None
) -> None:
    assert newest(published) == "20240821"
    assert published.cache_dir is not None
    (kept,) = published.cache_dir.iterdir()
    whole = kept.read_bytes()
    put(kept, None if cut_off is None else whole[: len(whole) - cut_off])
    assert newest(published) == "20240821"
    put(kept, whole)


@pytest.mark.parametrize("updated", [5, [], {}, "", " ", "x", "1 Jan 0001 00:00 +2359", "," * 50])
def test_catalog_may_say_anything_of_its_age(
    updated: object, server: ImageServer, published: ImageSource
) -> None:
    path = server.catalog_path(Stream.DAILY).replace("sjson", "json")
    for _ in range(2):
        document = json.loads(server.files[path])
        server.files[path] = json.dumps({**document, "updated": updated}).encode() + b" "
        assert newest(published) == "20240821"


@given(st.text(max_size=20) | st.sampled_from([5, None, [], "é", "a\nb", '"x"']), PLAIN)
def test_version_of_a_catalog_that_is_kept_may_be_anything(
    tmp_path: Path, etag: object, more: object
) -> None:
    url = "http://server/x"
    catalog.write(tmp_path, url, CachedCatalog(b"message", Version("etag")))
    (kept,) = tmp_path.glob("*.catalog")
    head = json.loads(kept.read_bytes().partition(b"\n")[0])
    for changed in (head | {"version": {"etag": etag}}, head | {"sha256": more}, more):
        put(kept, json.dumps(changed).encode() + b"\nmessage")
        read = catalog.read(tmp_path, url)
        assert read is None or isinstance(read.version.etag, str)


@given(st.binary(max_size=200), st.builds(Version, st.text(max_size=20), st.text(max_size=20)))
def test_catalog_is_kept_as_it_came(tmp_path: Path, message: bytes, version: Version) -> None:
    kept = CachedCatalog(message, version)
    catalog.write(tmp_path, "http://server/x", kept)
    assert catalog.read(tmp_path, "http://server/x") == kept


ENTRIES = st.builds(
    lambda release, day, size, stream: dataclasses.replace(
        ENTRY,
        release=release,
        serial=str(day),
        size=size,
        stream=stream,
        url="http://server/"
        + ("ubuntu-24.04" if stream is Stream.RELEASED else release)
        + "-server-cloudimg-amd64.img",
    ),
    st.sampled_from(["noble", "jammy", "focal"]),
    st.integers(10**7, 10**8 - 1),
    st.integers(1, 10**12),
    st.sampled_from(Stream),
)


@given(st.lists(ENTRIES, max_size=4, unique_by=lambda pin: (pin.stream, pin.release)))
def test_lock_is_read_back_as_it_was_written(tmp_path: Path, pins: list[CatalogEntry]) -> None:
    path = tmp_path / "pycloudlib.lock"
    ImageLock(path).write_with(pins)
    lock = ImageLock.read(path)
    assert set(lock.pins) == set(pins)
    text = path.read_bytes()
    lock.write_with(pins)
    assert path.read_bytes() == text


PLAIN_PIN = {
    "stream": "released",
    "release": "noble",
    "version": "24.04",
    "minimal": False,
    "serial": "20240821",
    "url": ENTRY.url,
    "sha256": SHA256,
    "size": 1000,
}
LOCK_TEXT = json.dumps({"version": 1, "images": [PLAIN_PIN]}).encode()


@given(damaged_json(LOCK_TEXT))
@example(b"[" * TOO_DEEP)
@example(b"\xe9")
@example(LOCK_TEXT.replace(b"http://server/", b"http://[/"))
@example(LOCK_TEXT.replace(b"1000", b"true"))
@example(LOCK_TEXT.replace(b"false", b'"yes"'))
@example(LOCK_TEXT.replace(b'"size"', b'"aliases": [["x"]], "size"'))
def test_lock_is_read_or_told_with_its_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pycloudlib.lock"
    put(path, content)
    try:
        lock = ImageLock.read(path)
    except ValueError as error:
        assert str(error).startswith(f"{path} is not a lock of images: ")
    else:
        lock.write_with(lock.pins)
        assert set(ImageLock.read(path).pins) == set(lock.pins)


def test_directory_in_place_of_a_lock_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a lock of images"):
        ImageLock.read(tmp_path)


RECORD = ImageRecord(
    "noble", "20240821", SHA256, 5, "http://server/x", "me", ("ubuntu",), ("noble", "24.04")
)
RECORDS = st.builds(
    ImageRecord,
    st.text(),
    st.text(),
    st.text(),
    st.integers(0),
    st.text(),
    st.text(),
    st.lists(st.text()).map(tuple),
)
RECORD_TEXT = json.dumps(dataclasses.asdict(RECORD)).encode()


@given(RECORDS)
def test_record_is_read_back_as_it_was_written(tmp_path: Path, record: ImageRecord) -> None:
    image = tmp_path / "x.img"
    image.touch(mode=0o600)
    store.write_record(image, record)
    assert store.find_record(image) == record
    assert store.record_path(image).stat().st_mode & 0o777 == 0o600


@pytest.fixture
def make_cloud(tmp_path: Path) -> Callable[[], Qemu]:
    (tmp_path / "work").mkdir()
    (tmp_path / "qemu").touch(mode=0o755)
    config = tmp_path / "config.toml"
    config.write_text(
        f"[qemu]\nqemu_binary = '{tmp_path}/qemu'\nimage_dir = '{tmp_path}/images'\n"
        f"working_dir = '{tmp_path}/work'\n"
    )

    def make() -> Qemu:
        for serial in ("20240821", "20240822", "20240823"):
            directory = tmp_path / "images" / "24.04" / serial
            directory.mkdir(parents=True, exist_ok=True)
            image = directory / "ubuntu-24.04-server-cloudimg-amd64.img"
            image.write_bytes(b"image")
            record = RECORD_TEXT.replace(b"20240821", serial.encode())
            put(store.record_path(image), record)
        return Qemu("t", timestamp_suffix=False, config_file=config)

    return make


@settings(max_examples=40)
@given(st.none() | damaged_json(RECORD_TEXT))
@example(None)
@example(b"[" * TOO_DEEP)
@example(RECORD_TEXT.replace(b'"20240821"', b"5"))
@example(RECORD_TEXT.replace(b": 5", b': "5"'))
def test_images_are_listed_beside_one_whose_record_is_damaged(
    tmp_path: Path, make_cloud: Callable[[], Qemu], content: bytes | None
) -> None:
    (tmp_path / "images").mkdir(exist_ok=True)
    cloud = make_cloud()
    broken = tmp_path / "images/24.04/20240821/ubuntu-24.04-server-cloudimg-amd64.img"
    put(store.record_path(broken), content)
    found = cloud.images()
    assert [image.serial for image in found] == ["20240823", "20240822", "20240821"]
    assert all(isinstance(image.size, int) for image in found)
    assert isinstance(cloud.image_serial(str(broken)), str)
    stored = find_stored(SOURCE, tmp_path / "images", Stream.RELEASED, "noble")
    assert stored is not None
    find_unverified(SOURCE, tmp_path / "images", Stream.RELEASED, "noble")
    assert "20240822" in "".join(cloud.prune_images())
    assert cloud.images()[0].serial == "20240823"


def test_damaged_record_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for content in (*STRANGE, None):
        caplog.clear()
        put(tmp_path / "x.img.json", content)
        assert store.find_record(tmp_path / "x.img") is None
        assert f"{tmp_path}/x.img.json is damaged" in caplog.text


SUMS = f"{SHA256} *a.img\n{SHA256}  b.img\n".encode()


@given(damaged(SUMS) | st.binary(max_size=100))
def test_sums_are_those_of_whole_lines(content: bytes) -> None:
    for name, sha256 in parse_sums(content).items():
        assert re.fullmatch(r"[0-9a-f]{64}", sha256)
        assert "/" not in name
    assert parse_sums(SUMS) == {"a.img": SHA256, "b.img": SHA256}


ARMOR = (
    b"-----BEGIN PGP PUBLIC KEY BLOCK-----\nComment: x\n\nAAAA\n=AAAA\n"
    b"-----END PGP PUBLIC KEY BLOCK-----\n"
)


@given(damaged(ARMOR) | damaged(ARMOR * 2) | st.binary(max_size=100))
def test_keyring_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keyring"
    put(path, content)
    try:
        assert load_trusted_keys(path).packets
    except ValueError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    "text",
    [
        b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n" * 8000,
        b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n" + b": " * 100_000,
        b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n" + b": \n" * 100_000,
        b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n" + b" \n" * 100_000,
        b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n" + b"A\n" * 100_000,
    ],
)
def test_keyring_without_an_end_takes_no_longer_than_its_length(text: bytes) -> None:
    begun = os.times().user
    assert dearmor_keys(text) == b""
    assert os.times().user - begun < 2


@given(
    st.text(max_size=40).filter(lambda text: "secret" not in text)
    | st.sampled_from(
        [
            "http://u:secret@[",
            "//u:secret@x",
            "http://u:secret@host:x",
            "http://u:x/secret@host",
            "http://u:x#secret@host",
            "http://u:x@secret@host",
            "u:secret@proxy:3128",
        ]
    )
)
def test_url_is_shown_whatever_it_is(url: str) -> None:
    assert "secret" not in shown_url(url)


INFO = {
    "virtual-size": 10,
    "cluster-size": 65536,
    "format-specific": {"type": "qcow2", "data": {"compat": "1.1"}},
}


@given(damaged_json(json.dumps(INFO).encode()) | damaged_json(b'{"image-end-offset": 5}'))
@example(b"[" * TOO_DEEP)
@example(json.dumps({**INFO, "format-specific": {"data": 5}}).encode())
@example(json.dumps({**INFO, "virtual-size": "10"}).encode())
@example(json.dumps({**INFO, "backing-filename": ["x"]}).encode())
def test_answer_of_qemu_img_is_read_or_refused(answer: bytes) -> None:
    assert diskimage.parse_info(json.dumps(INFO).encode()) == diskimage.ImageInfo(10, 65536, "")
    for parse in (diskimage.parse_info, diskimage.parse_end):
        try:
            parse(answer)
        except ValueError as error:
            assert str(error)


BOOT_SECTOR = bytes(510) + b"\x55\xaa"
GPT = BOOT_SECTOR + (b"EFI PART" + bytes(24) + (5).to_bytes(8, "little")).ljust(512, b"\0")


@given(damaged(GPT) | damaged(BOOT_SECTOR) | st.sampled_from(STRANGE))
@example(GPT[:530])
@example(GPT)
def test_raw_disk_is_whole_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "raw.img"
    put(path, content)
    try:
        image = diskimage.inspect_image(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert image == diskimage.BaseImage(path, "raw", len(content))


@given(st.binary(max_size=40) | damaged(b"QFI\xfb".ljust(40, b"\1")))
def test_layer_is_one_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "layer.qcow2"
    put(path, content)
    try:
        assert diskimage.inspect_image(path, tmp_path).format == "qcow2"
    except ValueError as error:
        assert str(path) in str(error)


def test_version_that_cannot_be_sent_back_is_not(
    server: ImageServer, key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_image(Stream.DAILY, "noble", "20240821")
    source = dataclasses.replace(server.source, cache_dir=tmp_path / "catalogs")
    kept: Any = catalog.read

    def read(directory: Path | None, url: str) -> CachedCatalog | None:
        found = kept(directory, url)
        return found and CachedCatalog(found.message, Version('"é"', "x\r\ny: z"))

    monkeypatch.setattr(catalog, "read", read)
    assert [newest(source), newest(source)] == ["20240821"] * 2
