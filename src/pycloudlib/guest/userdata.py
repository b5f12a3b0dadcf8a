"""What user-data is made of: compressed or not, one document or several, by MIME or as an archive.

https://docs.cloud-init.io/en/latest/explanation/format.html
"""

from __future__ import annotations

import email
import gzip
import struct
import zlib
from collections.abc import Iterator

from pycloudlib.documents import parse_yaml

_GZIP_MAGIC = b"\x1f\x8b"
_ARCHIVE = b"#cloud-config-archive"


def decompress(document: bytes, name: str) -> bytes:
    """Undo a compression by gzip; what is not compressed stays as it is.

    Args:
        document: The document.
        name: What it is called in an error.

    Raises:
        ValueError: It is damaged.
    """
    if not document.startswith(_GZIP_MAGIC):
        return document
    try:
        return gzip.decompress(document)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise ValueError(f"{name} is damaged gzip data: {error}") from error


def is_mime(document: bytes) -> bool:
    """Tell a MIME document by what cloud-init looks for (cloudinit/user_data.py)."""
    return b"mime-version:" in document[:4096].lower()


def split(document: bytes, name: str) -> Iterator[bytes]:
    """Give the documents that user-data consists of, decompressed.

    Raises:
        ValueError: One of them is damaged.
    """
    document = decompress(document, name)
    if is_mime(document):
        for content in _parts(document, name):
            yield from _split_archive(decompress(content, name), name)
    else:
        yield from _split_archive(document, name)


def _split_archive(document: bytes, name: str) -> Iterator[bytes]:
    """Give what a `#cloud-config-archive` consists of; any other document as it is."""
    if not document.lstrip().startswith(_ARCHIVE):
        yield document
        return
    entries = load_yaml(document, name)
    if not isinstance(entries, list):
        raise ValueError(f"{name} is an archive of {type(entries).__name__}, expected a list")
    for entry in entries:
        content = entry.get("content", "") if isinstance(entry, dict) else entry
        yield content if isinstance(content, bytes) else str(content).encode()


def load_yaml(document: bytes, name: str) -> object:
    """Parse a YAML or JSON document.

    Raises:
        ValueError: It is neither.
    """
    try:
        return parse_yaml(document)
    except ValueError as error:
        raise ValueError(f"{name} is not valid YAML: {error}") from error


def _parts(document: bytes, name: str) -> list[bytes]:
    """Give what the parts of a MIME document carry, and the parts of parts."""
    try:
        payloads = [
            part.get_payload(decode=True) for part in email.message_from_bytes(document).walk()
        ]
    except RecursionError:
        raise ValueError(f"{name} is a MIME document of parts that are nested too deeply") from None
    except (LookupError, TypeError, UnicodeError, ValueError) as error:
        raise ValueError(f"{name} is a MIME document that cannot be read: {error}") from error
    return [payload for payload in payloads if isinstance(payload, bytes)]
