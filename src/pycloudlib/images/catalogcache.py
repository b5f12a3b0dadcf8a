"""The catalogs that were fetched last: megabytes that change once a day.

A file for each URL, with its version in the first line and the message as it was signed after
that. It is verified each time it is read, like one that comes from the server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from pycloudlib.documents import decode, parse_json
from pycloudlib.files import create_directories, private_opener, replace_atomically
from pycloudlib.images.download import Version


@dataclass(frozen=True, slots=True)
class CachedCatalog:
    """A catalog as it was fetched.

    Attributes:
        message: The signed message.
        version: By which the server tells whether it has changed.
    """

    message: bytes
    version: Version


@dataclass(frozen=True, slots=True)
class _Head:
    """The first line of a file.

    Attributes:
        version: The catalog's.
        sha256: The message's digest. Where signatures are not looked at, nothing else would tell
            that it is damaged, and the server would say for ever that it has not changed.
    """

    version: Version
    sha256: str


def read(directory: Path | None, url: str) -> CachedCatalog | None:
    """Give the catalog of a URL; None when there is none that can be read."""
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
    """Keep a catalog, where that is possible: it is fetched again otherwise."""
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
