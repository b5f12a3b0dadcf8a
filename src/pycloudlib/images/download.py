"""Bytes from an image server: streamed, limited, verified while they come.

This is the only module that speaks HTTP, and the one place where the HTTP library's exceptions
become this package's.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

from pycloudlib._version import __version__
from pycloudlib.errors import ImageBuildError, ImageVerificationError
from pycloudlib.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    import httpx

# Each wait for the server, not the whole transfer: an image may take as long as its line needs.
_TIMEOUT = 30.0

_CHUNK = 256 * 1024

# A server that never stops sending must fill neither the memory nor the disk. The largest
# stream is several MB; no kernel or initrd comes near the other.
_TEXT_LIMIT = 64 * 1024**2
_FILE_LIMIT = 4 * 1024**3


@dataclass(frozen=True, slots=True)
class Digest:
    """What a file has to be.

    Attributes:
        sha256: Its SHA-256 in lower-case hexadecimal.
        size: Its length in bytes; None when the publisher tells only the checksum.
    """

    sha256: str
    size: int | None = None

    def matches(self, path: Path) -> bool:
        """Whether a file is there and has this content; reads all of it."""
        if not path.is_file() or self.size not in (None, path.stat().st_size):
            return False
        with path.open("rb") as file:
            return _hash_file(file) == self.sha256


def shown_url(url: str) -> str:
    """Give a URL as it may be shown and stored: without the password it may carry."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


@contextlib.contextmanager
def open_client() -> Iterator[httpx.Client]:
    """Open the HTTP client that the other functions take; it reuses its connections.

    Proxies come from the environment (`HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY` …).

    Raises:
        ImageBuildError: The environment's proxy or certificate settings cannot be used.
    """
    import httpx  # noqa: PLC0415 - heavy

    try:
        client = httpx.Client(
            timeout=_TIMEOUT,
            follow_redirects=True,
            headers={"User-Agent": f"pycloudlib/{__version__}"},
        )
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        raise ImageBuildError(
            f"Downloading is not possible with the proxy and certificate settings of the "
            f"environment (HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE …): {error}"
        ) from error
    with client:
        yield client


def fetch_bytes(client: httpx.Client, url: str) -> bytes:
    """Download a small file: a catalog, a list of checksums, a signature.

    Raises:
        ImageBuildError: It could not be downloaded whole.
    """
    content = bytearray()
    with _open_response(client, url) as response:
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) > _TEXT_LIMIT:
                raise ImageBuildError(
                    f"{shown_url(url)} is longer than the {_TEXT_LIMIT} bytes expected at most"
                )
    return bytes(content)


def download_file(
    client: httpx.Client,
    url: str,
    target: Path,
    expected: Digest,
    *,
    on_progress: ProgressCallback,
) -> None:
    """Download a file and verify it while it comes.

    The file is written to the very path given, where wrong bytes stay behind on failure: give
    a temporary one, as `replace_atomically` makes it.

    Args:
        client: From `open_client`.
        url: What to download.
        target: A new file.
        expected: What its content has to be.
        on_progress: Told of each piece, in bytes.

    Raises:
        ImageBuildError: It could not be downloaded whole, or not be written.
        ImageVerificationError: What came is not what was expected.
    """
    # Compressed on the way, neither the length nor a part of the file could be told.
    plain = {"Accept-Encoding": "identity"}
    with _open_response(client, url, plain) as response, target.open("xb") as file:
        chunks = _report_chunks(response, expected.size, on_progress)
        received = _write_hashed(chunks, file, url, expected)
    if received != Digest(expected.sha256, expected.size or received.size):
        raise ImageVerificationError(
            f"{shown_url(url)} is not the file expected: received {received.size} bytes "
            f"with SHA-256 {received.sha256}, expected {_describe(expected)}"
        )


@contextlib.contextmanager
def _open_response(
    client: httpx.Client, url: str, headers: dict[str, str] | None = None
) -> Iterator[httpx.Response]:
    import httpx  # noqa: PLC0415 - heavy

    try:
        with client.stream("GET", url, headers=headers) as response:
            if response.status_code != httpx.codes.OK:
                raise ImageBuildError(
                    f"Downloading {shown_url(url)} failed: the server answered "
                    f"{response.status_code} {response.reason_phrase}, expected 200 OK"
                )
            yield response
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ImageBuildError(
            f"Downloading {shown_url(url)} failed: {type(error).__name__}: {error}"
        ) from error


def _report_chunks(
    response: httpx.Response, size: int | None, on_progress: ProgressCallback
) -> Iterator[bytes]:
    name = response.url.path.rpartition("/")[2]
    announced = response.headers.get("Content-Length", "")
    total = size or (int(announced) if announced.isdecimal() else None)
    done = 0
    for chunk in response.iter_bytes(_CHUNK):
        done += len(chunk)
        yield chunk
        on_progress(Progress("downloading", name, done, total, "B"))


def _write_hashed(chunks: Iterator[bytes], file: IO[bytes], url: str, expected: Digest) -> Digest:
    """Write what comes, no more of it than is expected; give what it was."""
    limit = expected.size or _FILE_LIMIT
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise ImageVerificationError(
                f"{shown_url(url)} is longer than expected: {_describe(expected)}"
            )
        digest.update(chunk)
        try:
            file.write(chunk)
        except OSError as error:
            raise ImageBuildError(
                f"Downloading {shown_url(url)} failed: {file.name} cannot be written "
                f"after {size - len(chunk)} bytes: {error.strerror}"
            ) from error
    return Digest(digest.hexdigest(), size)


def _hash_file(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _describe(expected: Digest) -> str:
    size = f"at most {_FILE_LIMIT}" if expected.size is None else str(expected.size)
    return f"{size} bytes with SHA-256 {expected.sha256}"
