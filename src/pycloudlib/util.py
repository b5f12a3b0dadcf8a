"""Small words that clients import."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime

from pycloudlib.documents import parse_yaml
from pycloudlib.errors import CleanupError

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
    """Give cloud-config user-data that also authorizes an SSH key for the default user.

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
    """Raise what went wrong while a context manager cleaned up; nothing when nothing did.

    Args:
        errors: What went wrong.
        leaving_with: What the block was left with. Ctrl-C and sys.exit() go on, and the errors
            are logged instead.

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
