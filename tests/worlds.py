"""Other PID namespaces for tests: programs that run in one, as in a container."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ENTER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
"""Run what follows in a PID namespace of its own; all in it end with `unshare`."""
WITHOUT_PROC = ENTER[:-1]
"""The same, but /proc shows the namespace outside."""


def unsharing(command: tuple[str, ...] = ENTER) -> list[str]:
    """Give the beginning of a command that is to run in another PID namespace; skip without one."""
    more = [] if os.geteuid() == 0 else ["--user", "--map-current-user"]
    whole = [command[0], *more, *command[1:]]
    tried = subprocess.run([*whole, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"this kernel gives no PID namespace: {tried.stderr.strip()}")
    return whole


def run_inside(program: str, *arguments: str, command: tuple[str, ...] = ENTER) -> str:
    """Run a Python program in another PID namespace to its end; give what it printed."""
    done = subprocess.run(
        [*unsharing(command), sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
