"""What images there are: the signed catalogs that Ubuntu's image server publishes.

A catalog is a simplestreams document (`products:1.0`): a clear-signed JSON text of products,
each with its builds. The layout of the server is that of https://cloud-images.ubuntu.com, which
mirrors share.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pycloudlib.errors import ImageNotFoundError, ImageVerificationError
from pycloudlib.images import store
from pycloudlib.images.download import fetch_bytes, open_client, shown_url
from pycloudlib.images.signature import load_trusted_keys, verify_clearsigned

DEFAULT_MIRROR = "https://cloud-images.ubuntu.com"
ARCHITECTURE = "amd64"

# The forms that Ubuntu's names have; names of files and directories are made of them.
_SERIES = re.compile(r"[a-z]{2,32}")
_VERSION = re.compile(r"\d{1,2}\.\d{2}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PATH = re.compile(r"(?!/)(?!.*\.\.)[A-Za-z0-9._/+~-]+")


class Stream(enum.Enum):
    """The two lines of builds."""

    RELEASED = "released"
    DAILY = "daily"

    @property
    def directory(self) -> str:
        """Its directory on the server."""
        return "releases" if self is Stream.RELEASED else "daily"

    @property
    def content_id(self) -> str:
        """The name of its catalog."""
        return f"com.ubuntu.cloud:{self.value}:download"


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where images come from and whom to believe.

    Attributes:
        mirror: Base URL of a server laid out like cloud-images.ubuntu.com.
        keyring: File of the public keys to trust, armored or binary; None for Ubuntu's own.

    Raises:
        ValueError: The mirror is not an HTTP URL.
    """

    mirror: str = DEFAULT_MIRROR
    keyring: Path | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.mirror)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"Invalid image mirror {shown_url(self.mirror)!r}: expected a URL such as "
                f"{DEFAULT_MIRROR!r}"
            )

    def base_url(self, stream: Stream, *, minimal: bool) -> str:
        """Name the directory to which the paths in a catalog are relative."""
        variant = "minimal/" if minimal else ""
        return f"{self.mirror.rstrip('/')}/{variant}{stream.directory}/"

    def catalog_url(self, stream: Stream, *, minimal: bool) -> str:
        """Name the signed catalog of a stream."""
        return f"{self.base_url(stream, minimal=minimal)}streams/v1/{stream.content_id}.sjson"


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One build of an image, as its publisher signed it.

    Attributes:
        release: Series ("noble").
        version: Version of the series ("24.04").
        serial: Build serial ("20240821", "20260930.1").
        url: Where the image is.
        sha256: Digest of the image, lower-case hexadecimal.
        size: Length of the image in bytes.
        stream: The line of builds it belongs to.
        minimal: Whether it is the minimal variant.
    """

    release: str
    version: str
    serial: str
    url: str
    sha256: str
    size: int
    stream: Stream
    minimal: bool

    @property
    def local_directory(self) -> str:
        """The directory of the release below `image_dir`: clients know released by version."""
        return self.version if self.stream is Stream.RELEASED else self.release

    @property
    def name(self) -> str:
        """The image's name without `.img`, with which its kernel's begins, too."""
        return image_name(self.stream, self.local_directory, minimal=self.minimal)


def image_name(stream: Stream, local_directory: str, *, minimal: bool) -> str:
    """Make the name of an image without `.img`, from that of the release's directory."""
    prefix = "ubuntu-" if stream is Stream.RELEASED else ""
    variant = "minimal" if minimal else "server"
    return f"{prefix}{local_directory}-{variant}-cloudimg-{ARCHITECTURE}"


def check_release_form(release: str) -> None:
    """Refuse what cannot be the name of a release, before anything is asked of a server.

    Raises:
        ValueError: It is neither a series' name nor a version by its form.
    """
    is_text = isinstance(release, str)
    if not is_text or not (_SERIES.fullmatch(release) or _VERSION.fullmatch(release)):
        raise ValueError(
            f"Invalid release {release!r}: expected the name of an Ubuntu series, such as "
            f"'noble', or a version, such as '24.04'"
        )


