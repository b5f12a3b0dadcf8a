"""The workflow of continuous integration asks for what there is; `make lint` checks its form."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def read(workflow: Path) -> dict[Any, Any]:
    document: dict[Any, Any] = yaml.safe_load(workflow.read_text("utf-8"))
    return document


def steps_of(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in read(workflow)["jobs"].values() for step in job["steps"]]


def find_missing(command: str) -> list[str]:
    """Find what a step's command asks for and this checkout does not have.

    That is targets of make, and scripts that cannot be executed.
    """
    missing = []
    for line in command.splitlines():
        program, *arguments = shlex.split(line, comments=True) or [""]
        if program == "make":
            asked = [word for word in arguments if not word.startswith("-") and "=" not in word]
            missing += [word for word in asked if word not in TARGETS]
        elif "/" in program and not os.access(ROOT / program, os.X_OK):
            missing.append(program)
    return missing


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("make test PYTEST_ARGS='-k copy'", []),
        ("make tset", ["tset"]),
        (".ci/run\nmake setup nothing", ["nothing"]),
        ("scripts/gone.sh", ["scripts/gone.sh"]),
        ("scripts/doc_blocks.py", ["scripts/doc_blocks.py"]),
        ("date +%G", []),
    ],
)
def test_what_is_missing_is_found(command: str, missing: list[str]) -> None:
    assert find_missing(command) == missing


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_steps_ask_for_what_there_is(workflow: Path) -> None:
    commands = [step["run"] for step in steps_of(workflow) if "run" in step]
    assert {"make kvm", "make checks", "make bench"} <= set(commands)
    assert [missing for command in commands for missing in find_missing(command)] == []
    # What anybody may write into a title or an input would be run by the shell.
    assert [command for command in commands if "${{" in command] == []


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_jobs_may_only_read_and_end_by_themselves(workflow: Path) -> None:
    document = read(workflow)
    assert document["permissions"] == {"contents": "read"}
    for job in document["jobs"].values():
        assert "permissions" not in job
        assert 0 < job["timeout-minutes"] <= 120
    used = [step["uses"] for step in steps_of(workflow) if "uses" in step]
    assert used
    assert [action for action in used if not re.fullmatch(r"actions/[a-z-]+@v[0-9]+", action)] == []


def test_every_supported_python_is_tried() -> None:
    (workflow,) = WORKFLOWS
    tried = read(workflow)["jobs"]["checks"]["strategy"]["matrix"]["python"]
    told = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text("utf-8"))
    assert tried == told
