"""Who logs in to a machine, and with which key."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pycloudlib.guest.access import loginkey
from pycloudlib.guest.helper import NewKey
from pycloudlib.key import KeyPair, copy_kept_file, generate_key_pair
from pycloudlib.qemu.host.ownership import Orphans, create_owned_directory
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.state.savedmachine import SavedMachine

# No machine can be called so.
_KEYS = ".keys"


@dataclass(frozen=True, slots=True)
class Login:
    """How to log in to a machine.

    Attributes:
        username: The login user.
        key: The key.
        new_key: The key, where the machine does not know it yet: its helper has to add it.
    """

    username: str
    key: KeyPair
    new_key: NewKey | None = None


class OwnKeys:
    """Keys that are made for one cloud object and go with it: several objects may share a tag.

    Args:
        parent_dir: The directory of everything that the cloud makes.
    """

    def __init__(self, parent_dir: Path) -> None:
        self._parent_dir = parent_dir
        self._directory: Path | None = None
        self._remove: weakref.finalize[..., OwnKeys] | None = None

    def make(self, name: str) -> KeyPair:
        """Make a key.

        Raises:
            OSError: It cannot be written.
        """
        directory = create_owned_directory(
            self._parent_dir / f"{_KEYS}-{secrets.token_hex(4)}", Orphans.REAP
        )
        # Gone with this object at the latest; machines that live on have a copy.
        self._directory = directory
        self._remove = weakref.finalize(self, _remove_keys, directory, os.getpid())
        return generate_key_pair(directory, name)

    def holds(self, key: KeyPair | None) -> bool:
        """Whether a key is one of these."""
        path = None if key is None else key.public_key_path
        return path is not None and Path(path).parent == self._directory

    def remove(self) -> None:
        """Remove what was made."""
        if self._remove is not None:
            self._remove()
        self._directory = self._remove = None

    def for_machine(self, key: KeyPair, rundir: RunDirectory) -> KeyPair:
        """Return the key to keep with a machine: a copy of one that goes with this object."""
        return key if self._directory is None else _bring_along(key, self._directory, rundir)


@dataclass(frozen=True, slots=True)
class Keys:
    """The SSH key of a cloud, for machines.

    Attributes:
        find: Returns the key; makes it where there is none yet.
        name: What it is called.
        own: The keys that go with the cloud object.
    """

    find: Callable[[], KeyPair]
    name: str
    own: OwnKeys

    def for_machine(self, rundir: RunDirectory) -> KeyPair:
        """Return the key to keep with a machine: a copy of one that goes with the cloud."""
        return self.own.for_machine(self.find(), rundir)

    def for_copy(
        self,
        saved: SavedMachine,
        username: str | None,
        rundir: RunDirectory,
        *,
        can_add: bool,
    ) -> Login:
        """Choose how to log in to a copy of a saved machine.

        Args:
            saved: The saved machine.
            username: The login user; by default that of the saved machine.
            rundir: The copy's directory.
            can_add: Whether a helper can add another key than the saved machine's to the guest.

        Raises:
            InvalidKeyError: A file of the cloud's key is missing, or is no key.
        """
        login = saved.login
        user = username or login.username
        kept = KeyPair(login.public_key_path, login.private_key_path, self.name)
        if not can_add:
            return Login(user, _bring_along(kept, saved.directory, rundir))
        ours = self.for_machine(rundir)
        loginkey.prove(ours, "the cloud's SSH key")
        old, new = (" ".join(key.public_key_content.split()[:2]) for key in (kept, ours))
        return Login(user, ours, None if old == new else NewKey(login.username, old, new))


def _bring_along(key: KeyPair, kept: Path, rundir: RunDirectory) -> KeyPair:
    """Return a key, copied into a machine's directory if it is kept in one of ours."""
    public, private = (
        copy_kept_file(path, kept, rundir.path)
        for path in (key.public_key_path, key.private_key_path)
    )
    return KeyPair(public, private, key.name)


def _remove_keys(directory: Path, owner_pid: int) -> None:
    if os.getpid() != owner_pid:
        return  # a forked child's copy of the object
    shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):  # there is something else in it
        directory.parent.rmdir()
