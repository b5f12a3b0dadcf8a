"""What images there are: the signed catalogs that Ubuntu's image server publishes.

A catalog is a simplestreams document (`products:1.0`): a clear-signed JSON text of products,
each with its builds. The layout of the server is that of https://cloud-images.ubuntu.com, which
mirrors share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from pycloudlib._base.documents import decode, parse_json
from pycloudlib._base.files import create_directories, private_opener, replace_atomically
from pycloudlib.errors import ImageNotFoundError, ImageVerificationError
from pycloudlib.images import store
from pycloudlib.images.download import Version, fetch_changed, open_client
from pycloudlib.images.source import ImageSource, Stream, load_trusted_keys, verify_clearsigned

_log = logging.getLogger(__name__)

Check = Callable[[bytes, str], bytes]
"""Verifies a message from an origin, and returns its text."""

ARCHITECTURE = "amd64"

# The forms of Ubuntu's names; names of files and directories are made of them.
_SERIES = re.compile(r"[a-z]{2,32}")
_VERSION = re.compile(r"[0-9]{1,2}\.[0-9]{2}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PATH = re.compile(r"(?!/)(?!.*\.\.)[A-Za-z0-9._/+~-]+")


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
        aliases: Other names of the release at present ("lts", "devel").
    """

    release: str
    version: str
    serial: str
    url: str
    sha256: str
    size: int
    stream: Stream
    minimal: bool
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What the release may be called: series, version, other names."""
        return (self.release, self.version, *self.aliases)

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


def is_release_name(text: str) -> bool:
    """Whether a text is a series' name, an alias or a version by its form."""
    return bool(_SERIES.fullmatch(text) or _VERSION.fullmatch(text))


def check_release_form(release: str) -> None:
    """Check the form of a release's name, before a server is asked.

    Raises:
        ValueError: It is neither a series' name nor a version by its form.
    """
    if not isinstance(release, str) or not is_release_name(release):
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
        release: Series ("noble"), version ("24.04") or another name that the catalog has for it at
            present ("lts", "devel").
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
    return fetch_catalog(source, stream, minimal=minimal).find(release, serial)


@dataclass(frozen=True, slots=True)
class Catalog:
    """What builds there are, as their publisher signed it.

    Attributes:
        url: Where it comes from.
        kind: Which images it lists, for messages.
        entries: The builds.
    """

    url: str
    kind: str
    entries: Sequence[CatalogEntry]

    def find(self, release: str, serial: str | None = None) -> CatalogEntry:
        """Find a build of a release: the newest, or a certain one.

        Raises:
            ImageNotFoundError: It has no such release or build; names those it has.
        """
        builds = sorted(
            (entry for entry in self.entries if release in entry.names),
            key=lambda entry: store.serial_order(entry.serial),
        )
        if not builds:
            raise ImageNotFoundError(
                resource_name=release,
                message=f"No {self.kind} image of {release!r} in {self.url}; it has "
                f"{_list_releases(self.entries)}",
            )
        if serial is None:
            return builds[-1]
        found = next((entry for entry in builds if entry.serial == serial), None)
        if found is not None:
            return found
        serials = ", ".join(entry.serial for entry in builds)
        raise ImageNotFoundError(
            resource_name=release,
            message=f"No build {serial} of {release!r} in {self.url}; it has {serials}",
        )

    def find_signed(self, pin: CatalogEntry) -> CatalogEntry | None:
        """Find the very build that is pinned; its URL may have changed."""
        build = replace(pin, url="", aliases=())
        same = (entry for entry in self.entries if replace(entry, url="", aliases=()) == build)
        return next(same, None)


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
        products = parse_json(text)["products"].values()
        entries = [
            _parse_build(product, serial, build, source, stream, minimal=minimal)
            for product in products
            if product.get("arch") == ARCHITECTURE
            for serial, build in product["versions"].items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        url = source.catalog_url(stream, minimal=minimal)
        raise ImageVerificationError(
            f"{url} is signed but is not a simplestreams catalog of products: {error!r}"
        ) from error
    return [entry for entry in entries if entry is not None]


def fetch_catalog(source: ImageSource, stream: Stream, *, minimal: bool) -> Catalog:
    """Fetch the server's catalog of a stream; errors are those of `find_entry`."""
    # The keys first: a wrong keyring should not cost a download.
    check = _make_check(source)
    url = source.catalog_url(stream, minimal=minimal)
    known, version = _read_kept(check, source, url)
    with open_client(source.login, source.limits) as client:
        message, version = fetch_changed(client, url, version)
    text = known if message is None else check(message, url)
    if message is not None and _updated(text) < _updated(known):
        _log.warning(
            "%s is older than what it was before: an attacker could hold back newer images "
            "by that. The newer catalog is used, which was kept",
            url,
        )
        text = known
    elif message is not None:
        write(source.cache_dir, url, CachedCatalog(message, version))
    return _make_catalog(text, source, stream, minimal=minimal)


def read_kept_catalog(source: ImageSource, stream: Stream, *, minimal: bool) -> Catalog | None:
    """Read the catalog that was fetched last, without any network; None without one."""
    url = source.catalog_url(stream, minimal=minimal)
    text, _ = _read_kept(_make_check(source), source, url)
    return _make_catalog(text, source, stream, minimal=minimal) if text else None


def _make_catalog(text: bytes, source: ImageSource, stream: Stream, *, minimal: bool) -> Catalog:
    return Catalog(
        url=source.catalog_url(stream, minimal=minimal),
        kind=f"{stream.value} minimal" if minimal else stream.value,
        entries=parse_catalog(text, source, stream, minimal=minimal),
    )


def _make_check(source: ImageSource) -> Check:
    if not source.verified:
        source.warn_if_unverified()
        return lambda message, _origin: message
    keys = load_trusted_keys(source.keyring)
    return lambda message, origin: verify_clearsigned(message, keys, origin)


def _read_kept(check: Check, source: ImageSource, url: str) -> tuple[bytes, Version]:
    """Return text and version of the cached catalog; both empty without a trusted one."""
    kept = read(source.cache_dir, url)
    if kept is not None:
        try:
            return check(kept.message, url), kept.version
        except ImageVerificationError as error:
            _log.debug("A catalog that was kept is not used: %s", error)
    return b"", Version()


def _updated(text: bytes) -> float:
    """Return when a catalog was made, in seconds since the epoch; 0 if it does not say."""
    try:
        updated = parse_json(text)["updated"]
        return parsedate_to_datetime(updated).timestamp() if isinstance(updated, str) else 0.0
    except (LookupError, OverflowError, TypeError, ValueError):
        return 0.0


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
    # Daily builds have other labels; among the released ones, so have alphas and betas.
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
        aliases=tuple(filter(None, product.get("aliases", "").split(","))),
    )
    return entry if is_usable(entry) else None


