"""Names that are private to a module are used there alone: by the code, and by tests.

What a test needs of a module is an argument, or a public name that says what it is for.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests import ROOT

HERE = Path(__file__)
FOLDERS = ("src/pycloudlib", "tests", "scripts", "benchmarks", "examples")
# Without this one, which has examples of them.
FILES = sorted({*(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))} - {HERE})

# What clients override and call: see the end of `instance.py` and of `cloud.py`.
HOOKS = {
    "_check_alive",
    "_check_and_set_config",
    "_do_restart",
    "_ended_early",
    "_endpoint",
    "_file_port",
    "_find_boot_id",
    "_forget_client",
    "_get_ssh_keys",
    "_has_settled",
    "_host_keys",
    "_is_connected",
    "_log",
    "_lookout",
    "_seen_warnings",
    "_ssh",
    "_ssh_connect",
    "_type",
    "_validate_tag",
    "_wait_for_cloudinit",
    "_wait_for_execute",
}
# Of the standard library, of click, and of paramiko, whose server these tests let send what none
# does.
FOREIGN = {
    "_Hash",
    "_PYCLOUDLIB_COMPLETE",
    "_asdict",
    "_exit",
    "_fields",
    "_getframe",
    "_replace",
    "_send_message",
}
# A folder, two modules and a name of the contract.
PACKAGES = {"_base", "_otherclouds", "_version", "_BaseLXD"}
ALLOWED = HOOKS | FOREIGN | PACKAGES

_SUSPECT = re.compile(
    r"(?<!\bself)(?<!\bcls)(?<!super\(\))(?<!\bpycloudlib)\._[A-Za-z]"
    r"|import .*\b_[A-Za-z]"
    r"|[\"']_[A-Za-z]"
)
_PRIVATE = re.compile(r"_[A-Za-z]\w*")
_IN_PROGRAM = re.compile(r"\b(?!self\b|cls\b)\w+\.(_[A-Za-z]\w*)")


def find_foreign_names(source: str) -> Iterator[tuple[int, str]]:
    """Find the private names in a source that are not its own; with their lines."""
    if not _SUSPECT.search(source):
        return  # it is not worth parsing
    nodes = list(ast.walk(ast.parse(source)))
    own = ALLOWED | {name for node in nodes for name in _names_defined(node)}
    for node in nodes:
        for name in _names_used(node):
            if name not in own:
                yield getattr(node, "lineno", 0), name


def _names_defined(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node):
        yield node.attr


def _names_used(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom):
        yield from (alias.name for alias in node.names if _PRIVATE.fullmatch(alias.name))
    elif isinstance(node, ast.Attribute) and not _is_own(node):
        yield from _private(node.attr)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("etattr", "delattr")):
        names = [value for value in node.args if not _is_self(value)]
        yield from _private_texts(names if len(names) == len(node.args) else [])
    elif isinstance(node, (ast.Call, ast.Tuple)):
        # A table of what is replaced, or a helper that does it.
        values = node.args if isinstance(node, ast.Call) else node.elts
        if values and not isinstance(values[0], ast.Constant):
            yield from _private_texts(values[1:])
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value:
        yield from _IN_PROGRAM.findall(node.value)


def _private_texts(values: Iterable[ast.expr]) -> Iterator[str]:
    for value in values:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield from _private(*value.value.split("."))


def _is_self(value: ast.expr) -> bool:
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def _private(*names: str) -> Iterator[str]:
    yield from (name for name in names if _PRIVATE.fullmatch(name))


def _is_own(node: ast.Attribute) -> bool:
    value = node.value
    if isinstance(value, ast.Call):
        return getattr(value.func, "id", "") == "super"
    return _is_self(value)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from pycloudlib.util import _x", ["_x"]),
        ("from pycloudlib import _base", []),
        ("util._x", ["_x"]),
        ("monkeypatch.setattr(util, '_x', 1)", ["_x"]),
        ("monkeypatch.setattr('pycloudlib.util._x', 1)", ["_x"]),
        ("getattr(self, '_x', None)", []),
        ("MOMENTS = ((util, '_x'), (util, 'y'))", ["_x"]),
        ("PROGRAM = 'import util\\nutil._x'", ["_x"]),
        ("self._x", []),
        ("super()._x()", []),
        ("def _x(): pass\nother._x()", []),
        ("instance._ssh_connect()", []),
        ("os._exit(0)", []),
    ],
)
def test_private_names_of_others_are_found(source: str, found: list[str]) -> None:
    assert [name for _, name in find_foreign_names(source)] == found


def test_private_names_are_used_where_they_are() -> None:
    places = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in FILES
        for line, name in find_foreign_names(path.read_text(encoding="utf-8"))
    ]
    assert places == []
