"""What a QEMU build can do, asked of the build itself."""

from __future__ import annotations

import functools
import logging
import subprocess
from pathlib import Path

from pycloudlib.errors import CloudSetupError
from pycloudlib.qemu.command import SANDBOX, Features

_log = logging.getLogger(__name__)

_LIMIT_SECONDS = 30
_GOODBYE = b'{"execute": "qmp_capabilities"} {"execute": "quit"}\n'


@functools.cache
def find_features(binary: Path) -> Features:
    """Ask a QEMU binary what it can do; remembered for the life of this process.

    Raises:
        CloudSetupError: It is not QEMU, or cannot run here.
    """
    if not _says_goodbye(binary):
        raise CloudSetupError(
            f"qemu_binary {str(binary)!r} does not answer as QEMU does; expected "
            "qemu-system-x86_64 or a path to one"
        )
    sandbox = _says_goodbye(binary, "-sandbox", SANDBOX)
    if not sandbox:
        _log.warning("%s was built without seccomp: machines run without QEMU's sandbox", binary)
    return Features(sandbox=sandbox)


def _says_goodbye(binary: Path, *options: str) -> bool:
    """Start the binary without a machine and talk to it."""
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
            argv, input=_GOODBYE, capture_output=True, timeout=_LIMIT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise CloudSetupError(
            f"qemu_binary {str(binary)!r} did not answer within {_LIMIT_SECONDS} s; is this host "
            "out of breath?"
        ) from None
    except OSError:
        return False
    return answer.returncode == 0 and b'"QMP"' in answer.stdout
