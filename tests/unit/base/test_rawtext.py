"""Bytes that are no text: kept, encoded again, and shown."""

from __future__ import annotations

import io
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pycloudlib._base import documents

CUT_OFF = "тест".encode()[:7]
"""A name that was cut within a character, as the kernel cuts one of 15 bytes."""


@given(st.binary())
def test_any_bytes_come_through(data: bytes) -> None:
    text = documents.from_bytes(data)

    assert documents.to_bytes(text) == data
    assert documents.to_bytes(json.loads(documents.escape_json(json.dumps(text)))) == data
    document = documents.escape_json(json.dumps(text, ensure_ascii=False))
    assert json.loads(document.encode()) == text
    documents.escape_bytes(text).encode()
    assert len(documents.escape_line(text).splitlines()) <= 1


def test_what_is_no_text_is_shown_by_its_bytes() -> None:
    assert documents.escape_bytes(documents.from_bytes(CUT_OFF)) == "тес\\xd1"
    assert documents.escape_bytes("a\nb") == "a\nb"
    assert documents.escape_line("a\nb\x1b[31m") == "a\\x0ab\\x1b[31m"


@pytest.mark.parametrize(
    ("encoding", "written"),
    [("utf-8", "тес\\xd1 é".encode()), ("latin-1", b"\\u0442\\u0435\\u0441\\xd1 \xe9")],
)
def test_stream_shows_what_its_encoding_has_not(encoding: str, written: bytes) -> None:
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding=encoding, errors=documents.ESCAPED)

    print(f"{documents.from_bytes(CUT_OFF)} é", end="", file=stream, flush=True)

    assert buffer.getvalue() == written


def test_kernel_s_files_may_hold_anything(tmp_path: os.PathLike[str]) -> None:
    file = os.path.join(tmp_path, "comm")  # noqa: PTH118 - a str is taken, too
    with open(file, "wb") as written:  # noqa: PTH123
        written.write(CUT_OFF)

    assert documents.to_bytes(documents.read_kernel_file(file)) == CUT_OFF
