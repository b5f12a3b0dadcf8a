"""Where a user's files go (XDG Base Directory Specification), also where there is no home."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from pycloudlib.errors import CloudSetupError

APPLICATION = "pycloudlib"


def find_home() -> Path:
    """Find the home directory of whoever runs this; it need not exist.

    Raises:
        CloudSetupError: There is none; says why.
    """
    home = os.environ.get("HOME")
    if home:
        if not Path(home).is_absolute():
            raise CloudSetupError(f"there is no home directory: $HOME is {home!r}, not absolute")
        return Path(home)
    user = os.getuid()
    try:
        home = pwd.getpwuid(user).pw_dir
    except KeyError:
        raise CloudSetupError(
            f"there is no home directory: $HOME is not set, and user {user} has no entry in passwd"
        ) from None
    if not Path(home).is_absolute():
        raise CloudSetupError(
            f"there is no home directory: $HOME is not set, and user {user} has {home!r} in passwd"
        )
    return Path(home)


def find_data_directory() -> Path:
    """Find where this package's data goes; raises as `find_home` does."""
    return _find("XDG_DATA_HOME", ".local/share")


def find_state_directory() -> Path:
    """Find where this package's state goes; raises as `find_home` does."""
    return _find("XDG_STATE_HOME", ".local/state")


def find_cache_directory() -> Path:
    """Find where this package's cache goes; raises as `find_home` does."""
    return _find("XDG_CACHE_HOME", ".cache")


def _find(variable: str, below_home: str) -> Path:
    # The specification has a relative path ignored.
    named = Path(os.environ.get(variable, ""))
    return (named if named.is_absolute() else find_home() / below_home) / APPLICATION


def find_obstacle(directory: Path) -> str | None:
    """Say why files cannot be made in a directory, which need not exist; None if they can."""
    try:
        place = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
        if not place.is_dir():
            return f"{place} is not a directory"
        if os.access(place, os.R_OK | os.W_OK | os.X_OK):
            return None
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return f"{place} cannot be written to"
