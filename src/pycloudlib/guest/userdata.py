"""What user-data is made of: compressed or not, one document or several in one of MIME.

https://docs.cloud-init.io/en/latest/explanation/format.html
"""

from __future__ import annotations

import email
import gzip
import struct
import zlib
from collections.abc import Iterator

_GZIP_MAGIC = b"\x1f\x8b"


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
    if not is_mime(document):
        yield document
        return
    for content in _parts(document, name):
        yield decompress(content, name)


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
