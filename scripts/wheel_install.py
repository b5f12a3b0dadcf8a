"""An installation of a package as users have it: in an environment of its own, nothing else."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Installation:
    """A virtual environment that holds a package and its dependencies, not even pip.

    Attributes:
        python: Its interpreter.
        site_packages: Where everything is.
    """

    python: Path
    site_packages: Path

    @classmethod
    def at(cls, directory: Path) -> Installation:
        """Give the one in a directory."""
        (site_packages,) = directory.glob("lib/python3.*/site-packages")
        return cls(directory / "bin" / "python", site_packages)

    @property
    def size(self) -> int:
        """Bytes of all files, the compiled ones included."""
        return sum(file.stat().st_size for file in self.site_packages.rglob("*") if file.is_file())

    def run(self, code: str) -> str:
        """Run Python code away from the checkout; give what it printed."""
        # -I: neither the environment's nor the directory's modules are seen.
        return _run(str(self.python), "-I", "-c", code, directory=self.python.parent)


@contextlib.contextmanager
def open_installation(wheel: Path) -> Iterator[Installation]:
    """Install a wheel with its dependencies; it is gone after the block."""
    with tempfile.TemporaryDirectory(prefix="pycloudlib-wheel-") as name:
        yield install(str(wheel.resolve()), Path(name).resolve())


def install(requirement: str, directory: Path) -> Installation:
    """Install what pip is to find (a wheel, `name==version`) with its dependencies."""
    venv.create(directory, symlinks=True)
    pip = (sys.executable, "-m", "pip", "--python", str(directory / "bin" / "python"))
    _run(*pip, "install", requirement, directory=directory)
    _run(*pip, "check", directory=directory)
    return Installation.at(directory)


def _run(*command: str, directory: Path) -> str:
    """Run a command; its output is of interest when it fails."""
    finished = subprocess.run(command, cwd=directory, text=True, capture_output=True, check=False)
    if finished.returncode != 0:
        raise SystemExit(f"failed: {shlex.join(command)}\n{finished.stdout}{finished.stderr}")
    return finished.stdout.strip()
