from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pycloudlib.errors import ImageBuildError, ImageNotFoundError, ImageVerificationError
from pycloudlib.images import store
from pycloudlib.images.catalog import find_entry, parse_catalog
from pycloudlib.images.download import Limits
from pycloudlib.images.source import ImageSource, Stream
from tests.unit.imageserver import (
    QUICK,
    ImageServer,
)

SAMPLE = Path(__file__).parent / "data" / "released-download.json"
RELEASED = ImageServer.catalog_path(Stream.RELEASED)


def make_sample() -> dict[str, Any]:
    """Give the real sample with the paths put back that it lacks."""
    sample: dict[str, Any] = json.loads(SAMPLE.read_text())
    for product in sample["products"].values():
        for serial, build in product["versions"].items():
            directory = f"server/releases/noble/release-{serial}"
            name = "ubuntu-24.04-server-cloudimg-amd64.img"
            build["items"]["disk1.img"]["path"] = f"{directory}/{name}"
    return sample


def parse(document: object, stream: Stream = Stream.RELEASED, *, minimal: bool = False) -> Any:
    return parse_catalog(json.dumps(document).encode(), ImageSource(), stream, minimal=minimal)


def test_real_sample_is_parsed() -> None:
    entries = parse(make_sample())
    assert [entry.serial for entry in entries] == ["20240809", "20240821"]
    newest = entries[1]
    assert (newest.release, newest.version) == ("noble", "24.04")
    assert newest.sha256 == "0e25ca6ee9f08ec5d4f9910054b66ae7163c6152e81a3e67689d89bd6e4dfa69"
    assert newest.size == 586022912
    assert newest.url == (
        "https://cloud-images.ubuntu.com/releases/server/releases/noble/release-20240821/"
        "ubuntu-24.04-server-cloudimg-amd64.img"
    )


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("path", "/etc/ubuntu-24.04-server-cloudimg-amd64.img"),
        ("path", "../../ubuntu-24.04-server-cloudimg-amd64.img"),
        ("path", "server/ubuntu-24.04-server-cloudimg-arm64.img"),
        ("path", "server/ubuntu-22.04-server-cloudimg-amd64.img"),
        ("path", "server/ubuntu-24.04-minimal-cloudimg-amd64.img"),
        ("path", "server/noble-server-cloudimg-amd64.img"),
        ("sha256", "0e25"),
        ("size", "many"),
        ("size", 0),
    ],
)
def test_items_of_another_form_are_left_out(place: str, value: object) -> None:
    sample = make_sample()
    versions = sample["products"]["com.ubuntu.cloud:server:24.04:amd64"]["versions"]
    versions["20240821"]["items"]["disk1.img"][place] = value
    assert [entry.serial for entry in parse(sample)] == ["20240809"]


@pytest.mark.parametrize("missing", ["path", "sha256", "size"])
def test_items_that_lack_something_are_left_out(missing: str) -> None:
    sample = make_sample()
    versions = sample["products"]["com.ubuntu.cloud:server:24.04:amd64"]["versions"]
    del versions["20240821"]["items"]["disk1.img"][missing]
    assert [entry.serial for entry in parse(sample)] == ["20240809"]


@pytest.mark.parametrize(
    ("place", "value"),
    [("arch", "arm64"), ("release", "../noble"), ("version", "24.04/.."), ("version", "24.10")],
)
def test_products_of_another_form_are_left_out(place: str, value: str) -> None:
    sample = make_sample()
    sample["products"]["com.ubuntu.cloud:server:24.04:amd64"][place] = value
    assert parse(sample) == []


def test_serial_of_another_form_is_left_out() -> None:
    sample = make_sample()
    versions = sample["products"]["com.ubuntu.cloud:server:24.04:amd64"]["versions"]
    versions["../../evil"] = versions["20240821"]
    assert [entry.serial for entry in parse(sample)] == ["20240809", "20240821"]


def test_a_catalog_put_in_the_place_of_another_has_nothing_in_it() -> None:
    assert parse(make_sample(), Stream.DAILY) == []
    assert parse(make_sample(), minimal=True) == []


@pytest.mark.parametrize(
    "document", [[], {}, {"products": []}, {"products": {"p": {"arch": "amd64"}}}, None, 1]
)
def test_what_is_no_catalog_is_refused(document: object) -> None:
    with pytest.raises(ImageVerificationError, match=r"sjson is signed but is not a simplestreams"):
        parse(document)


def test_text_that_is_no_json_is_refused() -> None:
    with pytest.raises(ImageVerificationError):
        parse_catalog(b"\xff{", ImageSource(), Stream.RELEASED, minimal=False)


