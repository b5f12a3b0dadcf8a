"""What a QEMU build can do, asked of the build itself."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from pycloudlib.descriptors import moved
from pycloudlib.errors import CloudSetupError
from pycloudlib.qemu.command import SANDBOX, Features
from pycloudlib.tools import environment

_log = logging.getLogger(__name__)

_LIMIT_SECONDS = 30
_LONGEST_SAID = 500
_TALK = (
    b'{"execute": "qmp_capabilities"} {"execute": "qom-list-properties", "arguments": '
    b'{"typename": "memory-backend-file"}} {"execute": "quit"}\n'
)


@functools.cache
def find_features(binary: Path) -> Features:
    """Ask a QEMU binary what it can do; remembered for the life of this process.

    Raises:
        CloudSetupError: It is not QEMU, or cannot run here.
    """
    said, problem = _talk(binary)
    if problem:
        raise CloudSetupError(
            f"qemu_binary {str(binary)!r} does not answer as QEMU does: {problem}; expected "
            "qemu-system-x86_64 or a path to one"
        )
    sandbox = not _talk(binary, "-sandbox", SANDBOX)[1]
    if not sandbox:
        _log.warning("%s was built without seccomp: machines run without QEMU's sandbox", binary)
    return Features(sandbox=sandbox, read_only_memory=b'"name": "rom"' in said)


def _talk(binary: Path, *options: str) -> tuple[bytes, str]:
    """Start the binary without a machine and talk to it.

    Returns:
        What it answers, and what is wrong with that: empty if it answers as QEMU does.
    """
    # fmt: off
    argv = [
        str(binary), "-no-user-config", "-nodefaults",
        "-machine", "none", "-display", "none",
        *options,
        "-chardev", "stdio,id=control", "-mon", "chardev=control,mode=control",
    ]
    # fmt: on
    try:
        with _written(_TALK) as talk:
            answer = subprocess.run(
                argv,
                stdin=talk,
                capture_output=True,
                timeout=_LIMIT_SECONDS,
                check=False,
                env=environment(),
            )
    except subprocess.TimeoutExpired:
        raise CloudSetupError(
            f"qemu_binary {str(binary)!r} did not answer within {_LIMIT_SECONDS} s; is this host "
            "out of breath?"
        ) from None
    except OSError as error:
        return b"", str(error)
    if answer.returncode == 0 and b'"QMP"' in answer.stdout:
        return answer.stdout, ""
    words = (answer.stderr + answer.stdout).decode(errors="replace").strip()[-_LONGEST_SAID:]
    status = answer.returncode
    how = f"it ended with {f'signal {-status}' if status < 0 else f'exit status {status}'}"
    return b"", f"{how}, and said: {words}" if words else how


@contextlib.contextmanager
def _written(words: bytes) -> Iterator[int]:
    """Yield a pipe that has all of the words: so who reads it ends, whatever becomes of us."""
    reading, writing = (moved(end) for end in os.pipe())
    try:
        try:
            os.write(writing, words)  # a pipe takes at least 4096 bytes at once
        finally:
            os.close(writing)
        yield reading
    finally:
        os.close(reading)
