"""The environments of the two packages: installed side by side, each with nothing else."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from scripts.wheel_install import Installation, install

ORIGINAL = "pycloudlib==1!11.1.10"
"""The version of the original that is measured."""


@dataclass(frozen=True, slots=True)
class Environment:
    """Where one of the packages is installed.

    Attributes:
        installation: The virtual environment.
        requirement: What was installed.
    """

    installation: Installation
    requirement: str

    def count_packages(self) -> int:
        """Give how many distributions are installed."""
        return len(list(self.installation.site_packages.glob("*.dist-info")))


def make_original(directory: Path) -> Environment:
    """Install the original, unless that has been done."""
    state = directory / "installed"
    wanted = f"{ORIGINAL} {sys.version}\n"
    if not (state.exists() and state.read_text() == wanted):
        _remake(directory, ORIGINAL)
        state.write_text(wanted)
    return Environment(Installation.at(directory), ORIGINAL)


def make_ours(directory: Path, wheel: Path) -> Environment:
    """Install this package's wheel; anew each time, since it may have been made anew."""
    _remake(directory, str(wheel.resolve()))
    return Environment(Installation.at(directory), wheel.name)


def _remake(directory: Path, requirement: str) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    install(requirement, directory)