def test_images_of_older_releases_lose_their_suffix() -> None:
    sample = make_sample()
    product = sample["products"]["com.ubuntu.cloud:server:24.04:amd64"]
    product |= {"release": "xenial", "version": "16.04"}
    for build in product["versions"].values():
        build["items"]["disk1.img"]["path"] = "x/ubuntu-16.04-server-cloudimg-amd64-disk1.img"
    assert {entry.name for entry in parse(sample)} == {"ubuntu-16.04-server-cloudimg-amd64"}


def test_serials_sort_by_number() -> None:
    serials = ["20260930.10", "20260930", "20260930.2", "20251231.1"]
    assert sorted(serials, key=store.serial_order) == [
        "20251231.1",
        "20260930",
        "20260930.2",
        "20260930.10",
    ]


@pytest.mark.parametrize("minimal", [False, True])
@pytest.mark.parametrize("stream", list(Stream))
def test_newest_build_is_found_by_series_and_version(
    server: ImageServer, stream: Stream, minimal: bool
) -> None:
    server.add_image(stream, "noble", "20260930.2", minimal=minimal)
    newest = server.add_image(stream, "noble", "20260930.10", minimal=minimal)
    server.add_image(stream, "noble", "20260930", minimal=minimal)
    server.add_image(stream, "jammy", "20261001", minimal=minimal)
    assert find_entry(server.source, stream, "noble", minimal=minimal) == newest
    assert find_entry(server.source, stream, "24.04", minimal=minimal) == newest
    assert server.requests == [ImageServer.catalog_path(stream, minimal=minimal)] * 2


def test_alphas_and_betas_are_no_releases(server: ImageServer) -> None:
    final = server.add_image(Stream.RELEASED, "noble", "20240423")
    server.add_image(Stream.RELEASED, "noble", "20240424", label="beta1")
    assert find_entry(server.source, Stream.RELEASED, "noble") == final


def test_mirror_may_end_with_a_slash_and_have_a_path(server: ImageServer) -> None:
    server.add_image(Stream.RELEASED, "noble", "20240423")
    server.files = {f"/mirror/ubuntu{path}": data for path, data in server.files.items()}
    source = ImageSource(f"{server.url}/mirror/ubuntu/", server.keyring)
    entry = find_entry(source, Stream.RELEASED, "noble")
    assert server.path_of(entry.url) in server.files


@pytest.mark.parametrize(
    "release",
    [
        "",
        "Noble",
        "24",
        "24.04.1",
        "noble/../jammy",
        "*",
        "ubuntu:noble",
        "noble\n",
        "ubuntu 24.04",
    ],
)
def test_malformed_release_fails_before_any_network(server: ImageServer, release: str) -> None:
    with pytest.raises(ValueError, match="Invalid release") as caught:
        find_entry(server.source, Stream.RELEASED, release)
    assert repr(release) in str(caught.value)
    assert server.requests == []


def test_release_that_is_no_text_is_refused(server: ImageServer) -> None:
    with pytest.raises(ValueError, match=r"Invalid release 24\.04: expected"):
        find_entry(server.source, Stream.RELEASED, 24.04)  # type: ignore[arg-type]


@pytest.mark.parametrize("release", ["bookworm", "nobel", "23.04"])
def test_unknown_release_is_told_with_those_there_are(server: ImageServer, release: str) -> None:
    server.add_image(Stream.RELEASED, "focal", "20260101")
    server.add_image(Stream.RELEASED, "noble", "20260101")
    server.add_image(Stream.RELEASED, "jammy", "20260101")
    with pytest.raises(ImageNotFoundError) as caught:
        find_entry(server.source, Stream.RELEASED, release)
    assert str(caught.value) == (
        f"No released image of {release!r} in {server.url}{RELEASED}; "
        "it has noble (24.04), jammy (22.04), focal (20.04)"
    )
    assert caught.value.resource_name == release


@pytest.mark.parametrize("mirror", ["", "cloud-images.ubuntu.com", "ftp://host", "http://", "/srv"])
def test_mirror_that_is_no_url_is_refused(mirror: str) -> None:
    with pytest.raises(ValueError, match="Invalid image mirror"):
        ImageSource(mirror)


