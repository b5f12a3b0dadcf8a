"""Images that are pinned: a file in a project that says which builds it is tested with.

`pycloudlib.lock` is JSON, to be kept under version control and written by this package:

    {"version": 1,
     "images": [{"stream": "daily", "release": "noble", "version": "24.04", "minimal": false,
                 "serial": "20240821", "url": "https://…", "sha256": "…", "size": 586022912}]}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pycloudlib.documents import decode, parse_json, shown
from pycloudlib.files import replace_atomically
from pycloudlib.images.catalog import CatalogEntry, is_usable
from pycloudlib.images.source import Stream, is_http_url

FILE = "pycloudlib.lock"
_FORMAT = 1


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
            document = parse_json(path.read_bytes())
            if isinstance(document, dict) and document.get("version", _FORMAT) != _FORMAT:
                raise ValueError(f"its version is {shown(document['version'])}, expected {_FORMAT}")
            pins = decode(_Document, document).images
            for pin in pins:
                _check(pin)
        except FileNotFoundError:
            return cls(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a lock of images: {error}") from error
        return cls(path, pins)

    def find(self, stream: Stream, release: str, *, minimal: bool) -> CatalogEntry | None:
        """Find the build that a release is pinned to; None when it is not."""
        for pin in self.pins:
            if (pin.stream, pin.minimal) == (stream, minimal) and release in (
                pin.release,
                pin.version,
            ):
                return pin
        return None

    def write_with(self, entries: Sequence[CatalogEntry]) -> None:
        """Write the lock with builds in place of those of the same images."""
        images = {_image(pin): pin for pin in (*self.pins, *entries)}
        document = {
            "version": _FORMAT,
            "images": [_plain(images[image]) for image in sorted(images)],
        }
        with replace_atomically(self.path) as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _image(pin: CatalogEntry) -> tuple[str, str, bool]:
    return (pin.stream.value, pin.release, pin.minimal)


def _plain(pin: CatalogEntry) -> dict[str, str | int | bool]:
    return {
        "stream": pin.stream.value,
        "release": pin.release,
        "version": pin.version,
        "minimal": pin.minimal,
        "serial": pin.serial,
        "url": pin.url,
        "sha256": pin.sha256,
        "size": pin.size,
    }


def _check(pin: CatalogEntry) -> None:
    if not is_usable(pin) or not is_http_url(pin.url):
        raise ValueError(f"{_plain(pin)} is not a build of an image")
