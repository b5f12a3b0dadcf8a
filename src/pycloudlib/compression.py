"""Compressed data taken apart within bounds: a few bytes of it may stand for any number."""

from __future__ import annotations

import zlib

_GZIP = 31  # zlib.decompressobj(): a header and a trailer as gzip has them


def gunzip(compressed: bytes, limit: int) -> bytes:
    """Decompress gzip data of one or more members.

    Args:
        compressed: The data.
        limit: How many bytes may come out of it; no more are ever made.

    Raises:
        ValueError: It is damaged, or stands for more than that; says so after the name of it.
    """
    content = bytearray()
    while compressed:
        member = zlib.decompressobj(_GZIP)
        try:
            content += member.decompress(compressed, limit + 1 - len(content))
        except zlib.error as error:
            raise ValueError(f"is damaged gzip data: {error}") from error
        if len(content) > limit:
            raise ValueError(f"stands for more than the {limit} bytes expected at most")
        if not member.eof:
            raise ValueError("is damaged gzip data: it ends early")
        compressed = member.unused_data.lstrip(b"\0")  # zeros are padding
    return bytes(content)
