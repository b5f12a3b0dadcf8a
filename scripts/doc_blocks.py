"""The code in the documentation, to be checked: each document's Python as one program.

python -m scripts.doc_blocks    type-checks it
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(
    r"^```(?P<language>[\w{}-]*)[^\n]*\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_TARGET = ROOT / "build" / "doc_blocks"

# What a document may speak of without making it.
_GIVEN = {
    "cloud": "Qemu",
    "error": "PycloudlibException",
    "image": "str",
    "instance": "QemuInstance",
    "machine": "QemuInstance",
    "vm": "QemuInstance",
}
# What arguments of tests and fixtures are called.
_FIXTURES = {
    "installed": "str",
    "machine": "QemuInstance",
    "prepare_vm": "PrepareVm",
    "qemu_cloud": "Qemu",
    "shared_vm": "QemuInstance",
    "vm": "QemuInstance",
    "vm_factory": "VmFactory",
    "vm_image": "str",
}
_IMPORTS = """\
from pycloudlib import Qemu
from pycloudlib.pytest_plugin import PrepareVm, VmFactory
from pycloudlib.errors import PycloudlibException
from pycloudlib.qemu.instance import QemuInstance
"""


@dataclass(frozen=True)
class Block:
    """Some code in a document.

    Attributes:
        document: The document.
        line: Where it stands there.
        text: The code.
    """

    document: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def find_blocks(language: str, documents: Sequence[Path] = DOCUMENTS) -> list[Block]:
    """List the code of a language."""
    return [
        Block(document, content.count("\n", 0, match.start()) + 1, match["text"])
        for document in documents
        for content in (document.read_text(),)
        for match in FENCE.finditer(content)
        if match["language"] == language
    ]


def write_programs(target: Path) -> Iterator[Path]:
    """Write a program for each document that has Python in it."""
    for document in DOCUMENTS:
        blocks = find_blocks("python", [document])
        if blocks:
            name = "_".join(document.relative_to(ROOT).with_suffix("").parts)
            file = target / f"{re.sub(r'[^A-Za-z0-9_]', '_', name)}.py"
            code = "\n".join(block.text for block in blocks)
            file.write_text(_IMPORTS + _declare_given(code) + _annotate(code))
            yield file


def _declare_given(code: str) -> str:
    names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    used = {node.id for node in names} - made
    return "".join(f"{name}: {kind}\n" for name, kind in _GIVEN.items() if name in used)


def _annotate(code: str) -> str:
    """Annotate what tests and fixtures take, as their readers know what it is."""
    tree = ast.parse(code)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for argument in function.args.args:
                if argument.annotation is None and argument.arg in _FIXTURES:
                    argument.annotation = ast.Name(_FIXTURES[argument.arg])
    return ast.unparse(tree)


def main() -> int:
    """Type-check the Python of all documents."""
    shutil.rmtree(_TARGET, ignore_errors=True)
    _TARGET.mkdir(parents=True)
    files = list(write_programs(_TARGET))
    # A document tells of variants: the same name may be made twice.
    options = ["--config-file=", "--check-untyped-defs", "--disable-error-code=no-redef"]
    options += ["--ignore-missing-imports", "--allow-redefinition", "--scripts-are-modules"]
    return subprocess.run([sys.executable, "-m", "mypy", *options, *files], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
