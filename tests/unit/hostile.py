"""Bad input that tests of everything that parses share: damaged texts, wrong values, odd names."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

# Deeper than any parser goes down.
TOO_DEEP = 100_000

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, -1, 0, 10**400])
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=12)
)
PLAIN = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
"""Whatever JSON can hold."""

NAMES = st.text(st.characters(exclude_categories=()), max_size=30) | st.sampled_from(
    (
        *("", "/", ".", "..", "~", "~nobody-of-that-name/x", "a\0b", "\ud800", "\udc80"),
        *("x" * 300, "/" + "x/" * 3000),
        *("::", "a::b::c", "-", "\n", "$HOME", "${", "%s", "*", "[", "\\"),
    )
)
"""Names of files that nobody would choose."""

# What a file may hold that is none of ours.
STRANGE = (
    b"",
    b"\0",
    b"\xff\xfe",
    b"\xe9",
    b"null",
    b"[]",
    b"{}",
    b"5",
    b'"text"',
    b"NaN",
    b"1" * 5000,
    b"[" * TOO_DEEP,
    b'{"a":' * TOO_DEEP,
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Give a content cut off at any byte, with any byte changed, or of another kind altogether."""
    at = draw(st.integers(0, max(0, len(content) - 1)))
    how = draw(st.sampled_from(["cut", "changed", "zeroed", "doubled", "other", "any"]))
    if how == "cut":
        return content[:at]
    if how == "changed":
        return content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
    if how == "zeroed":
        return content[:at] + bytes(len(content) - at)
    if how == "doubled":
        return content + content[at:]
    return draw(st.sampled_from(STRANGE) if how == "other" else st.binary(max_size=60))


def places(plain: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Give the way to each value in what JSON holds."""
    yield place
    if isinstance(plain, dict):
        for key, value in plain.items():
            yield from places(value, (*place, key))
    elif isinstance(plain, list):
        for number, value in enumerate(plain):
            yield from places(value, (*place, number))


@st.composite
def with_another_value(draw: st.DrawFn, document: Any) -> Any:
    """Give what JSON holds with another value in one place, or none there."""
    place = draw(st.sampled_from(list(places(document))))
    value = draw(PLAIN)
    if not place:
        return value
    changed = copy.deepcopy(document)
    holder = changed
    for step in place[:-1]:
        holder = holder[step]
    if draw(st.booleans()):
        holder[place[-1]] = value
    else:
        del holder[place[-1]]
    return changed


@st.composite
def damaged_json(draw: st.DrawFn, content: bytes) -> bytes:
    """Give a JSON text damaged in its bytes, or in its values."""
    if draw(st.booleans()):
        return draw(damaged(content))
    return json.dumps(draw(with_another_value(json.loads(content)))).encode()


def put(path: Path, content: bytes | None) -> None:
    """Put a content in a file's place; a directory for None."""
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
