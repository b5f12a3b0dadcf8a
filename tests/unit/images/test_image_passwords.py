"""The password of a mirror, or of a proxy, is sent to it, and is seen nowhere else."""

from __future__ import annotations

import datetime
import http.server
import ipaddress
import logging
import ssl
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pycloudlib import Qemu
from pycloudlib.cli import hostfacts
from pycloudlib.errors import ImageBuildError, PycloudlibException
from pycloudlib.images.catalog import find_entry
from pycloudlib.images.download import fetch_bytes, open_client
from pycloudlib.images.recipe import BuildRecipe
from pycloudlib.images.source import ImageSource, Stream
from pycloudlib.qemu.imageshelf import ImageShelf
from pycloudlib.qemu.launching.warmcache import WarmCache
from tests.unit.imageserver import (
    QUICK,
    ImageServer,
    SigningKey,
    forget_proxies,
    make_cloud,
    running_image_server,
)

SERIAL = "20240821"
PASSWORD = "Secr3t/p@ss word"
QUOTED = "Secr3t%2Fp%40ss%20word"
PARTS = ("Secr3t", "p@ss", "p%40ss")


@pytest.fixture
def mirror(server: ImageServer) -> ImageServer:
    """Give a server that asks for a password."""
    for stream in Stream:
        server.add_image(stream, "noble", SERIAL, aliases="lts")
    server.login = f"me:{PASSWORD}"
    return server


@pytest.fixture
def cloud(mirror: ImageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Qemu:
    for name in ("images", "work", "project"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "project")
    address = mirror.url
    mirror.url = address.replace("http://", f"http://me:{QUOTED}@")
    try:
        return make_cloud(mirror, tmp_path / "images")
    finally:
        mirror.url = address


def fail(cloud: Qemu, release: str) -> str:
    """Ask for an image that cannot be had; give all that is told of it."""
    with pytest.raises(PycloudlibException) as failure:
        cloud.daily_image(release)
    return "".join(traceback.format_exception(failure.value))


def test_password_of_the_mirror_is_seen_nowhere(
    cloud: Qemu, mirror: ImageServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = []
    for name in ("httpx", "httpcore"):
        caplog.set_level(logging.DEBUG, name)
    with caplog.at_level(logging.DEBUG):
        cloud.released_image("noble")
        cloud.lock_image("lts")
        cloud.lock_image("noble", daily=True)
        cloud.daily_image("noble")
        told.append(fail(cloud, "jammy"))
        mirror.files[mirror.catalog_path(Stream.DAILY)] = b"unsigned"
        told.append(fail(cloud, "jammy"))
        mirror.files.clear()
        told.append(fail(cloud, "jammy"))
        mirror.login = "another"
        told.append(fail(cloud, "jammy"))
    assert f"me:{PASSWORD}" in mirror.logins, "the server was told"
    assert "HTTP Request: GET http://127.0.0.1" in caplog.text, "the library logs its requests"
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".asc"]
    assert {path.name for path in files} >= {
        "pycloudlib.lock",
        "noble-server-cloudimg-amd64.img.json",
    }
    shelf = ImageShelf(cloud.settings, WarmCache(tmp_path, 0), [])
    told += [caplog.text, repr(cloud.settings), repr(shelf.source)]
    told += [repr(image) for image in cloud.images()]
    told += [path.read_bytes().decode("latin-1") for path in files]
    assert [part for part in PARTS for text in told if part in text] == []


def test_password_that_makes_no_url_is_not_told(server: ImageServer) -> None:
    for mirror in ("http://me:Secr3t/p@ss@host", "http://me:Secr3t#@host", "ftp://me:Secr3t@host"):
        with pytest.raises(ValueError, match="Invalid image mirror") as failure:
            ImageSource(mirror)
        assert "Secr3t" not in str(failure.value)


def test_password_goes_to_no_other_server(
    mirror: ImageServer, key: SigningKey, tmp_path: Path
) -> None:
    address = mirror.url.replace("http://", f"http://me:{QUOTED}@")
    source = ImageSource(address, mirror.keyring)
    path = mirror.catalog_path(Stream.DAILY)
    (tmp_path / "other").mkdir()
    with running_image_server(key, tmp_path / "other") as other:
        other.files[path] = mirror.files[path]
        mirror.redirects[path] = other.url + path
        find_entry(source, Stream.DAILY, "noble")
        assert (mirror.logins, other.logins) == ([f"me:{PASSWORD}"], [""])
        with open_client(source.login) as client:
            fetch_bytes(client, other.url + path)
        assert other.logins == ["", ""]


@pytest.mark.parametrize(
    "proxy",
    ["http://me:Secr3t#x@proxy:3128", "foo://me:Secr3t@proxy:3128", "http://me:Secr3t@proxy:port"],
)
def test_password_of_a_proxy_is_not_told(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_proxies(monkeypatch)
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(ImageBuildError, match="https=") as failure, open_client():
        pass
    assert "Secr3t" not in "".join(traceback.format_exception(failure.value))
    assert "proxy:" in str(failure.value)


def test_password_of_a_proxy_that_refuses_is_not_told(
    mirror: ImageServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("http_proxy", f"http://me:{QUOTED}@{mirror.url.removeprefix('http://')}")
    source = ImageSource("http://images.example.com", mirror.keyring)
    with caplog.at_level(logging.DEBUG), pytest.raises(ImageBuildError) as failure:
        find_entry(source, Stream.DAILY, "noble")
    told = caplog.text + "".join(traceback.format_exception(failure.value))
    assert mirror.requests, "the proxy was asked"
    assert [part for part in PARTS if part in told] == []


def test_password_is_not_in_what_the_doctor_says(
    mirror: ImageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = mirror.url.replace("http://", f"http://me:{QUOTED}@")
    config = tmp_path / "config.toml"
    config.write_text(f'[qemu]\nimage_mirror = "{address}"\nqemu_binary = "no-such-qemu"\n')
    monkeypatch.setenv("PYCLOUDLIB_CONFIG", str(config))
    facts = hostfacts.collect()
    assert facts.server == mirror.url
    assert facts.server_problem, "it answers no HEAD"
    assert [part for part in PARTS if part in repr(facts)] == []


def test_mirror_of_packages_has_no_password() -> None:
    with pytest.raises(ValueError, match="name or a password for http://host/debian") as failure:
        BuildRecipe(mirror="http://me:Secr3t@host/debian")
    assert "Secr3t" not in str(failure.value)


# -- redirects ------------------------------------------------------------------------------------


class _Redirecting(http.server.BaseHTTPRequestHandler):
    target = ""

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.target)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def https_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Give the port of a server with TLS that sends everybody on."""
    secret = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(secret.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(secret, hashes.SHA256())
    )
    pem = tmp_path / "server.pem"
    pem.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + secret.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Redirecting)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_redirect_from_https_to_http_is_not_followed(
    https_port: int, server: ImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/x"] = b"content"
    monkeypatch.setattr(_Redirecting, "target", f"{server.url}/x")
    with (
        open_client() as client,
        pytest.raises(ImageBuildError, match=f"sends on to {server.url}/x, which is not https"),
    ):
        fetch_bytes(client, f"https://127.0.0.1:{https_port}/x")
    assert server.requests == []


def test_redirect_to_what_is_no_http_is_not_followed(server: ImageServer) -> None:
    server.redirects["/x"] = "file:///etc/hostname"
    with open_client(limits=QUICK) as client, pytest.raises(ImageBuildError):
        fetch_bytes(client, f"{server.url}/x")