def find_entry(
    source: ImageSource,
    stream: Stream,
    release: str,
    *,
    minimal: bool = False,
    serial: str | None = None,
) -> CatalogEntry:
    """Find a build of a release in the server's catalog: the newest, or a certain one.

    Args:
        source: The server, and the keys that have to have signed its catalog.
        stream: Released or daily builds.
        release: Series ("noble") or version ("24.04").
        minimal: Whether the minimal variant is wanted.
        serial: The build; by default the newest.

    Raises:
        ValueError: `release` cannot be the name of a release, or the keyring is none.
        ImageNotFoundError: The catalog has no such release or build; names those it has.
        ImageBuildError: The catalog could not be downloaded.
        ImageVerificationError: The catalog is not signed by a trusted key.
        MissingPrerequisiteError: `gpgv` is not installed.
    """
    check_release_form(release)
    entries = _fetch_entries(source, stream, minimal=minimal)
    builds = [entry for entry in entries if release in (entry.release, entry.version)]
    if not builds:
        url = shown_url(source.catalog_url(stream, minimal=minimal))
        variant = "minimal " if minimal else ""
        raise ImageNotFoundError(
            f"No {stream.value} {variant}image of {release!r} in {url}; "
            f"it has {_list_releases(entries)}",
            resource_name=release,
        )
    builds.sort(key=lambda entry: store.serial_order(entry.serial))
    if serial is None:
        return builds[-1]
    for entry in builds:
        if entry.serial == serial:
            return entry
    url = shown_url(source.catalog_url(stream, minimal=minimal))
    serials = ", ".join(entry.serial for entry in builds)
    raise ImageNotFoundError(
        f"No build {serial} of {release!r} in {url}; it has {serials}",
        resource_name=release,
    )


def parse_catalog(
    text: bytes, source: ImageSource, stream: Stream, *, minimal: bool
) -> list[CatalogEntry]:
    """Parse the text of a catalog that has been verified.

    Builds that are of no use here (other architectures, other kinds of files, alphas and betas,
    old ones without SHA-256) are left out.

    Raises:
        ImageVerificationError: It is not a catalog.
    """
    try:
        products = json.loads(text)["products"].values()
        entries = [
            _parse_build(product, serial, build, source, stream, minimal=minimal)
            for product in products
            if product.get("arch") == ARCHITECTURE
            for serial, build in product["versions"].items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        url = shown_url(source.catalog_url(stream, minimal=minimal))
        raise ImageVerificationError(
            f"{url} is signed but is not a simplestreams catalog of products: {error!r}"
        ) from error
    return [entry for entry in entries if entry is not None]


def _fetch_entries(source: ImageSource, stream: Stream, *, minimal: bool) -> list[CatalogEntry]:
    # The keys come first: a wrong keyring should not cost a download.
    keys = load_trusted_keys(source.keyring)
    url = source.catalog_url(stream, minimal=minimal)
    with open_client() as client:
        message = fetch_bytes(client, url)
    text = verify_clearsigned(message, keys, shown_url(url))
    return parse_catalog(text, source, stream, minimal=minimal)


def _parse_build(
    product: Mapping[str, Any],
    serial: str,
    build: Mapping[str, Any],
    source: ImageSource,
    stream: Stream,
    *,
    minimal: bool,
) -> CatalogEntry | None:
    """Parse one build; None when it is of no use here."""
    # Daily builds are labelled otherwise; among the released, alphas and betas are.
    if stream is Stream.RELEASED and build.get("label") != "release":
        return None
    disk = next(_find_disks(build["items"].values()), None)
    if disk is None:
        return None
    entry = CatalogEntry(
        release=product["release"],
        version=product["version"],
        serial=serial,
        url=source.base_url(stream, minimal=minimal) + disk["path"],
        sha256=disk["sha256"],
        size=disk["size"],
        stream=stream,
        minimal=minimal,
    )
    return entry if _is_usable(entry) else None


def _find_disks(items: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for item in items:
        complete = {"path", "sha256", "size"} <= item.keys()
        if item.get("ftype") == "disk1.img" and complete and _PATH.fullmatch(item["path"]):
            yield item


def _is_usable(entry: CatalogEntry) -> bool:
    """Whether names and numbers have their forms and the file is the stream's own.

    The same keys sign every catalog: the file's name is what tells that this one is not another
    stream's or variant's, put in its place.
    """
    # Until 16.04, images were called "…-disk1.img".
    names = (f"{entry.name}.img", f"{entry.name}-disk1.img")
    return bool(
        _SERIES.fullmatch(entry.release)
        and _VERSION.fullmatch(entry.version)
        and store.is_serial(entry.serial)
        and _SHA256.fullmatch(entry.sha256)
        and isinstance(entry.size, int)
        and entry.size > 0
        and entry.url.rpartition("/")[2] in names
    )


def _list_releases(entries: Sequence[CatalogEntry]) -> str:
    releases = {
        (tuple(map(int, entry.version.split("."))), entry.version, entry.release)
        for entry in entries
    }
    newest_first = sorted(releases, reverse=True)
    return ", ".join(f"{name} ({version})" for _, version, name in newest_first) or "none"