def _find_disks(items: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for item in items:
        complete = {"path", "sha256", "size"} <= item.keys()
        if item.get("ftype") == "disk1.img" and complete and _PATH.fullmatch(item["path"]):
            yield item


def is_usable(entry: CatalogEntry) -> bool:
    """Whether names and numbers have their forms and the file is the stream's own.

    The same keys sign every catalog: only the file's name shows that this is not the catalog of
    another stream or variant in its place.
    """
    # Until 16.04, images were called "…-disk1.img".
    names = (f"{entry.name}.img", f"{entry.name}-disk1.img")
    return bool(
        _SERIES.fullmatch(entry.release)
        and _VERSION.fullmatch(entry.version)
        and store.is_serial(entry.serial)
        and _SHA256.fullmatch(entry.sha256)
        and type(entry.size) is int  # and not True
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


@dataclass(frozen=True, slots=True)
class CachedCatalog:
    """A catalog as it was fetched.

    Attributes:
        message: The signed message.
        version: By which the server knows whether it has changed.
    """

    message: bytes
    version: Version


@dataclass(frozen=True, slots=True)
class _Head:
    """The first line of a file.

    Attributes:
        version: The catalog's.
        sha256: The message's digest. Where signatures are not checked, nothing else shows damage,
            and the server would answer for ever that the catalog has not changed.
    """

    version: Version
    sha256: str


def read(directory: Path | None, url: str) -> CachedCatalog | None:
    """Read the cached catalog of a URL; None if there is none, or a damaged one."""
    if directory is None:
        return None
    try:
        head, _, message = _file(directory, url).read_bytes().partition(b"\n")
        kept = decode(_Head, parse_json(head))
    except (OSError, ValueError):
        return None
    if kept.sha256 != hashlib.sha256(message).hexdigest():
        return None
    return CachedCatalog(message, kept.version)


def write(directory: Path | None, url: str, catalog: CachedCatalog) -> None:
    """Write a catalog to the cache; where that fails, it is fetched again."""
    if directory is None:
        return
    digest = hashlib.sha256(catalog.message).hexdigest()
    head = json.dumps(dataclasses.asdict(_Head(catalog.version, digest))).encode()
    with contextlib.suppress(OSError):
        create_directories(directory)
        with (
            replace_atomically(_file(directory, url), synced=False) as temporary,
            open(temporary, "wb", opener=private_opener) as file,
        ):
            file.write(head + b"\n" + catalog.message)


def _file(directory: Path, url: str) -> Path:
    return directory / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.catalog"
