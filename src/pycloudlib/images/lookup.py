"""Images of a release: stored ones, the server's, and builds that a lock file pins."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pycloudlib._base.documents import decode, parse_json, safe_repr
from pycloudlib._base.files import read_bounded, replace_atomically
from pycloudlib.errors import ImageBuildError, ImageNotFoundError, ImageVerificationError
from pycloudlib.images import releases, store
from pycloudlib.images.catalog import (
    CatalogEntry,
    check_release_form,
    fetch_catalog,
    find_entry,
    is_release_name,
    is_usable,
    read_kept_catalog,
)
from pycloudlib.images.download import shown_url
from pycloudlib.images.source import ImageSource, Stream, is_http_url
from pycloudlib.progress import ProgressCallback

_log = logging.getLogger(__name__)

FILE = "pycloudlib.lock"
_FORMAT = 1
_LONGEST = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class _Document:
    """The file's content."""

    version: int
    images: tuple[CatalogEntry, ...]


@dataclass(frozen=True, slots=True)
class ImageLock:
    """Which builds are pinned.

    Attributes:
        path: The file; it need not exist.
        pins: The builds.
    """

    path: Path
    pins: tuple[CatalogEntry, ...] = ()

    @classmethod
    def read(cls, path: Path) -> ImageLock:
        """Read a lock; a file that does not exist pins nothing.

        Raises:
            ValueError: It is no lock; names the file and what is wrong.
        """
        try:
            document = parse_json(read_bounded(path, _LONGEST))
            if isinstance(document, dict) and document.get("version", _FORMAT) != _FORMAT:
                raise ValueError(
                    f"its version is {safe_repr(document['version'])}, expected {_FORMAT}"
                )
            pins = decode(_Document, document).images
            for pin in pins:
                _check(pin)
            pins = tuple(replace(pin, url=shown_url(pin.url)) for pin in pins)
        except FileNotFoundError:
            return cls(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a lock of images: {error}") from error
        return cls(path, pins)

    def find(self, stream: Stream, release: str, *, minimal: bool) -> CatalogEntry | None:
        """Find the build that a release is pinned to; None when it is not.

        Args:
            stream: Released or daily builds.
            release: Series, version, or what else the release was called when it was pinned.
            minimal: Whether the minimal variant is meant.
        """
        of_kind = [pin for pin in self.pins if (pin.stream, pin.minimal) == (stream, minimal)]
        called = [pin for pin in of_kind if release in (pin.release, pin.version)]
        return next((pin for pin in (*called, *of_kind) if release in pin.names), None)

    def list_aliases(self) -> list[tuple[Stream, str, bool]]:
        """List the other names of pinned releases, which may mean other releases by now."""
        return [(pin.stream, name, pin.minimal) for pin in self.pins for name in _other_names(pin)]

    def write_with(self, entries: Sequence[CatalogEntry]) -> None:
        """Write the lock with builds in place of those of the same images.

        A name that one of them has now is removed from all others.
        """
        images = {_image(pin): _without_names(pin, entries) for pin in self.pins}
        images |= {_image(entry): entry for entry in entries}
        document = {
            "version": _FORMAT,
            "images": [_plain(images[image]) for image in sorted(images)],
        }
        with replace_atomically(self.path) as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _image(pin: CatalogEntry) -> tuple[str, str, bool]:
    return (pin.stream.value, pin.release, pin.minimal)


def _without_names(pin: CatalogEntry, entries: Sequence[CatalogEntry]) -> CatalogEntry:
    taken = {
        name
        for entry in entries
        if (entry.stream, entry.minimal) == (pin.stream, pin.minimal)
        for name in entry.names
    }
    return replace(pin, aliases=tuple(name for name in pin.aliases if name not in taken))


def _other_names(pin: CatalogEntry) -> list[str]:
    """Return the aliases that can be asked for, without those that are its release or version."""
    return [name for name in pin.aliases if is_release_name(name) and name not in pin.names[:2]]


def _plain(pin: CatalogEntry) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "stream": pin.stream.value,
        "release": pin.release,
        "version": pin.version,
        "minimal": pin.minimal,
        "serial": pin.serial,
        "url": shown_url(pin.url),
        "sha256": pin.sha256,
        "size": pin.size,
    }
    aliases = _other_names(pin)
    return plain | {"aliases": aliases} if aliases else plain


