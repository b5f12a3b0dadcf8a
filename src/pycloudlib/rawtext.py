"""Bytes that need not be text: kept as they are, read from the kernel, and shown to people.

A file name, a process's name, an argument, a variable of the environment: to the kernel each of
them is bytes. Here they are texts as Python's own file names are (PEP 383): UTF-8, and a lone
surrogate for each byte that is not. So nothing is lost on the way through, and nothing is refused;
only where such a text is shown, or written as JSON, something has to be done about it.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path

SHOWN = "pycloudlib-shown"
"""The name of the error handler by which a text stream shows what its encoding has not."""

_NO_TEXT = re.compile("[\ud800-\udfff]")
# Line ends and what moves a terminal's cursor belong to these.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f]")


def from_bytes(data: bytes) -> str:
    """Read bytes as text; `to_bytes` gives the same bytes again, whatever they are."""
    return data.decode("utf-8", "surrogateescape")


def to_bytes(text: str) -> bytes:
    """Give the bytes of a text, those that were no text included.

    Raises:
        UnicodeEncodeError: It holds a surrogate that stands for no byte.
    """
    return text.encode("utf-8", "surrogateescape")


def read_kernel_file(path: str | Path) -> str:
    """Read a file of /proc or /sys, which may hold names of others' choice.

    Raises:
        OSError: It cannot be read.
    """
    return from_bytes(Path(path).read_bytes())


def shown_on_one_line(text: str) -> str:
    r"""Show a text in a line or a cell: what is no text, or would leave it, as `\xd1` or `\x0a`."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", shown(text))


def shown(text: str) -> str:
    r"""Show a text: each byte that is no text as `\xd1`."""
    return _NO_TEXT.sub(lambda found: _escape(found[0]), text)


def as_json_escapes(document: str) -> str:
    r"""Write what is no text in a JSON document by its escapes (`\udcd1`), as JSON can."""
    return _NO_TEXT.sub(lambda found: f"\\u{ord(found[0]):04x}", document)


def _escape(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:
        return f"\\x{number - 0xDC00:02x}"
    return character.encode("ascii", "backslashreplace").decode()


def _show(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    failed = error.object[error.start : error.end]
    return "".join(map(_escape, failed)), error.end


codecs.register_error(SHOWN, _show)
