"""What the tutorials tell people to type works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.doc_blocks import ROOT, find_blocks

pytestmark = pytest.mark.guest

TUTORIALS = ROOT / "docs" / "tutorial"
LIMIT = 900


def code_of(tutorial: str) -> str:
    """Give the Python of a tutorial, all of it in one file."""
    return "\n".join(block.text for block in find_blocks("python", [TUTORIALS / tutorial]))


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


@pytest.mark.usefixtures("working_dir")
def test_first_test_suite(saved: str, tmp_path: Path) -> None:
    (tmp_path / "test_greeting.py").write_text(code_of("first-test-suite.md"))
    (tmp_path / "pytest.ini").write_text(f"[pytest]\nvm_image = {saved}\n")

    done = run(tmp_path, "-m", "pytest")

    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


@pytest.mark.thorough
def test_first_machine(tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text(code_of("first-machine.md"))

    done = run(tmp_path, "first.py")

    assert done.returncode == 0, done.stderr
    assert "hello" in done.stdout
    assert done.stdout.count("[]") == 2
