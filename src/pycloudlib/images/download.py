"""Downloads from an image server: streamed, limited, resumed, verified.

This is the only module that speaks HTTP, and the one place where the HTTP library's exceptions
become this package's.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit

from pycloudlib._base.documents import gunzip
from pycloudlib._base.files import hash_file, owner_opener
from pycloudlib._version import __version__
from pycloudlib.errors import ImageBuildError, ImageVerificationError
from pycloudlib.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    import httpx

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

_OK = 200
_PARTIAL_CONTENT = 206
_NOT_MODIFIED = 304
_TEMPORARY = (408, 416, 429)  # time-out, range not satisfiable, too many requests
_SERVER_ERRORS = 500
_SENDABLE = re.compile(r"[!-~]+( [!-~]+)*")  # of a header's value (RFC 9110, 5.5)
_UNUSABLE_SETTINGS = (
    "Downloading is not possible with the proxy and certificate settings of the environment "
    "(HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE …)"
)
_WAITING = Progress("waiting before the download is tried again")


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of downloads, so that no server fills the memory or the disk.

    The largest catalog has several MB; kernels and initrds are far smaller than the other limit.

    Attributes:
        timeout: Seconds for each wait for the server, not for the whole transfer.
        pauses: Seconds before each further try after a temporary failure.
        text_bytes: The largest small file: a catalog, a list of checksums, a signature.
        file_bytes: The largest file whose size no catalog names.
    """

    timeout: float = 30.0
    pauses: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    text_bytes: int = 64 * 1024**2
    file_bytes: int = 1024**3


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Digest:
    """The expected content of a file.

    Attributes:
        sha256: Its SHA-256 in lower-case hexadecimal.
        size: Its length in bytes; None if the publisher has only the checksum.
    """

    sha256: str
    size: int | None = None

    def matches(self, path: Path) -> bool:
        """Whether a file is there and has this content; reads all of it."""
        if not path.is_file() or self.size not in (None, path.stat().st_size):
            return False
        with path.open("rb") as file:
            return hash_file(file).hexdigest() == self.sha256


def shown_url(url: str) -> str:
    """Return a URL without name and password, to be shown and stored."""
    # A password may contain any character, "/" and "@" too: it ends at the last "@".
    start, at, rest = url.rpartition("@")
    return start.partition("//")[0] + "//" + rest if at and "//" in start else rest


@dataclass(frozen=True, slots=True)
class Login:
    """A name and a password for a server; they are sent to that server only.

    Attributes:
        url: The server.
        user: The name.
        password: The password; may be empty.
    """

    url: str
    user: str
    password: str = field(repr=False)

    def authorize(self, request: httpx.Request) -> httpx.Request:
        """Add name and password to a request, if it goes to the server."""
        import httpx  # noqa: PLC0415 - heavy

        server, asked = httpx.URL(self.url), request.url
        if (asked.scheme, asked.host, asked.port) == (server.scheme, server.host, server.port):
            pair = f"{self.user}:{self.password}".encode()
            request.headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
        return request


def split_login(url: str) -> tuple[str, Login | None]:
    """Split name and password off a valid URL, which can then be shown, logged and stored."""
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return url, None
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return plain, Login(plain, unquote(parts.username or ""), unquote(parts.password or ""))


@dataclass(frozen=True, slots=True)
class Client:
    """Connections to servers.

    Attributes:
        http: The HTTP client that opens them, and uses them again.
        limits: What is expected of the servers.
    """

    http: httpx.Client
    limits: Limits


