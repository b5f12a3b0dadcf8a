"""Untrusted data, read within limits: JSON, YAML, gzip, bytes that may not be text."""

from __future__ import annotations

import codecs
import dataclasses
import difflib
import enum
import functools
import itertools
import json
import math
import os
import re
import types
import typing
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import yaml

_T = TypeVar("_T")

_LONGEST_SHOWN = 200
_TOO_DEEP = "it is nested too deeply"

# Values that a YAML text may have, those by aliases included. Aliases let a few lines stand for
# billions, which exist only when something walks through them, merges or writes them.
MOST_VALUES = 1_000_000
# A longer text counts as several values: it is repeated whenever the values are written out.
_CHARACTERS = 16
# As many digits as Python reads (sys.int_info). YAML's base 60 is read in quadratic time.
_LONGEST_NUMBER = 4300

_GZIP = 31  # zlib.decompressobj(): a header and a trailer as gzip has them

ESCAPED = "pycloudlib-escaped"
"""The name of the error handler by which a text stream escapes what it cannot encode."""

_NO_TEXT = re.compile("[\ud800-\udfff]")
# Line ends, and what moves a terminal's cursor, are among these.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f]")

# Each with its description.
_PLAIN_KINDS = {str: "a text", int: "a whole number", bool: "true or false"}


