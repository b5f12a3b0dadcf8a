"""Rules for the source that no linter checks."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import pycloudlib

SOURCES = sorted(Path(pycloudlib.__file__).parent.rglob("*.py"))
_TEXT_MODE = re.compile(r"[rwax+t]{1,3}")
_COPIES = {"copy", "copy2", "copyfile", "copytree"}


def _name(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def _module(call: ast.Call) -> str:
    value = getattr(call.func, "value", None)
    return value.id if isinstance(value, ast.Name) else ""


def _is_text_without_an_encoding(call: ast.Call) -> bool:
    given = {keyword.arg for keyword in call.keywords}
    name, arguments = _name(call), call.args
    values = [*arguments, *(keyword.value for keyword in call.keywords)]
    modes = [value.value for value in values if isinstance(value, ast.Constant)]
    is_text = any(isinstance(mode, str) and _TEXT_MODE.fullmatch(mode) for mode in modes)
    if "encoding" in given or _module(call) == "tarfile":
        return False
    if isinstance(call.func, ast.Name) and name == "open":
        return is_text or (len(arguments) == 1 and "mode" not in given)
    if name == "open":
        return is_text or not (arguments or given)
    if name == "fdopen":
        return is_text or len(arguments) == 1
    if name in ("read_text", "write_text"):
        return len(arguments) == (name == "write_text")
    pipes = {"stdin", "stdout", "stderr", "capture_output"}
    return bool(given & {"text", "universal_newlines"}) and bool(given & pipes)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("open(path, mode='w')", True),
        ("open(path, 'rb')", False),
        ("open(path, encoding='utf-8')", False),
        ("path.open()", True),
        ("path.open('a')", True),
        ("os.open(path, flags)", False),
        ("os.fdopen(number, 'w')", True),
        ("os.fdopen(number)", True),
        ("path.read_text()", True),
        ("path.read_text('utf-8')", False),
        ("path.write_text(text)", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("Popen(argv, text=True, stdout=PIPE)", True),
        ("Popen(argv, text=True, stdout=PIPE, encoding='utf-8')", False),
    ],
)
def test_text_without_an_encoding_is_found(text: str, wrong: bool) -> None:
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    assert _is_text_without_an_encoding(call) is wrong


@functools.cache
def _calls() -> list[tuple[Path, ast.Call]]:
    """Return every call in the source."""
    return [
        (source, node)
        for source in SOURCES
        for node in ast.walk(ast.parse(source.read_bytes()))
        if isinstance(node, ast.Call)
    ]


def _places(wanted: Callable[[ast.Call], bool]) -> list[str]:
    return [f"{source}:{call.lineno}" for source, call in _calls() if wanted(call)]


def test_no_text_is_read_or_written_as_the_locale_has_it() -> None:
    """The same file would be another text, or none, with `LC_ALL=C`."""
    assert _places(_is_text_without_an_encoding) == []


def test_no_error_is_made_of_the_class_of_another() -> None:
    """Its constructor may take anything: `type(error)(text)` is a `TypeError` then."""

    def is_of_a_class_found(call: ast.Call) -> bool:
        inner = call.func
        of_type = isinstance(inner, ast.Call) and _name(inner) == "type"
        return of_type or _name(call) == "__class__"

    assert _places(is_of_a_class_found) == []


def test_files_are_copied_so_that_only_their_owner_can_read_them() -> None:
    """By `copy_private`, not with the modes of what is copied, or of the umask."""
    found = _places(lambda call: _module(call) == "shutil" and _name(call) in _COPIES)
    # What is copied there is a keyring that everybody has, for mmdebstrap's own user.
    assert [place for place in found if "/assembly.py:" not in place] == []
