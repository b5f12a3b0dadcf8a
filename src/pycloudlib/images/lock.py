"""Images that are pinned: a file in a project that says which builds it is tested with.

`pycloudlib.lock` is JSON, to be kept under version control and written by this package:

    {"version": 1,
     "images": [{"stream": "daily", "release": "noble", "version": "24.04", "minimal": false,
                 "serial": "20240821", "url": "https://…", "sha256": "…", "size": 586022912,
                 "aliases": ["lts"]}]}

It comes with a project, whoever wrote that: it narrows what a signed catalog offers, and nothing is
believed because the file says so. Where the image is comes from the catalog; the URL is for people,
and for `image_verification = "disabled"`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pycloudlib.documents import decode, parse_json, shown
from pycloudlib.files import read_bounded, replace_atomically
from pycloudlib.images.catalog import CatalogEntry, check_release_form, is_release_name, is_usable
from pycloudlib.images.download import shown_url
from pycloudlib.images.source import Stream, is_http_url

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
                raise ValueError(f"its version is {shown(document['version'])}, expected {_FORMAT}")
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
        """List what else pinned releases were called; others may be called so by now."""
        return [(pin.stream, name, pin.minimal) for pin in self.pins for name in _other_names(pin)]

    def write_with(self, entries: Sequence[CatalogEntry]) -> None:
        """Write the lock with builds in place of those of the same images.

        What one of them is called now, no other is.
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
    """List the aliases that can be asked for, without those that say nothing more."""
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