def parse_json(text: str | bytes | bytearray) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: It is none; says where.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def parse_yaml(text: str | bytes, most_values: int = MOST_VALUES) -> Any:
    """Parse a YAML text of plain values.

    Args:
        text: The text.
        most_values: As many values as it may have, those by aliases included.

    Raises:
        ValueError: It is none; says where. Or its aliases (`*name`) make it too large, or endless.
    """
    import yaml  # noqa: PLC0415 - heavy

    try:
        kind = _define_loader()
        # A value takes a character at least, and far more memory than that.
        if len(text) > most_values:
            _check_length(yaml.parse(text, kind), most_values)
        loader = kind(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _has_aliases(text):
                _check_size(node, most_values)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        # Errors that are not the library's own come from values such as `!!int ""`.
        raise ValueError(str(error) or type(error).__name__) from error


@functools.cache
def _define_loader() -> type[yaml.SafeLoader]:
    import yaml  # noqa: PLC0415 - heavy

    # The one in C, if it was built: user-data may be large.
    base: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[valid-type, misc]
        pass

    def construct(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> object:
        if len(node.value) > _LONGEST_NUMBER:
            raise ValueError(
                f"it has a number of {len(node.value)} characters, expected {_LONGEST_NUMBER} at "
                "most"
            )
        return base.yaml_constructors[node.tag](loader, node)

    for kind in ("int", "float"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", construct)
    return Loader


def _check_length(events: Iterable[yaml.Event], most: int) -> None:
    """Check that a YAML text does not write out too many values.

    Raises:
        ValueError: It does.
    """
    if sum(1 for _ in itertools.islice(events, most)) == most:
        raise ValueError(f"it has more than {most} values, which are the most expected")


def _has_aliases(text: str | bytes) -> bool:
    return "*" in text if isinstance(text, str) else b"*" in text


def _check_size(root: yaml.Node, most: int) -> None:
    """Check that a YAML text does not stand for too many values.

    Raises:
        ValueError: They are, or one is a part of itself.
    """
    sizes: dict[int, int] = {}
    above: set[int] = set()
    left = [root]
    while left:
        node = left[-1]
        parts = _parts(node)
        if id(node) in above:  # all of its parts are known now
            above.remove(id(node))
            sizes[id(node)] = _own_size(node) + sum(sizes[id(part)] for part in parts)
            if sizes[id(node)] > most:
                raise ValueError(
                    f"with its aliases it stands for more than {most} values, which are the most "
                    "expected"
                )
            left.pop()
        elif id(node) in sizes:
            left.pop()
        else:
            above.add(id(node))
            if any(id(part) in above for part in parts):
                raise ValueError("a value is a part of itself, by an alias")
            left += (part for part in parts if id(part) not in sizes)


def _own_size(node: yaml.Node) -> int:
    return 1 if isinstance(node.value, list) else 1 + len(node.value) // _CHARACTERS


def _parts(node: yaml.Node) -> list[yaml.Node]:
    # A mapping's are pairs, a list's are nodes, a scalar's is its text.
    if not isinstance(node.value, list):
        return []
    return [part for entry in node.value for part in (entry if type(entry) is tuple else (entry,))]


def decode(kind: type[_T], plain: object) -> _T:
    """Make a dataclass of JSON's plain values, each checked for its type.

    Fields may be texts, numbers, booleans, paths, enums, tuples, other dataclasses, and any of
    these or None. Those with a default may be missing; unknown ones are refused.

    Raises:
        ValueError: A value is missing, unknown or another than the field's; names it.
    """
    value: _T = _decode(kind, plain, "")
    return value


def safe_repr(value: object) -> str:
    """Return a value's `repr()`, cut to 200 characters; never raise."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # a number may have more digits than are written out
        return f"a value of type {type(value).__name__} that cannot be shown"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def _decode(kind: Any, plain: object, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _decode_fields(typing.cast("type[Any]", kind), plain, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        inner, none = arguments
        assert none is type(None), "only `… | None` can be told apart"
        return None if plain is None else _decode(inner, plain, where)
    if origin is tuple:
        return _decode_tuple(arguments, plain, where)
    return _decode_one(kind, plain, where)


def _decode_one(kind: Any, plain: object, where: str) -> Any:
    if issubclass(kind, enum.Enum):
        values = [member.value for member in kind]
        if plain not in values:
            raise _wrong(plain, where, f"one of {', '.join(map(repr, values))}")
        return kind(plain)
    if kind is Path:
        return _decode_path(plain, where)
    if kind is float:
        return _decode_float(plain, where)
    # Not isinstance: True is an int.
    if type(plain) is not kind:
        raise _wrong(plain, where, _PLAIN_KINDS[kind])
    return plain


def _decode_fields(kind: type[Any], plain: object, where: str) -> Any:
    if not isinstance(plain, dict):
        raise _wrong(plain, where, "keys and values")
    kinds = _field_kinds(kind)
    unknown = plain.keys() - kinds.keys()
    if unknown:
        raise ValueError(f"{_below(where, min(map(str, unknown)))} is not known")
    for field in dataclasses.fields(kind):
        if field.name not in plain and field.default is dataclasses.MISSING:
            raise ValueError(f"{_below(where, field.name)} is missing")
    return kind(**{key: _decode(kinds[key], plain[key], _below(where, key)) for key in plain})


def _field_kinds(kind: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _decode_tuple(kinds: tuple[Any, ...], plain: object, where: str) -> tuple[Any, ...]:
    if not isinstance(plain, list):
        raise _wrong(plain, where, "a list")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(plain)
    if len(plain) != len(kinds):
        raise _wrong(plain, where, f"a list of {len(kinds)}")
    return tuple(
        _decode(kind, value, f"{where}[{number}]")
        for number, (kind, value) in enumerate(zip(kinds, plain, strict=True))
    )


def _decode_path(plain: object, where: str) -> Path:
    if isinstance(plain, str) and plain and "\0" not in plain:
        try:
            os.fsencode(plain)
        except UnicodeEncodeError:
            pass
        else:
            return Path(plain)
    raise _wrong(plain, where, "a path")


def _decode_float(plain: object, where: str) -> float:
    if type(plain) in (int, float):
        try:
            number = float(typing.cast("float", plain))
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise _wrong(plain, where, "a number")


def _below(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _wrong(plain: object, where: str, expected: str) -> ValueError:
    return ValueError(f"{where or 'it'} is {safe_repr(plain)}, expected {expected}")


def gunzip(compressed: bytes, limit: int) -> bytes:
    """Decompress gzip data of one or more members.

    Args:
        compressed: The data.
        limit: How many bytes it may have when decompressed; no more are ever produced.

    Raises:
        ValueError: It is damaged, or longer than that; the text continues "<name> …".
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


def from_bytes(data: bytes) -> str:
    """Decode bytes, whatever they are; `to_bytes` returns the same bytes."""
    return data.decode("utf-8", "surrogateescape")


def to_bytes(text: str) -> bytes:
    """Encode a text; bytes that were not text come back as they were.

    Raises:
        UnicodeEncodeError: It has a surrogate that is no byte.
    """
    return text.encode("utf-8", "surrogateescape")


def read_kernel_file(path: str | Path) -> str:
    """Read a file of /proc or /sys, which may have names that other users have chosen.

    Raises:
        OSError: It cannot be read.
    """
    return from_bytes(Path(path).read_bytes())


def escape_line(text: str) -> str:
    r"""Return a text for one line or cell, with bytes and control characters as `\xd1`, `\x0a`."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", escape_bytes(text))


def escape_bytes(text: str) -> str:
    r"""Return a text with each byte that is not text as `\xd1`."""
    return _NO_TEXT.sub(lambda found: _escape(found[0]), text)


def escape_json(document: str) -> str:
    r"""Return a JSON document with each byte that is not text as JSON's escape `\udcd1`."""
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


codecs.register_error(ESCAPED, _show)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the name that is most like an unknown one, to suggest it; None if none is."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return near[0] if near else None
