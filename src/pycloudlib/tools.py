"""Programs of the host that this package runs: found, started, and their failures told."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pycloudlib.errors import MissingPrerequisiteError, ToolError

PACKAGES = {
    "dpkg": "dpkg",
    "gpgv": "gpgv",
    "grub-mkimage": "grub-common",
    "mcopy": "mtools",
    "mke2fs": "e2fsprogs",
    "mkfs.vfat": "dosfstools",
    "mmdebstrap": "mmdebstrap",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "sfdisk": "fdisk",
    "unshare": "util-linux",
}
"""The Debian and Ubuntu package of each program."""

# Where administrators' programs live; an ordinary user's PATH on Debian leaves them out.
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def find_tool(name: str) -> Path:
    """Find a host program by name or path.

    Raises:
        MissingPrerequisiteError: It is not there, or is not executable; names it and its package.
    """
    search_path = os.pathsep.join((os.environ.get("PATH", os.defpath), *_SBIN))
    found = shutil.which(name, path=search_path)
    if found is None:
        package = PACKAGES.get(Path(name).name)
        hint = f"; on Debian and Ubuntu install the package {package!r}" if package else ""
        raise MissingPrerequisiteError(f"The program {name!r} was not found{hint}")
    return Path(found)


def run_tool(
    step: str, argv: Sequence[str | Path], *, input_bytes: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """Run a short host program to its end.

    Args:
        step: What it is run for, as it should read in an error.
        argv: The program, as `find_tool` finds it, and its arguments.
        input_bytes: What it reads on standard input; nothing by default.

    Returns:
        The finished process with its `stdout` and `stderr` as bytes.

    Raises:
        MissingPrerequisiteError: The program is not installed.
        ToolError: It ended with an error.
    """
    command = [str(find_tool(str(argv[0]))), *map(str, argv[1:])]
    finished = subprocess.run(command, capture_output=True, check=False, input=input_bytes)
    if finished.returncode != 0:
        output = (finished.stderr + finished.stdout).decode(errors="replace")
        raise ToolError(step, command, finished.returncode, output)
    return finished
