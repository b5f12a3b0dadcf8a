from __future__ import annotations

import ast
import importlib
import itertools
import logging
import re
import shlex
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from pycloudlib._base.tools import PACKAGES
from pycloudlib.cli.app import application
from pycloudlib.config import ENVIRONMENT_VARIABLE
from pycloudlib.qemu.state.settings import QemuSettings
from scripts import command_line, transcript
from scripts.doc_blocks import DOCUMENTS, FENCE, ROOT, Block, find_blocks
from tests.unit.project import test_imports

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SOURCE = ROOT / "src" / "pycloudlib"
CONFIGURATION = ROOT / "docs" / "reference" / "configuration.md"
PLUGIN = SOURCE / "pytest_plugin" / "plugin.py"
DESIGN = ROOT / "docs" / "explanation" / "design.md"

PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.svg"))

SHARED_KEYS = {"public_key_path", "private_key_path", "key_name"}
"""Keys that the base class of clouds reads, for every cloud."""

# Every Debian and Ubuntu system has these.
ESSENTIAL_PACKAGES = {"dpkg", "util-linux"}

_SVG = "{http://www.w3.org/2000/svg}"
_PICTURE = re.compile(r"!\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+\.svg)\)")
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_HEADING = re.compile(r"^#+ (?P<title>.+)$", re.MULTILINE)


def find_links(document: Path) -> Iterator[str]:
    prose = FENCE.sub("", document.read_text())
    for match in _LINK.finditer(prose):
        if "://" not in match["target"]:
            yield match["target"]


def anchor(title: str) -> str:
    """Give the name that a heading has in links."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def anchors(document: Path) -> set[str]:
    prose = FENCE.sub("", document.read_text())
    return {anchor(match["title"]) for match in _HEADING.finditer(prose)}


def list_setup_programs() -> dict[str, str]:
    """Give the programs that the setup script looks for, with their packages."""
    script = (ROOT / "scripts" / "setup.sh").read_text()
    return dict(re.findall(r'^    "([^/|"]+)\|([^|"]+)\|[^|"]+"$', script, re.MULTILINE))


def test_there_are_documents_with_code() -> None:
    assert {ROOT / "README.md", CONFIGURATION, DESIGN} <= set(DOCUMENTS)
    assert len(find_blocks("python")) > 10


@pytest.mark.parametrize("block", find_blocks("python"), ids=str)
def test_python_blocks_compile(block: Block) -> None:
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize("block", find_blocks("python"), ids=str)
def test_python_blocks_import_what_there_is(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []


@pytest.mark.parametrize("block", find_blocks("toml"), ids=str)
def test_toml_blocks_have_known_keys(block: Block, caplog: pytest.LogCaptureFixture) -> None:
    section = tomllib.loads(block.text)["qemu"]
    assert section
    # Paths of an example exist nowhere; that a key is known does not depend on its value.
    values = dict.fromkeys(section)
    with caplog.at_level(logging.WARNING):
        QemuSettings.parse(values, str(block))
    assert caplog.messages == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(document: Path) -> None:
    for link in find_links(document):
        path, _, fragment = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        if fragment:
            assert fragment in anchors(target), link


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.stem)
def test_pictures_need_nothing_else_and_know_light_and_dark(picture: Path) -> None:
    text = picture.read_text()
    root = ET.fromstring(text)
    assert root.findtext(f"{_SVG}title")
    (style,) = (element.text or "" for element in root.iter(f"{_SVG}style"))
    light, _, dark = style.partition("@media (prefers-color-scheme: dark)")
    used = {name for element in root.iter() for name in element.get("class", "").split()}
    for name in used:
        assert f".{name} {{" in light
        if re.search(rf"\.{name} {{ [^}}]*#", light):
            assert f".{name} {{" in dark
    assert re.findall(r"href|@import|<script|<image|url\((?!#)", text) == []
    # One look for all of them.
    assert style in PICTURES[0].read_text()


def test_pictures_are_shown_with_words_for_those_who_cannot_see_them() -> None:
    shown = [
        ((document.parent / match["target"]).resolve(), match["text"])
        for document in DOCUMENTS
        for match in _PICTURE.finditer(document.read_text())
    ]
    assert {path for path, _ in shown} == set(PICTURES)
    assert [path.name for path, text in shown if len(text.split()) < 10] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_draw_no_pictures_with_characters(document: Path) -> None:
    assert re.findall(r"[\u2500-\u25ff]", document.read_text()) == []


def test_every_document_is_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        document = waiting.pop()
        reached.add(document)
        targets = {
            (document.parent / link.partition("#")[0]).resolve() for link in find_links(document)
        }
        waiting += sorted(target for target in targets - reached if target.suffix == ".md")
    assert reached == set(DOCUMENTS)


def test_every_configuration_key_is_documented() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", CONFIGURATION.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted({*QemuSettings.__slots__, *SHARED_KEYS} - {"cache_dir"})


def test_places_of_the_configuration_file_are_documented() -> None:
    text = CONFIGURATION.read_text()
    # Not from config.DEFAULT_LOCATIONS, which tests replace.
    for place in (ENVIRONMENT_VARIABLE, "~/.config/pycloudlib.toml", "/etc/pycloudlib.toml"):
        assert f"`{place}`" in text


def test_every_dependency_is_accounted_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = {re.split(r"[<>=;\s]", line, maxsplit=1)[0] for line in project["dependencies"]}
    text = DESIGN.read_text()
    assert {name for name in dependencies if f"| `{name}` |" not in text} == set()


def test_every_folder_says_what_it_is_for() -> None:
    folders = {file.parent for file in SOURCE.rglob("*.py")}
    texts = {folder: (folder / "__init__.py").read_text() for folder in folders}
    assert [folder for folder, text in texts.items() if not text.startswith('"""')] == []


