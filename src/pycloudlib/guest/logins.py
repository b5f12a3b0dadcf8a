"""Who can log in to a guest, as user-data and console say, for when the login is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from pycloudlib.guest import userdata

# cloud-init's ssh_authkey_fingerprints module.
_WITH_KEYS = re.compile(r"ci-info: \++Authorized keys from \S+ for user (\S+?)\++$")
_WITHOUT_KEYS = re.compile(r"ci-info: no authorized SSH keys fingerprints found for user (\S+?)\.")
_DEFAULT = "default"


def tell_logins(user_data: bytes, console: Iterable[str], username: str) -> str:
    """Say who can log in, and what to do so that a user can.

    Args:
        user_data: The user-data.
        console: The console's lines, without control sequences.
        username: Who was refused.
    """
    told = []
    users = find_users(user_data)
    if users is not None and _DEFAULT not in users:
        told.append(
            f"the user-data's users are {', '.join(users) or 'none'}, without 'default', so that "
            "the default user, who gets the key, is not there: add 'default' to them, or log in "
            "(username=) as one of them whose ssh_authorized_keys have the key"
        )
    listed = [
        f"{kind} of {', '.join(names)}"
        for kind, names in zip(("keys", "no keys"), _find_keys(console), strict=True)
        if names
    ]
    if listed:
        told.append(f"on the console, cloud-init lists {' and '.join(listed)}")
    if not told:
        told.append(
            f"is {username} the user who gets the key (username=), and was the key left to them?"
        )
    return "; ".join(told)


def find_users(user_data: bytes) -> tuple[str, ...] | None:
    """Find whom user-data has made, by `users`; None when it says nothing of that.

    https://docs.cloud-init.io/en/latest/reference/modules.html (`users`)
    """
    found: list[str] | None = None
    try:
        for part in userdata.split(user_data, "user-data"):
            config = None if part.startswith(b"#!") else _load(part)
            users = config.get("users") if isinstance(config, dict) else None
            if users is not None:
                found = [*(found or ()), *_names(users)]
    except ValueError:
        pass  # what cannot be read here tells nothing
    return None if found is None else tuple(dict.fromkeys(found))


def _load(part: bytes) -> object:
    try:
        return userdata.load_yaml(part, "user-data")
    except ValueError:
        return None  # a template, maybe, or no cloud-config at all


def _names(users: object) -> Sequence[str]:
    """Read a list of names and of mappings, a mapping by name, or names in a text."""
    if isinstance(users, str):
        return [name.strip() for name in users.split(",")]
    if isinstance(users, dict):
        return [str(name) for name, wanted in users.items() if wanted]
    if not isinstance(users, list):
        return []
    return [str(user.get("name", "?")) if isinstance(user, dict) else str(user) for user in users]


def _find_keys(console: Iterable[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Find the users whose keys cloud-init has listed, and those who have none."""
    with_keys: dict[str, None] = {}
    without: dict[str, None] = {}
    for line in console:
        for pattern, names in ((_WITH_KEYS, with_keys), (_WITHOUT_KEYS, without)):
            if found := pattern.search(line):
                names.setdefault(found[1])
    return tuple(with_keys), tuple(without)
