"""Small functions that clients import."""

from __future__ import annotations

import base64
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Container, Mapping, MutableMapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pycloudlib._base.documents import parse_yaml
from pycloudlib.errors import CleanupError, ToolError
from pycloudlib.result import Result

UBUNTU_RELEASE_VERSION_MAP = {
    "resolute": "26.04",
    "questing": "25.10",
    "plucky": "25.04",
    "oracular": "24.10",
    "noble": "24.04",
    "mantic": "23.10",
    "lunar": "23.04",
    "kinetic": "22.10",
    "jammy": "22.04",
    "impish": "21.10",
    "hirsute": "21.04",
    "groovy": "20.10",
    "focal": "20.04",
    "bionic": "18.04",
    "xenial": "16.04",
    "trusty": "14.04",
}
"""Ubuntu's series names and their versions."""

LTS_RELEASES = ["trusty", "xenial", "bionic", "focal", "jammy", "noble", "resolute"]
"""The series with long-term support, oldest first."""

_log = logging.getLogger(__name__)

_TAG_LENGTH = 63
_TO_THE_SECOND = len("-mmdd-HHMMSS")


def get_timestamped_tag(tag: str) -> str:
    """Append the date and the time of day to a tag, so that each run has names of its own.

    To the microsecond, of which long tags get as many digits as leave 63 characters in all, and
    to the second in any case: a tag of up to 51 characters stays within the rule for tags.
    """
    suffix = f"-{datetime.now():%m%d-%H%M%S%f}"
    return tag + suffix[: max(_TAG_LENGTH - len(tag), _TO_THE_SECOND)]


def add_key_to_cloud_config(public_key: str, user_data: str | None) -> str:
    """Return cloud-config user-data that also authorizes an SSH key for the default user.

    Args:
        public_key: The public key's line.
        user_data: Cloud-config text, or None for one that holds nothing but the key.

    Raises:
        ValueError: The user-data is not a cloud-config mapping.
    """
    import yaml  # noqa: PLC0415 - heavy

    if user_data and user_data.startswith("#") and not user_data.startswith("#cloud-config\n"):
        first_line = user_data.partition("\n")[0]
        raise ValueError(f"user_data is not a cloud-config but begins with {first_line!r}")
    try:
        config = parse_yaml(user_data or "") or {}
    except ValueError as error:
        raise ValueError(f"user_data is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"user_data is not a cloud-config mapping but {type(config).__name__}")
    keys = config.get("ssh_authorized_keys") or []
    if not isinstance(keys, list):
        raise ValueError(f"ssh_authorized_keys in user_data is not a list but {keys!r}")
    config["ssh_authorized_keys"] = keys
    if public_key not in keys:
        keys.append(public_key)
    return "#cloud-config\n" + yaml.safe_dump(config, sort_keys=False)


def raise_cleanup_errors(errors: Sequence[Exception], leaving_with: BaseException | None) -> None:
    """Raise the errors of a context manager's clean-up, if there are any.

    Args:
        errors: What went wrong.
        leaving_with: The block's exception. Ctrl-C and sys.exit() are not replaced; then the errors
            are logged.

    Raises:
        CleanupError: Something could not be cleaned up.
    """
    if errors and leaving_with is not None and not isinstance(leaving_with, Exception):
        log_exception_list(errors)
    elif errors:
        raise CleanupError(errors)


def log_exception_list(exceptions: Sequence[BaseException]) -> None:
    """Log errors that were collected while cleaning up; nothing when there are none."""
    for error in exceptions:
        _log.error("%s: %s", type(error).__name__, error, exc_info=error)


def subp(
    args: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    data: str | bytes | None = None,
    env: Mapping[str, str] | None = None,
    shell: bool = False,
    rcs: Container[int] = (0,),
    shortcircuit_stdin: bool = True,
) -> Result:
    """Run a program of this host to its end.

    Args:
        args: The program and its arguments; one text or path is the program alone.
        data: What it reads on standard input.
        env: Its whole environment; by default that of this process.
        shell: Whether `args`, a text, is for a shell.
        rcs: The exit statuses that are no error.
        shortcircuit_stdin: Whether it reads nothing where no `data` is given; otherwise it reads
            what this process would.

    Returns:
        Its output, its error output, and its exit status.

    Raises:
        FileNotFoundError: There is no such program.
        ToolError: It ended with another exit status.
    """
    if data is None:
        standard_input: dict[str, Any] = {
            "stdin": subprocess.DEVNULL if shortcircuit_stdin else None
        }
    else:
        standard_input = {"input": data.encode() if isinstance(data, str) else data}
    done = subprocess.run(
        args, env=env, shell=shell, capture_output=True, check=False, **standard_input
    )
    out, err = (
        output.decode("utf-8", errors="replace").rstrip() for output in (done.stdout, done.stderr)
    )
    if done.returncode not in rcs:
        argv = [os.fspath(args)] if isinstance(args, (str, os.PathLike)) else args
        raise ToolError("a program", [str(word) for word in argv], done.returncode, err or out)
    return Result(out, err, done.returncode)


def shell_quote(cmd: str | Sequence[str]) -> str:
    """Quote a word, or each word of a command, for a shell."""
    return shlex.quote(cmd) if isinstance(cmd, str) else shlex.join(cmd)


def shell_safe(cmd: Sequence[str]) -> str:
    """Quote each word of a command, also if that is not necessary: `'ls' '-l'`."""
    return " ".join("'" + word.replace("'", "'\\''") + "'" for word in cmd)


def shell_pack(cmd: str | Sequence[str]) -> str:
    """Encode a command as a text that any `sh` decodes and executes.

    Further shells on the way do not change the text, if it is passed as one word.

    Args:
        cmd: The program and its arguments; one text is the program alone.
    """
    words = [cmd] if isinstance(cmd, str) else cmd
    packed = base64.b64encode(f"exec {shell_safe(words)}".encode()).decode()
    return f'eval "$(echo {packed} | base64 -d)"'


def chmod(path: str | os.PathLike[str], mode: int) -> None:
    """Set the permission bits of a file."""
    Path(path).chmod(mode)


def touch(path: str | os.PathLike[str], mode: int | None = None) -> None:
    """Make an empty file, or set the time of an existing one to now.

    Args:
        path: The file.
        mode: Its permission bits; by default, they stay as they are.
    """
    Path(path).touch()
    if mode is not None:
        chmod(path, mode)


def rmfile(path: str | os.PathLike[str]) -> None:
    """Remove a file; one that is not there is no error."""
    Path(path).unlink(missing_ok=True)


def mkdtemp(prefix: str = "pycloudlib") -> str:
    """Make a temporary directory that only this user can read, and name it."""
    return tempfile.mkdtemp(prefix=prefix)


def is_writable_dir(path: str | os.PathLike[str]) -> bool:
    """Whether files can be made in a directory; it is made if it is missing."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return True
    except OSError:
        return False


def update_nested(
    mapping: MutableMapping[str, Any], update: Mapping[str, Any]
) -> MutableMapping[str, Any]:
    """Update a mapping, and the mappings inside it, and return it.

    Args:
        mapping: What is changed.
        update: The values; a mapping is merged with the one of its name, other values replace it.
    """
    for key, value in update.items():
        inner = mapping.get(key)
        if isinstance(value, Mapping) and isinstance(inner, MutableMapping):
            update_nested(inner, value)
        else:
            mapping[key] = value
    return mapping
