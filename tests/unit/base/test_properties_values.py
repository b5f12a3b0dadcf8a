"""Whatever is written down is read back equal, and whatever else is there is told of."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pycloudlib._base.documents import decode, parse_json, parse_yaml, safe_repr
from tests.unit.hostile import NAMES, PLAIN, TOO_DEEP, with_another_value


class Colour(enum.Enum):
    RED = "red"
    BLUE = 2


@dataclasses.dataclass(frozen=True)
class Inner:
    number: float
    flag: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Outer:
    text: str
    count: int
    colour: Colour
    path: Path
    inner: Inner | None
    pair: tuple[str, int]
    many: tuple[Inner, ...] = ()
    maybe: str | None = None


FILE_NAMES = st.builds(os.fsdecode, st.binary(min_size=1).filter(lambda name: b"\0" not in name))
INNERS = st.builds(Inner, st.floats(allow_nan=False, allow_infinity=False), st.booleans())
OUTERS = st.builds(
    Outer,
    st.text(st.characters(exclude_categories=())),
    st.integers(),
    st.sampled_from(Colour),
    FILE_NAMES.map(Path),
    st.none() | INNERS,
    st.tuples(st.text(), st.integers()),
    st.lists(INNERS, max_size=3).map(tuple),
    st.none() | st.text(),
)
EXAMPLE = Outer("a", 1, Colour.RED, Path("/b"), Inner(0.5, True), ("c", 2), (Inner(1.5, False),))


def write(value: Any) -> Any:
    def plain(part: object) -> object:
        return part.value if isinstance(part, enum.Enum) else str(part)

    return json.dumps(dataclasses.asdict(value), default=plain)


@given(OUTERS)
def test_value_is_read_back_equal(value: Outer) -> None:
    assert decode(Outer, parse_json(write(value))) == value


@given(with_another_value(json.loads(write(EXAMPLE))) | PLAIN)
@example({**json.loads(write(EXAMPLE)), "count": True})
@example({**json.loads(write(EXAMPLE)), "path": "\ud800"})
@example({**json.loads(write(EXAMPLE)), "inner": {"number": 10**400, "flag": True}})
@example({**json.loads(write(EXAMPLE)), "colour": [Colour.RED]})
def test_other_value_is_of_the_right_type_or_refused(plain: Any) -> None:
    try:
        value = decode(Outer, plain)
    except ValueError as error:
        assert str(error)
    else:
        assert decode(Outer, json.loads(write(value))) == value


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"inner": {"number": "x", "flag": True}}, "inner.number is 'x', expected a number"),
        ({"many": [{"number": 1}]}, r"many\[0\].flag is missing"),
        ({"more": 1}, "more is not known"),
        ({"pair": ["c"]}, r"pair is \['c'\], expected a list of 2"),
        ({"colour": "green"}, "colour is 'green', expected one of 'red', 2"),
    ],
)
def test_place_and_value_are_told(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        decode(Outer, {**json.loads(write(EXAMPLE)), **change})


@given(st.text() | st.binary())
@example("[" * TOO_DEEP)
@example("1" * 5000)
def test_json_is_parsed_or_refused(text: str | bytes) -> None:
    try:
        parse_json(text)
    except ValueError as error:
        assert str(error)


@given(st.text(max_size=40) | st.binary(max_size=40))
@example("[" * 1000)
@example("a: 2001-99-99")
@example('!!int ""')
@example("!!bool x")
@example("!!timestamp x")
@example("? []\n: 1")
@example("\ud800")
def test_yaml_is_parsed_or_refused(text: str | bytes) -> None:
    try:
        parse_yaml(text)
    except ValueError as error:
        assert str(error)


@given(PLAIN | NAMES)
@example(16**6000)
def test_any_value_can_be_shown_in_an_error(value: object) -> None:
    assert 0 < len(safe_repr(value)) < 300