def test_wrong_keyring_fails_before_any_network(server: ImageServer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_entry(ImageSource(server.url, tmp_path / "nowhere"), Stream.RELEASED, "noble")
    assert server.requests == []


def test_changed_catalog_is_refused(server: ImageServer) -> None:
    entry = server.add_image(Stream.RELEASED, "noble", "20240423")
    forged = server.files[RELEASED].replace(entry.sha256.encode(), b"0" * 64)
    server.files[RELEASED] = forged
    with pytest.raises(ImageVerificationError, match=f"^{server.url}{RELEASED} has no good sig"):
        find_entry(server.source, Stream.RELEASED, "noble")


def test_only_the_signed_part_of_a_catalog_counts(server: ImageServer) -> None:
    entry = server.add_image(Stream.RELEASED, "noble", "20240423")
    forged = b'{"products": {}}\n'
    server.files[RELEASED] = forged + server.files[RELEASED] + forged
    assert find_entry(server.source, Stream.RELEASED, "noble") == entry


def test_catalog_of_a_stranger_is_refused(server: ImageServer) -> None:
    server.add_image(Stream.RELEASED, "noble", "20240423")
    with pytest.raises(ImageVerificationError, match="Ubuntu's cloud image keys"):
        find_entry(ImageSource(server.url), Stream.RELEASED, "noble")


def test_catalog_that_is_not_there_is_told(server: ImageServer) -> None:
    with pytest.raises(ImageBuildError, match=f"{server.url}{RELEASED} failed: .* 404 Not Found"):
        find_entry(server.source, Stream.RELEASED, "noble")


@pytest.mark.parametrize("cut", ["cut_short", "cut_silently"])
def test_truncated_catalog_is_refused(server: ImageServer, cut: str) -> None:
    server.add_image(Stream.RELEASED, "noble", "20240423")
    getattr(server, cut).add(RELEASED)
    with pytest.raises((ImageBuildError, ImageVerificationError), match=f"{server.url}{RELEASED}"):
        find_entry(server.source, Stream.RELEASED, "noble")


def test_endless_catalog_is_refused(server: ImageServer) -> None:
    server.add_image(Stream.RELEASED, "noble", "20240423")
    source = replace(server.source, limits=Limits(text_bytes=100))
    with pytest.raises(ImageBuildError, match="is longer than the 100 bytes"):
        find_entry(source, Stream.RELEASED, "noble")


def test_unreachable_server_is_told(server: ImageServer) -> None:
    with socket.socket() as reserved:
        # Bound but not listening: nobody else gets the port, and connecting is refused.
        reserved.bind(("127.0.0.1", 0))
        mirror = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(ImageBuildError, match=f"{mirror}{RELEASED} failed: ConnectError"):
            find_entry(replace(server.source, mirror=mirror), Stream.RELEASED, "noble")


def test_silent_server_is_told(server: ImageServer) -> None:
    source = replace(server.source, limits=replace(QUICK, timeout=0.2))
    server.stalled.add(RELEASED)
    with pytest.raises(ImageBuildError, match=f"{server.url}{RELEASED} failed: ReadTimeout"):
        find_entry(source, Stream.RELEASED, "noble")


def test_redirect_is_followed(server: ImageServer) -> None:
    entry = server.add_image(Stream.RELEASED, "noble", "20240423")
    server.files["/elsewhere"] = server.files.pop(RELEASED)
    server.redirects[RELEASED] = f"{server.url}/elsewhere"
    assert find_entry(server.source, Stream.RELEASED, "noble") == entry


def test_redirect_in_circles_is_told(server: ImageServer) -> None:
    server.redirects[RELEASED] = f"{server.url}{RELEASED}"
    with pytest.raises(ImageBuildError, match="TooManyRedirects"):
        find_entry(server.source, Stream.RELEASED, "noble")


def test_password_of_a_mirror_is_used_but_not_shown(server: ImageServer) -> None:
    mirror = server.url.replace("http://", "http://me:secret@")
    with pytest.raises(ImageBuildError) as caught:
        find_entry(ImageSource(mirror, server.keyring), Stream.RELEASED, "noble")
    assert "secret" not in str(caught.value)
    assert f"{server.url}{RELEASED}" in str(caught.value)


def test_proxy_of_the_environment_is_used(
    server: ImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = server.add_image(Stream.RELEASED, "noble", "20240423")
    monkeypatch.setenv("http_proxy", server.url)
    server.files[f"http://images.invalid{RELEASED}"] = server.files[RELEASED]
    source = ImageSource("http://images.invalid", server.keyring)
    assert find_entry(source, Stream.RELEASED, "noble").sha256 == entry.sha256


def test_proxy_that_cannot_be_used_is_told(
    server: ImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "nonsense://host")
    with pytest.raises(ImageBuildError, match=r"proxy .*nonsense"):
        find_entry(server.source, Stream.RELEASED, "noble")


def test_import_is_light() -> None:
    program = "import sys, pycloudlib.images.releases; sys.exit('httpx' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
