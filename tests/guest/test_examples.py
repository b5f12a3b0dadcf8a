"""The examples do what they say, on copies of the machine that is saved for many tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = pytest.mark.guest

EXAMPLES = ROOT / "examples"
LIMIT = 600


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=LIMIT, check=False
    )


@pytest.mark.usefixtures("working_dir")
def test_package_suite(saved: str, tmp_path: Path) -> None:
    options = ("-p", "no:cacheprovider", f"--rootdir={EXAMPLES}", f"--vm-image={saved}")

    done = run("-m", "pytest", EXAMPLES / "package_suite", *options)

    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


def test_eight_forks(saved: str) -> None:
    done = run(EXAMPLES / "eight_forks.py", saved)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed  ") == 8


def test_compare_user_data(saved: str, tmp_path: Path) -> None:
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text("#cloud-config\ntimezone: Europe/Vienna\n")
    other.write_text(
        "#cloud-config\ntimezone: Europe/Vienna\n"
        "write_files: [{path: /var/tmp/extra, content: more}]\nusers: [default, {name: guest}]\n"
    )

    done = run(EXAMPLES / "compare_user_data.py", one, other, saved)

    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert {"+ file /var/tmp/extra", "+ user guest", "~ file /etc/passwd"} <= set(lines)
    assert [line for line in lines if line.startswith("-")] == []
    assert not any("localtime" in line or "setting" in line for line in lines)


@pytest.mark.thorough
def test_compare_equal_user_data(image: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("#cloud-config\ntimezone: Europe/Vienna\n")

    done = run(EXAMPLES / "compare_user_data.py", config, config, image)

    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_serial_login(saved: str) -> None:
    done = run(EXAMPLES / "serial_login.py", saved)

    assert done.returncode == 0, done.stderr
    assert "/dev/ttyS0" in done.stdout
    assert "42 is the answer" in done.stdout
