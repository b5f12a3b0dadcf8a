"""What a QEMU build can do, asked of the build itself."""

from __future__ import annotations

import functools
import logging
import subprocess
from pathlib import Path

from pycloudlib.errors import CloudSetupError
from pycloudlib.qemu.command import SANDBOX, Features
from pycloudlib.tools import environment

_log = logging.getLogger(__name__)

_LIMIT_SECONDS = 30
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
    said = _talk(binary)
    if said is None:
        raise CloudSetupError(
            f"qemu_binary {str(binary)!r} does not answer as QEMU does; expected "
            "qemu-system-x86_64 or a path to one"
        )
    sandbox = _talk(binary, "-sandbox", SANDBOX) is not None
    if not sandbox:
        _log.warning("%s was built without seccomp: machines run without QEMU's sandbox", binary)
    return Features(sandbox=sandbox, read_only_memory=b'"name": "rom"' in said)


def _talk(binary: Path, *options: str) -> bytes | None:
    """Start the binary without a machine and talk to it; None if it does not answer as QEMU."""
    # fmt: off
    argv = [
        str(binary), "-no-user-config", "-nodefaults",
        "-machine", "none", "-display", "none",
        *options,
        "-chardev", "stdio,id=control", "-mon", "chardev=control,mode=control",
    ]
    # fmt: on
    try:
        answer = subprocess.run(
            argv,
            input=_TALK,
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
    except OSError:
        return None
    return answer.stdout if answer.returncode == 0 and b'"QMP"' in answer.stdout else None