def _check(pin: CatalogEntry) -> None:
    for name in pin.aliases:
        check_release_form(name)
    if not is_usable(pin) or not is_http_url(pin.url):
        raise ValueError(f"{_plain(pin)} is not a build of an image")


@dataclass(frozen=True, slots=True)
class ImageLookup:
    """An image that is wanted, and where it may be obtained from.

    Attributes:
        stream: Released or daily builds.
        release: Series or version.
        minimal: Whether the minimal variant is wanted.
        image_dir: Where images are kept.
        source: The server.
        offline: Whether it may not be asked.
        pin: The build that it has to be, if it is pinned.
        lock: The file that says so.

    Raises:
        ValueError: `release` cannot be the name of a release.
    """

    stream: Stream
    release: str
    minimal: bool
    image_dir: Path
    source: ImageSource
    offline: bool = False
    pin: CatalogEntry | None = None
    lock: Path = Path()

    def __post_init__(self) -> None:
        check_release_form(self.release)

    def stored_or_fetched(self, on_progress: ProgressCallback) -> str:
        """Return the newest stored image, without any network; else download the server's newest.

        An image that is stored only because a lock had chosen it comes last.

        Raises:
            ImageNotFoundError: None is stored, and the server may not be asked.
            ImageBuildError: It could not be downloaded.
            ImageVerificationError: The download is not what its publisher signed.
        """
        if self.pin is not None:
            return self._pinned(self.pin, on_progress)
        stored = self._find_stored()
        if stored is not None:
            return str(stored)
        unverified = releases.find_unverified(
            self.source, self.image_dir, self.stream, self.release, self.minimal
        )
        for image in unverified:
            reused = self._reuse_unrecorded(image, on_progress)
            if reused is not None:
                return reused
        if not self.offline:
            return self.newest_or_stored(on_progress)
        chosen_by_lock = self._find_stored(pinned=True)
        if chosen_by_lock is None:
            raise self._offline_error(f"{self.stream.value} image of {self.release!r}")
        return str(chosen_by_lock)

    def newest(self, on_progress: ProgressCallback) -> str:
        """Return the server's newest; it is downloaded unless that very build is stored."""
        if self.pin is not None:
            return self._pinned(self.pin, on_progress)
        return self._fetch(None, on_progress)

    def newest_or_stored(self, on_progress: ProgressCallback) -> str:
        """Return the server's newest, or the newest stored one if the server cannot be reached."""
        try:
            return self.newest(on_progress)
        except ImageBuildError as error:
            stored = None if self.pin else self._find_stored(pinned=True)
            if stored is None:
                raise
            _log.warning("%s. Using %s, the newest that is here", error, stored)
            return str(stored)

    def _find_stored(self, *, pinned: bool = False) -> Path | None:
        return releases.find_stored(
            self.source, self.image_dir, self.stream, self.release, self.minimal, pinned=pinned
        )

    def _pinned(self, pin: CatalogEntry, on_progress: ProgressCallback) -> str:
        """Return the pinned build: the lock chooses one that is in the signed catalog."""
        if not self.source.verified:
            return self._fetch_unverified(pin, on_progress)
        pinned = f"{self.lock} pins {self.release!r} to the build {pin.serial} of {pin.release!r}"
        _log.info("%s", pinned)
        if store.is_future_serial(pin.serial):
            raise ImageVerificationError(f"{pinned}, whose day is still to come")
        if releases.is_stored_as_pinned(pin, self.release, self.source, self.image_dir):
            return str(releases.image_path(pin, self.image_dir))
        if self.offline and not releases.is_complete(pin, self.source, self.image_dir):
            raise self._offline_pin_error(pin)
        entry = self._find_signed(pin, pinned)
        image = releases.fetch_image(
            entry, self.source, self.image_dir, on_progress=on_progress, pinned=True
        )
        return str(image)

    def _fetch_unverified(self, pin: CatalogEntry, on_progress: ProgressCallback) -> str:
        """Return the build as the lock describes it: nothing is verified, and that is logged."""
        if self.offline and not releases.is_complete(pin, self.source, self.image_dir):
            raise self._offline_pin_error(pin)
        _log.warning(
            "WHAT %s SAYS OF %r IS BELIEVED AS IT IS (image_verification = 'disabled' in [qemu]): "
            "the build %s from %s, which no signed catalog was asked for",
            self.lock,
            self.release,
            pin.serial,
            shown_url(pin.url),
        )
        image = releases.fetch_image(
            pin, self.source, self.image_dir, on_progress=on_progress, pinned=True
        )
        return str(image)

    def _find_signed(self, pin: CatalogEntry, pinned: str) -> CatalogEntry:
        """Find a pinned build in the signed catalog: in the one that was kept, or the server's.

        Raises:
            ImageNotFoundError: The server may not be asked, or has no such build.
            ImageVerificationError: It has another one of that serial, or calls it otherwise.
        """
        kept = read_kept_catalog(self.source, self.stream, minimal=self.minimal)
        entry = kept.find_signed(pin) if kept else None
        if entry is not None and self.release in entry.names:
            return entry
        if self.offline:
            raise self._offline_pin_error(pin)
        catalog = fetch_catalog(self.source, self.stream, minimal=self.minimal)
        entry = catalog.find_signed(pin)
        if entry is None:
            try:
                signed = catalog.find(pin.release, pin.serial)
            except ImageNotFoundError as error:
                raise ImageNotFoundError(
                    resource_name=self.release,
                    message=f"{pinned}, which is not offered. {error}. 'pycloudlib images lock "
                    "--update' pins the newest",
                ) from error
            raise ImageVerificationError(
                f"{pinned} as {_describe(pin)}, but {catalog.url} has signed it as "
                f"{_describe(signed)}"
            )
        if self.release not in entry.names:
            raise ImageVerificationError(
                f"{pinned}, which {catalog.url} calls {', '.join(entry.names)}, not "
                f"{self.release!r}. 'pycloudlib images lock --update' pins what is called so now"
            )
        return entry

    def _offline_pin_error(self, pin: CatalogEntry) -> ImageNotFoundError:
        return self._offline_error(f"build {pin.serial} of {self.release!r}, which is pinned,")

    def _offline_error(self, wanted: str) -> ImageNotFoundError:
        return ImageNotFoundError(
            resource_name=self.release,
            message=f"No {wanted} in {self.image_dir}, and the server is not asked (offline = true "
            f"in [qemu]). There are: {self._list_others()}",
        )

    def _reuse_unrecorded(self, image: Path, on_progress: ProgressCallback) -> str | None:
        """Return an image that another program left, verified as if it were downloaded.

        Where it cannot be verified because the server cannot be asked, it is used if it has no
        record, as by the original pycloudlib. Return None for others.
        """
        if not self.offline:
            try:
                return self._fetch(image.parent.name, on_progress)
            except ImageNotFoundError as error:
                _log.warning("%s is not used: %s", image, error)
                return None
            except ImageBuildError as error:
                _log.info("%s", error)
        if (
            store.find_record(image) is not None
            or store.find_unprotected(image) is not None
            or store.is_future_serial(image.parent.name)
        ):
            _log.warning("%s is not used: it was not verified, and cannot be now", image)
            return None
        _log.warning("%s was not downloaded by this package, and is used unverified", image)
        return str(image)

    def _fetch(self, serial: str | None, on_progress: ProgressCallback) -> str:
        entry = find_entry(
            self.source, self.stream, self.release, minimal=self.minimal, serial=serial
        )
        image = releases.fetch_image(entry, self.source, self.image_dir, on_progress=on_progress)
        return str(image)

    def _list_others(self) -> str:
        others = [
            f"{stored.release} {stored.serial} ({Path(stored.image_id).name})"
            for stored in store.list_images(self.image_dir)
        ]
        return ", ".join(others) or "none"


def _describe(entry: CatalogEntry) -> str:
    return f"{entry.release} {entry.version} with SHA-256 {entry.sha256} and {entry.size} bytes"