@contextlib.contextmanager
def open_client(login: Login | None = None, limits: Limits = LIMITS) -> Iterator[Client]:
    """Open the client that the other functions take.

    Proxies come from the environment (`HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY` …). Redirects are
    followed, but not from https to http.

    Args:
        login: Name and password for a server that asks for them.
        limits: What is expected of the servers.

    Raises:
        ImageBuildError: The environment's proxy or certificate settings cannot be used.
    """
    from urllib.request import getproxies  # noqa: PLC0415 - heavy

    import httpx  # noqa: PLC0415 - heavy

    try:
        http = httpx.Client(
            timeout=limits.timeout,
            follow_redirects=True,
            event_hooks={"response": [_check_redirect]},
            headers={"User-Agent": f"pycloudlib/{__version__}"},
            auth=login.authorize if login else None,
        )
    except (ImportError, OSError) as error:
        raise ImageBuildError(f"{_UNUSABLE_SETTINGS}: {error}") from error
    except (ValueError, httpx.InvalidURL):
        # The library's text about a proxy's URL may contain a part of its password.
        proxies = (f"{name}={shown_url(value)}" for name, value in getproxies().items())
        raise ImageBuildError(
            f"{_UNUSABLE_SETTINGS}: one of the proxies has no URL that can be used "
            f"({', '.join(sorted(proxies))})"
        ) from None
    with http:
        yield Client(http, limits)


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a file, by which a server knows whether it has changed (RFC 9110, 8.8).

    Both are empty if the server names none.

    Attributes:
        etag: Its name for the content.
        last_modified: When it was changed, as the server wrote it.
    """

    etag: str = ""
    last_modified: str = ""


def fetch_bytes(client: Client, url: str) -> bytes:
    """Download a small file: a catalog, a list of checksums, a signature.

    Raises:
        ImageBuildError: It could not be downloaded whole.
    """
    content, _ = fetch_changed(client, url, Version())
    assert content is not None
    return content


def fetch_changed(client: Client, url: str, known: Version) -> tuple[bytes | None, Version]:
    """Download a small file unless it is still the known version.

    Returns:
        Its content, None when it has not changed; and its version.

    Raises:
        ImageBuildError: It could not be downloaded whole.
    """
    headers = {"If-None-Match": known.etag, "If-Modified-Since": known.last_modified}
    # A server may name its versions by something that cannot be sent back.
    asked = {name: value for name, value in headers.items() if _SENDABLE.fullmatch(value)}
    conditional = bool(asked)
    # Other encodings cannot be decoded within a limit.
    asked["Accept-Encoding"] = "gzip"
    most = client.limits.text_bytes

    def fetch() -> tuple[bytes | None, Version]:
        content = bytearray()
        with _open_response(client, url, asked) as response:
            if conditional and response.status_code == _NOT_MODIFIED:
                return None, known
            _check_status(response, url)
            for chunk in response.iter_raw():
                content += chunk
                if len(content) > most:
                    raise ImageBuildError(
                        f"{shown_url(url)} is longer than the {most} bytes expected at most"
                    )
            sent = response.headers
        text = _decode(bytes(content), sent.get("Content-Encoding", "identity"), url, most)
        return text, Version(sent.get("ETag", ""), sent.get("Last-Modified", ""))

    return _try_again(fetch, client.limits.pauses)


def _decode(content: bytes, encoding: str, url: str, most: int) -> bytes:
    try:
        if encoding == "identity":
            return content
        if encoding == "gzip":
            return gunzip(content, most)
        raise ValueError(f"has the encoding {encoding!r}, expected 'gzip' or none")
    except ValueError as error:
        raise ImageBuildError(f"{shown_url(url)} {error}") from error


def download_file(
    client: Client,
    url: str,
    partial: Path,
    expected: Digest,
    *,
    on_progress: ProgressCallback,
) -> None:
    """Download a file, or the rest of it, and verify it.

    The part that was received stays when the download ends early, interruptions included, and the
    next call resumes it. Wrong content is deleted.

    Args:
        client: From `open_client`.
        url: The URL.
        partial: The file to write; only for this very content.
        expected: Its content.
        on_progress: Called with each piece, in bytes.

    Raises:
        ImageBuildError: It could not be downloaded completely, or not be written.
        ImageVerificationError: The content is not the expected one.
    """
    with _open_partial(partial) as file:
        transfer = _Transfer(file, client, url, expected, on_progress)
        try:
            _try_again(transfer.resume, client.limits.pauses, lambda: on_progress(_WAITING))
            transfer.check()
        except ImageVerificationError:
            if not transfer.resumed:
                partial.unlink()
                raise
            # The part from before may be the wrong one.
            _log.info("%s: the part received before does not fit; starting again", partial)
            partial.unlink()
            download_file(client, url, partial, expected, on_progress=on_progress)
            return
        os.fsync(file.fileno())


def _open_partial(partial: Path) -> IO[bytes]:
    try:
        return open(partial, "ab+", opener=owner_opener)
    except PermissionError:
        # It belongs to another member of the group that shares the directory.
        partial.unlink()
        return open(partial, "ab+", opener=owner_opener)


class _Transfer:
    """A file that is being downloaded: the part that was received, and its digest.

    Attributes:
        resumed: Whether a part was received before.
    """

    def __init__(
        self,
        file: IO[bytes],
        client: Client,
        url: str,
        expected: Digest,
        on_progress: ProgressCallback,
    ) -> None:
        self._file = file
        self._client = client
        self._url = url
        self._expected = expected
        self._on_progress = on_progress
        self._limit = expected.size or client.limits.file_bytes
        file.seek(0)
        self._digest = hash_file(file)
        self._size = file.tell()
        if self._size > self._limit:
            self._restart()
        self.resumed = self._size > 0

    def resume(self) -> None:
        """Download what is missing.

        Raises:
            ImageBuildError: The download ended early.
            ImageVerificationError: The file is longer than expected.
        """
        if self._digest.hexdigest() == self._expected.sha256:
            return
        # With compression, neither the length nor a part of the file would be known.
        headers = {"Accept-Encoding": "identity"}
        if self._size:
            headers["Range"] = f"bytes={self._size}-"
        with _open_response(self._client, self._url, headers) as response:
            sent = response.headers.get("Content-Range", "")
            if response.status_code != _PARTIAL_CONTENT or not sent.startswith(
                f"bytes {self._size}-"
            ):
                if self._size:
                    self._restart()
                _check_status(response, self._url)
            self._take(response)
        if self._expected.size is not None and self._size < self._expected.size:
            raise _EndedEarlyError(
                f"Downloading {shown_url(self._url)} failed: it ended after {self._size} bytes, "
                f"expected {self._expected.size}"
            )

    def check(self) -> None:
        """Check that the content is what was expected.

        Raises:
            ImageVerificationError: It is not.
        """
        received = Digest(self._digest.hexdigest(), self._size)
        if received != Digest(self._expected.sha256, self._expected.size or self._size):
            raise ImageVerificationError(
                f"{shown_url(self._url)} is not the file expected: received {self._size} bytes "
                f"with SHA-256 {received.sha256}, expected {self._describe_expected()}"
            )

    def _describe_expected(self) -> str:
        size, sha256 = self._expected.size, self._expected.sha256
        length = f"at most {self._limit}" if size is None else str(size)
        return f"{length} bytes with SHA-256 {sha256}"

    def _restart(self) -> None:
        self.resumed = False
        self._file.truncate(0)
        self._digest, self._size = hashlib.sha256(), 0

    def _take(self, response: httpx.Response) -> None:
        name = response.url.path.rpartition("/")[2]
        announced = response.headers.get("Content-Length", "")
        rest = int(announced) if announced.isdecimal() else None
        total = self._expected.size or (None if rest is None else self._size + rest)
        # Raw: content that is compressed all the same is not the expected file.
        for chunk in response.iter_raw():
            if self._size + len(chunk) > self._limit:
                raise ImageVerificationError(
                    f"{shown_url(self._url)} is longer than expected: {self._describe_expected()}"
                )
            self._write(chunk)
            self._on_progress(Progress("downloading", name, self._size, total, "B"))

    def _write(self, chunk: bytes) -> None:
        try:
            self._file.write(chunk)
            # So that it is kept also when this process is killed.
            self._file.flush()
        except OSError as error:
            raise ImageBuildError(
                f"Downloading {shown_url(self._url)} failed: {self._file.name} cannot be written "
                f"after {self._size} bytes: {error.strerror}"
            ) from error
        self._digest.update(chunk)
        self._size += len(chunk)


class _EndedEarlyError(ImageBuildError):
    """A download that failed, and may succeed when it is tried again."""


def _try_again(
    work: Callable[[], _T], pauses: Iterable[float], on_wait: Callable[[], None] = lambda: None
) -> _T:
    """Run what depends on a server, and run it again after a while where that may help."""
    for pause in (*pauses, None):
        try:
            return work()
        except _EndedEarlyError as error:
            if pause is None:
                raise
            _log.info("%s; trying again in %.0f s", error, pause)
            on_wait()
            time.sleep(pause)
    raise AssertionError("unreachable: the last try returns or raises")


@contextlib.contextmanager
def _open_response(
    client: Client, url: str, headers: dict[str, str] | None = None
) -> Iterator[httpx.Response]:
    import httpx  # noqa: PLC0415 - heavy

    try:
        with client.http.stream("GET", url, headers=headers) as response:
            yield response
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        kind = _EndedEarlyError if isinstance(error, httpx.TransportError) else ImageBuildError
        raise kind(
            f"Downloading {shown_url(url)} failed: {type(error).__name__}: {error}"
        ) from error


def _check_redirect(response: httpx.Response) -> None:
    """Refuse a redirect from https to http, where others could read and change everything."""
    location = response.headers.get("Location", "")
    if response.has_redirect_location and response.request.url.scheme == "https":
        target = response.request.url.join(location)
        if target.scheme != "https":
            raise ImageBuildError(
                f"Downloading {shown_url(str(response.request.url))} failed: the server sends on "
                f"to {shown_url(str(target))}, which is not https"
            )


def _check_status(response: httpx.Response, url: str) -> None:
    status = response.status_code
    if status == _OK:
        return
    kind = _EndedEarlyError if status in _TEMPORARY or status >= _SERVER_ERRORS else ImageBuildError
    raise kind(
        f"Downloading {shown_url(url)} failed: the server answered {status} "
        f"{response.reason_phrase}, expected 200 OK"
    )