def list_folders() -> set[str]:
    """List the folders of the package, but for those of other clouds."""
    return {
        f"{file.parent.relative_to(SOURCE)}/"
        for file in SOURCE.glob("**/__init__.py")
        if file.parent != SOURCE and "placeholders" not in file.read_text()
    }


def test_every_folder_has_its_paragraph_in_the_design() -> None:
    folders = re.findall(r"\*\*`([\w/]+/)`\*\*", DESIGN.read_text())
    assert len(folders) == len(set(folders))
    assert set(folders) == list_folders()


def test_design_and_its_map_follow_the_order_of_imports() -> None:
    order = [f"{name.replace('.', '/')}/" for name in reversed(test_imports.ORDER)]
    expected = [folder for folder in order if folder in list_folders()]
    assert len(expected) > 10
    paragraphs = re.findall(r"\*\*`([\w/]+/)`\*\*", DESIGN.read_text())
    assert [folder for folder in paragraphs if folder in expected] == expected
    rows = ET.parse(ROOT / "docs" / "pictures" / "map.svg").iter(f"{_SVG}text")
    drawn = [row.text or "" for row in rows if row.get("class") == "strong"]
    assert [folder for text in drawn for folder in re.findall(r"[\w/]+/", text)] == expected


def test_coding_style_has_at_most_forty_rules() -> None:
    style = (ROOT / "CONTRIBUTING.md").read_text().partition("## Coding style")[2]
    numbers = re.findall(r"^(\d+)\. ", style.partition("\n## ")[0], re.MULTILINE)
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]
    assert 30 <= len(numbers) <= 40


def test_table_of_changes_names_places_that_exist() -> None:
    table = DESIGN.read_text().partition("## Where do I change")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 10
    for row in rows:
        places = re.findall(r"`([\w/.]+(?:/|\.py))`", row.split("|")[2])
        assert places, row
        assert [place for place in places if not (SOURCE / place).exists()] == []


def test_reference_of_the_command_line_is_up_to_date() -> None:
    assert command_line.TARGET.read_text() == command_line.write(), (
        "python -m scripts.command_line writes it"
    )


