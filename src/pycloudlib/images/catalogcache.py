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

from pycloudlib.files import replace_atomically
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


def read(directory: Path | None, url: str) -> CachedCatalog | None:
    """Give the catalog of a URL; None when there is none that can be read."""
    if directory is None:
        return None
    try:
        head, _, message = _file(directory, url).read_bytes().partition(b"\n")
        return CachedCatalog(message, Version(**json.loads(head)))
    except (OSError, TypeError, ValueError):
        return None


def write(directory: Path | None, url: str, catalog: CachedCatalog) -> None:
    """Keep a catalog, where that is possible: it is fetched again otherwise."""
    if directory is None:
        return
    head = json.dumps(dataclasses.asdict(catalog.version)).encode()
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        with replace_atomically(_file(directory, url), synced=False) as temporary:
            temporary.write_bytes(head + b"\n" + catalog.message)


def _file(directory: Path, url: str) -> Path:
    return directory / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.catalog"
