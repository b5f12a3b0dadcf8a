"""Write the reference of the command line from the help of its commands.

python -m scripts.command_line            writes docs/reference/command-line.md
python -m scripts.command_line --check    checks that it is up to date
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from pycloudlib.cli.app import PROGRAM, application
from pycloudlib.cli.common import MEANINGS
from pycloudlib.cli.doctor import Check
from pycloudlib.cli.imagecommands import ImageFacts
from pycloudlib.cli.reports import MachineFacts

TARGET = Path(__file__).resolve().parent.parent / "docs" / "reference" / "command-line.md"
_WIDTH = 96
_COMMON = ("verbose", "quiet", "help")

_INTRODUCTION = f"""\
# The command line

<!-- Written by scripts/command_line.py; change the help of the commands instead. -->

The command is `{PROGRAM}`, or `python -m {PROGRAM}`. This page lists all commands and options;
[another](../how-to/use-the-command-line.md) shows how to use them.

Every command takes `-v` (print each action; `-vv`: everything, with tracebacks), `-q` (no progress,
notes or warnings) and `-h`. Results go to standard output; notes, progress, warnings and errors to
standard error. Progress and colours are for terminals only; `NO_COLOR` forbids colours.

NAME is the name of a machine; for one of another program its cloud and name, `CLOUD/NAME`, as
`list --all` shows it. IMAGE is a release (`noble`, `24.04`, `lts`, `bookworm`), the name of a
snapshot, a build on this host (`noble/20260930`), or a path.

The command line and programs have the same [configuration](configuration.md).
"""


def write() -> str:
    """Return the text of the reference."""
    sections = [_INTRODUCTION, _exit_codes(), "## Commands\n"]
    sections += [_describe(name, command) for name, command in _commands(application, "")]
    sections.append(_json())
    return "\n".join(sections)


def _commands(group: click.Group, prefix: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _exit_codes() -> str:
    lines = ["## Exit codes", "", "| code | meaning |", "|---|---|"]
    lines += [f"| {int(code)} | {meaning} |" for code, meaning in MEANINGS.items()]
    lines.append("")
    lines.append("`exec` and `shell` end with the exit status of what they ran, if it ran.")
    lines.append("For several machines, the code is that of the first that failed.")
    return "\n".join([*lines, ""])


def _describe(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=f"{PROGRAM} {name}", terminal_width=_WIDTH)
    # The introduction describes the options of every command.
    options = [
        record
        for parameter in command.params
        if isinstance(parameter, click.Option) and parameter.name not in _COMMON
        for record in (parameter.get_help_record(context),)
        if record is not None
    ]
    text = inspect.cleandoc(command.help or "")
    blocks = "".join(f"\n{block}\n" for block in _blocks(text))
    usage = command.get_usage(context).removeprefix("Usage: ")
    rows = [f"| `{names}` | {meaning} |" for names, meaning in options]
    table = "\n| option | |\n|---|---|\n" + "\n".join(rows) + "\n" if rows else ""
    return f"### {name}\n\n```text\n{usage}\n```\n{blocks}{table}"


def _blocks(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\n+", text):
        if paragraph.startswith("\b\n"):
            yield f"```text\n{paragraph.removeprefix(chr(8)).strip()}\n```"
        else:
            yield paragraph.replace("\n", " ")


def _json() -> str:
    parts = [
        "## JSON\n",
        "What `--json` prints is stable: keys are added, but never removed or given another",
        "meaning. `list`, `info`, `images list` and `doctor` print a list of objects, `launch` one",
        "like those of `info`; `prune` and `images prune` a list of strings; `diagnose` an object",
        "with the fields of `pycloudlib.diagnosis.Diagnosis`, whose `cause` is the name of one of",
        "`pycloudlib.diagnosis.Cause`, and with `hint`: what to try.\n\n"
        "A path that is not UTF-8 has an escape for each byte that is not, `\\udcf6` for the byte\n"
        "f6: Python's `os.fsencode` returns the path.\n",
    ]
    titles = {
        MachineFacts: "A machine (`list`, `info`, `launch`)",
        ImageFacts: "An image (`images list`)",
        Check: "A check (`doctor`)",
    }
    for kind, title in titles.items():
        parts.append(f"### {title}\n\n| key | meaning |\n|---|---|")
        meanings = _attributes(inspect.getdoc(kind) or "")
        parts += [
            f"| `{field.name}` | {meanings[field.name]} |" for field in dataclasses.fields(kind)
        ]
        parts.append("")
    return "\n".join(parts)


def _attributes(docstring: str) -> dict[str, str]:
    """Parse the section of attributes of a docstring."""
    _, _, section = docstring.partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if match := re.match(r" {4}(\w+): (.*)", line):
            name = match[1]
            found[name] = match[2]
        elif name:
            found[name] += f" {line.strip()}"
    return found


def main() -> int:
    """Write the reference, or check it."""
    text = write()
    if "--check" in sys.argv[1:]:
        if TARGET.read_text() == text:
            return 0
        print(f"{TARGET} is out of date: python -m scripts.command_line writes it", file=sys.stderr)
        return 1
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