def test_every_command_has_its_place_in_the_how_to() -> None:
    text = (ROOT / "docs" / "how-to" / "use-the-command-line.md").read_text()
    assert {name for name in application.commands if f"pycloudlib {name}" not in text} == set()


def test_setup_installs_what_the_package_runs() -> None:
    programs = list_setup_programs()
    sources = "".join(file.read_text() for file in SOURCE.rglob("*.py") if file.name != "tools.py")
    needed = {
        program: package
        for program, package in PACKAGES.items()
        if f'"{program}"' in sources and package not in ESSENTIAL_PACKAGES
    }
    # A package is found by one of its programs.
    assert set(needed.values()) <= set(programs.values())
    assert {name: programs[name] for name in programs if name in PACKAGES} == {
        name: package for name, package in PACKAGES.items() if name in programs
    }


def test_make_help_names_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    explained = re.findall(r"^([a-z]+):.*## .+$", makefile, re.MULTILINE)
    assert sorted(explained) == sorted(phony.split())


def _is_argument(word: str) -> bool:
    return not re.fullmatch(r"[|&<>]+|>.*", word)


def list_shell_lines(program: str) -> list[tuple[str, list[str]]]:
    """List the lines of the documents that call a program, each with where it stands."""
    blocks = [block for language in ("sh", "yaml", "console") for block in find_blocks(language)]
    found = []
    for block in blocks:
        for line in block.text.splitlines():
            words = re.sub(r"^(\$ |- run: )", "", line)
            if words.startswith(f"{program} "):
                call = list(itertools.takewhile(_is_argument, shlex.split(words, comments=True)))
                found.append((str(block), call[1:]))
    return found


@pytest.mark.parametrize(("place", "words"), list_shell_lines("pycloudlib"), ids=str)
def test_commands_in_documents_are_understood(place: str, words: list[str]) -> None:
    command: click.Command = application
    while isinstance(command, click.Group):
        words = list(itertools.dropwhile(lambda word: word.startswith("-"), words))
        found = command.commands.get(words[0])
        assert found is not None, f"{place}: there is no command {words[0]!r}"
        command, words = found, words[1:]
    context = click.Context(command)
    command.make_parser(context).parse_args(list(words))


def test_there_are_commands_in_documents() -> None:
    assert len(list_shell_lines("pycloudlib")) > 30


@pytest.mark.parametrize(("place", "words"), list_shell_lines("make"), ids=str)
def test_make_targets_in_documents_exist(place: str, words: list[str]) -> None:
    targets = re.findall(r"^([a-z]+):", (SOURCE.parents[1] / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in words if "=" not in word} <= set(targets), place


@pytest.mark.parametrize(("place", "words"), list_shell_lines("pytest"), ids=str)
def test_options_of_the_plugin_in_documents_exist(place: str, words: list[str]) -> None:
    known = re.findall(r'addoption\(\s*"(--[\w-]+)"', PLUGIN.read_text())
    assert len(known) == 4
    given = {word.partition("=")[0] for word in words if word.startswith("--vm")}
    assert given <= set(known), place


def test_the_plugin_has_its_reference() -> None:
    text = (ROOT / "docs" / "reference" / "pytest-plugin.md").read_text()
    code = PLUGIN.read_text()
    names = re.findall(r'addoption\(\s*"(--[\w-]+)"', code)
    names += re.findall(r'addini\("(\w+)"', code)
    names += re.findall(r"^@pytest\.fixture.*\ndef ([a-z]\w+)", code, re.MULTILINE)
    assert len(names) == 4 + 5 + 6
    assert [name for name in names if f"`{name}" not in text] == []


def test_transcript_has_every_command_and_what_it_printed() -> None:
    (shown,) = find_blocks("console", [ROOT / "README.md"])
    for command in transcript.COMMANDS:
        assert f"$ {command.format(image='bookworm')}" in shown.text
    assert len(shown.text.splitlines()) > len(transcript.COMMANDS) + 5
