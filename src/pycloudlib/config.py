"""The configuration file: its places, and the errors of reading it."""

from __future__ import annotations

import io
import logging
import os
import sys
from pathlib import Path
from typing import Any

from pycloudlib._base.files import expand_user

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ConfigFile = str | Path | io.StringIO
"""What `config_file` may be: a path, or an open text."""

ENVIRONMENT_VARIABLE = "PYCLOUDLIB_CONFIG"
DEFAULT_LOCATIONS = (Path("~/.config/pycloudlib.toml"), Path("/etc/pycloudlib.toml"))

_log = logging.getLogger(__name__)


class Config(dict[str, Any]):
    """The sections of a configuration file.

    Attributes:
        source: Where it was read from, for messages.
    """

    source: str = "no configuration file"

    def __getitem__(self, key: str) -> Any:
        try:
            return super().__getitem__(key)
        except KeyError:
            raise KeyError(f"{key!r} is not in pycloudlib.toml ({self.source})") from None


def parse_config(config_file: ConfigFile | None = None) -> Config:
    """Read the first configuration file there is.

    Looked for in this order: `config_file`, `$PYCLOUDLIB_CONFIG`, `~/.config/pycloudlib.toml`,
    `/etc/pycloudlib.toml`. A variable that names a file that is not there is passed over, with a
    warning.

    Returns:
        Its sections; none when there is no file.

    Raises:
        ValueError: `config_file` does not exist, or a file cannot be read or is not TOML; the
            message names the file, the origin of its name, and the line.
    """
    if isinstance(config_file, io.StringIO):
        return _parse(config_file.getvalue(), "the config_file given as text")
    if config_file is not None:
        if not isinstance(config_file, (str, os.PathLike)):
            raise TypeError(
                f"config_file must be a path or a StringIO, not {type(config_file).__name__}"
            )
        return _read(_expand(config_file), "config_file")
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        path, origin = _expand(named), f"${ENVIRONMENT_VARIABLE}"
        if _is_there(path):
            return _read(path, origin)
        _log.warning("The configuration file %s (from %s) is not there", path, origin)
    for location in map(_expand, DEFAULT_LOCATIONS):
        # Without a home directory, `~` stays as it is.
        if location.is_absolute() and _is_default_there(location):
            return _read(location, "the default location")
    return Config()


def _expand(path: str | Path) -> Path:
    return expand_user(os.path.expandvars(path))


def _is_default_there(location: Path) -> bool:
    try:
        return _is_there(location)
    except ValueError as error:
        # As with another user's $HOME: the file was not asked for.
        _log.warning("%s; it is passed over", error)
        return False


def _is_there(location: Path) -> bool:
    try:
        return location.exists()
    except OSError as error:
        raise ValueError(
            f"Cannot look for the configuration file {str(location)!r}: {error.strerror}"
        ) from error


def _read(path: Path, origin: str) -> Config:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Cannot read the configuration file {str(path)!r} (from {origin}): {error}"
        ) from error
    return _parse(text, str(path))


def _parse(text: str, source: str) -> Config:
    try:
        config = Config(tomllib.loads(text))
    except RecursionError:
        raise ValueError(f"{source} is not valid TOML: it is nested too deeply") from None
    except ValueError as error:
        # The decoder's own message ends with the line and column. Another ValueError is about a
        # number that is too long.
        raise ValueError(f"{source} is not valid TOML: {error}") from error
    config.source = source
    return config
