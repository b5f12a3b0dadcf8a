"""An image server of our own on the loopback: Ubuntu's layout, signed with a key made here."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import http.server
import io
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pycloudlib import Qemu
from pycloudlib.images import store
from pycloudlib.images.catalog import CatalogEntry
from pycloudlib.images.download import Limits
from pycloudlib.images.source import ImageSource, Stream

# Nobody waits before trying again.
QUICK = Limits(pauses=(0, 0, 0, 0))
VERSIONS = {"noble": "24.04", "jammy": "22.04", "focal": "20.04"}


class SigningKey:
    """An OpenPGP key pair in a GnuPG home of its own."""

    def __init__(self, home: Path, *, faked_time: str = "", expires: str = "never") -> None:
        self._home = home
        self._options = ["--faked-system-time", faked_time] if faked_time else []
        user = "Image Server <images@example.com>"
        self._gpg("--quick-generate-key", user, "ed25519", "sign", expires)
        self.armored = self._gpg("--armor", "--export")
        self.binary = self._gpg("--export")

    def move_clock(self, time: str) -> None:
        """Sign at another time from now on, such as "20240901T000000!"."""
        self._options = ["--faked-system-time", time]

    def sign_clear(self, text: bytes) -> bytes:
        return self._gpg("--clearsign", stdin=text)

    def sign_detached(self, content: bytes) -> bytes:
        return self._gpg("--armor", "--detach-sign", stdin=content)

    def sign_inline(self, content: bytes) -> bytes:
        return self._gpg("--sign", stdin=content)

    def write_keyring(self, path: Path) -> Path:
        path.write_bytes(self.armored)
        return path

    def _gpg(self, *arguments: str, stdin: bytes = b"") -> bytes:
        unattended = ["--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""]
        command = ["gpg", "--homedir", str(self._home), *unattended, *self._options, *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, check=True).stdout


@contextlib.contextmanager
def new_signing_key(*, faked_time: str = "", expires: str = "never") -> Iterator[SigningKey]:
    # Not pytest's directory: the agent's socket is made here, and its path has to be short.
    with tempfile.TemporaryDirectory(prefix="gpg-", ignore_cleanup_errors=True) as name:
        try:
            yield SigningKey(Path(name), faked_time=faked_time, expires=expires)
        finally:
            subprocess.run(["gpgconf", "--homedir", name, "--kill", "all"], check=False)


@dataclass
class ImageServer:
    """What is served, and what was asked for.

    Attributes:
        key: Signs what is published.
        keyring: A file with the public half of the key.
        files: Content by path; tests put other content in to spoil it.
        requests: The paths asked for so far.
        cut_short: Paths whose body ends early, though its length was announced.
        cut_silently: Paths whose body ends early, its length not announced.
        redirects: Other URLs, by path.
        failures: Statuses to answer with, by path; each is used up by one request.
        ranges: The ranges asked for so far, by path.
        updated: When the catalogs say that they were made; empty when they do not.
        knows_versions: Whether it tells by which one finds that a file has not changed.
        changed: The date on which its files were changed, in place of their versions.
        knows_ranges: Whether a part of a file is sent where one is asked for.
        stalled: Paths that are never answered.
        login: What everybody has to log in with, as "name:password"; empty for nothing.
        logins: What was tried so far, for each request; empty where nothing was.
        unasked_encoding: An encoding in which it sends everything, whatever is asked for.
    """

    url: str
    key: SigningKey
    keyring: Path
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    cut_short: set[str] = field(default_factory=set)
    cut_silently: set[str] = field(default_factory=set)
    redirects: dict[str, str] = field(default_factory=dict)
    stalled: set[str] = field(default_factory=set)
    failures: dict[str, list[int]] = field(default_factory=dict)
    ranges: dict[str, list[str]] = field(default_factory=dict)
    knows_ranges: bool = True
    knows_versions: bool = True
    changed: str = ""
    updated: str = ""
    login: str = ""
    logins: list[str] = field(default_factory=list)
    unasked_encoding: str = ""
    closing: threading.Event = field(default_factory=threading.Event)
    _catalogs: dict[tuple[Stream, bool], dict[str, Any]] = field(default_factory=dict)

    @property
    def source(self) -> ImageSource:
        return ImageSource(mirror=self.url, keyring=self.keyring, limits=QUICK)

    def add_image(
        self,
        stream: Stream,
        release: str,
        serial: str,
        *,
        minimal: bool = False,
        label: str = "release",
        initrd: bool = True,
        aliases: str = "",
        built: Path | None = None,
    ) -> CatalogEntry:
        """Publish a build: image, kernel, initrd, checksums and catalog.

        Without an image that was built, its files hold nothing that could boot.
        """
        variant = "minimal" if minimal else "server"
        version = VERSIONS[release]
        if stream is Stream.RELEASED:
            name = f"ubuntu-{version}-{variant}-cloudimg-amd64"
            path = f"server/releases/{release}/release-{serial}/{name}.img"
        else:
            name = f"{release}-{variant}-cloudimg-amd64"
            path = f"server/{release}/{serial}/{name}.img"
        base = self.base_path(stream, minimal=minimal)
        directory = (base + path).rpartition("/")[0]
        content = f"image {path} ".encode() * 50_000
        boot_files = {f"{name}-vmlinuz-generic": f"kernel of {path}".encode() * 1000}
        if built is not None:
            content = built.read_bytes()
            boot_files = {
                f"{name}-vmlinuz-generic": store.kernel_path(built).read_bytes(),
                f"{name}-initrd-generic": store.initrd_path(built).read_bytes(),
            }
        elif initrd:
            boot_files[f"{name}-initrd-generic"] = f"initrd of {path}".encode() * 2000
        self.files[base + path] = content
        self.files |= {f"{directory}/unpacked/{file}": data for file, data in boot_files.items()}
        self.sign_sums(f"{directory}/unpacked", boot_files)
        entry = CatalogEntry(
            release=release,
            version=version,
            serial=serial,
            url=f"{self.url}{base}{path}",
            sha256=hashlib.sha256(content).hexdigest(),
            size=len(content),
            stream=stream,
            minimal=minimal,
            aliases=tuple(filter(None, aliases.split(","))),
        )
        self._add_to_catalog(entry, path, label)
        return entry

    def forget_aliases(self, stream: Stream, release: str) -> None:
        """Let the catalog call a release by no other names any more."""
        products = self._catalogs[stream, False]
        products[f"com.ubuntu.cloud:server:{VERSIONS[release]}:amd64"]["aliases"] = ""
        self._sign_products(stream, minimal=False)

    def sign_again(self, stream: Stream, release: str, serial: str, content: bytes) -> None:
        """Let the catalog have another image for a build."""
        product = self._catalogs[stream, False][
            f"com.ubuntu.cloud:server:{VERSIONS[release]}:amd64"
        ]
        disk = product["versions"][serial]["items"]["disk1.img"]
        disk |= {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        self._sign_products(stream, minimal=False)

    def sign_sums(self, directory: str, files: dict[str, bytes]) -> None:
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        sums = "".join(f"{digest} *{name}\n" for name, digest in digests.items()).encode()
        self.files[f"{directory}/SHA256SUMS"] = sums
        self.files[f"{directory}/SHA256SUMS.gpg"] = self.key.sign_detached(sums)

    def sign_catalog(self, stream: Stream, text: bytes, *, minimal: bool = False) -> None:
        path = self.catalog_path(stream, minimal=minimal)
        self.files[path] = self.key.sign_clear(text)
        self.files[path.replace(".sjson", ".json")] = text

    def path_of(self, url: str) -> str:
        return url.removeprefix(self.url)

    @staticmethod
    def base_path(stream: Stream, *, minimal: bool = False) -> str:
        variant = "/minimal" if minimal else ""
        return f"{variant}/{'releases' if stream is Stream.RELEASED else 'daily'}/"

    @classmethod
    def catalog_path(cls, stream: Stream, *, minimal: bool = False) -> str:
        base = cls.base_path(stream, minimal=minimal)
        return f"{base}streams/v1/com.ubuntu.cloud:{stream.value}:download.sjson"

    def _add_to_catalog(self, entry: CatalogEntry, path: str, label: str) -> None:
        products = self._catalogs.setdefault((entry.stream, entry.minimal), {})
        product = products.setdefault(
            f"com.ubuntu.cloud:server:{entry.version}:amd64",
            {
                "arch": "amd64",
                "release": entry.release,
                "version": entry.version,
                "versions": {},
            },
        )
        disk = {"ftype": "disk1.img", "path": path, "sha256": entry.sha256, "size": entry.size}
        other = {"ftype": "manifest", "path": f"{path}.manifest", "size": 9995}
        items = {"disk1.img": disk, "manifest": other}
        product["versions"][entry.serial] = {"items": items, "label": label}
        product["aliases"] = ",".join(entry.aliases)
        self._sign_products(entry.stream, minimal=entry.minimal)

    def _sign_products(self, stream: Stream, *, minimal: bool) -> None:
        document = {"format": "products:1.0", "products": self._catalogs[stream, minimal]}
        if self.updated:
            document["updated"] = self.updated
        text = json.dumps(document, indent=1).encode()
        self.sign_catalog(stream, text, minimal=minimal)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, served: ImageServer, *arguments: Any) -> None:
        self._served = served
        super().__init__(*arguments)

    def do_GET(self) -> None:
        served = self._served
        served.requests.append(self.path)
        tried = self.headers.get("Authorization", "").removeprefix("Basic ")
        served.logins.append(base64.b64decode(tried).decode())
        if served.logins[-1] != served.login and served.login:
            self._start(401, 0)
        elif self.path in served.stalled:
            served.closing.wait()
            self.close_connection = True
        elif served.failures.get(self.path):
            self._start(served.failures[self.path].pop(0), 0)
        elif self.path in served.redirects:
            self._start(302, 0, ("Location", served.redirects[self.path]))
        elif self.path not in served.files:
            self._start(404, 0)
        elif self.path in served.cut_silently:
            self._start(200, None)
            self._send_half(served.files[self.path])
        elif self._is_known():
            self._start(304, 0)
        else:
            content = self._start_range(served.files[self.path])
            if self.path in served.cut_short:
                self._send_half(content)
            else:
                self.wfile.write(content)

    def _start_range(self, content: bytes) -> bytes:
        """Begin the answer with a file, or with the part of it that is asked for; give that."""
        asked = self.headers.get("Range", "")
        if not asked or not self._served.knows_ranges:
            self._start(200, len(content))
            return content
        self._served.ranges.setdefault(self.path, []).append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(content):
            self._start(416, 0)
            return b""
        told = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._start(206, len(content) - start, ("Content-Range", told))
        return content[start:]

    def _start(self, status: int, length: int | None, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if status == 200 and self._served.changed:
            self.send_header("Last-Modified", self._served.changed)
        elif status == 200 and self._served.knows_versions:
            self.send_header("ETag", self._version())
        if status == 200 and self._served.unasked_encoding:
            self.send_header("Content-Encoding", self._served.unasked_encoding)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _is_known(self) -> bool:
        if self._served.changed:
            return self.headers.get("If-Modified-Since") == self._served.changed
        return self._served.knows_versions and self.headers.get("If-None-Match") == self._version()

    def _version(self) -> str:
        return f'"{hashlib.sha256(self._served.files[self.path]).hexdigest()}"'

    def _send_half(self, content: bytes) -> None:
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _HttpServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that goes away in the middle is what some tests are about."""


@contextlib.contextmanager
def running_image_server(key: SigningKey, directory: Path) -> Iterator[ImageServer]:
    """Serve images signed with a key; `directory` gets the keyring."""
    keyring = key.write_keyring(directory / "keyring.asc")
    served = ImageServer(url="", key=key, keyring=keyring)
    server = _HttpServer(("127.0.0.1", 0), functools.partial(_Handler, served))
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        served.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


def make_cloud(server: ImageServer, image_dir: Path, more: str = "") -> Qemu:
    """Make a cloud that has its images from a server, and works beside `image_dir`."""
    config = f"""[qemu]
image_mirror = "{server.url}"
image_keyring = "{server.keyring}"
image_dir = "{image_dir}"
working_dir = "{image_dir.parent / "work"}"
{more}
"""
    return Qemu("images", config_file=io.StringIO(config))


def list_files(directory: Path) -> list[str]:
    """Everything below a directory, temporary files included."""
    return sorted(
        os.path.relpath(Path(parent) / name, directory)
        for parent, directories, names in os.walk(directory)
        for name in (*directories, *names)
    )


def forget_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a proxy of the host out of the tests."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
