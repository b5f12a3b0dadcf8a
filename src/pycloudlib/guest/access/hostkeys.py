"""SSH host keys: which ones are a machine's own, and a pool of keys made ahead."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pycloudlib._base.documents import decode, parse_json
from pycloudlib._base.files import (
    create_private_directory,
    is_private_directory,
    replace_atomically,
    write_private,
)
from pycloudlib.errors import CloudSetupError
from pycloudlib.guest.data import userdata
from pycloudlib.key import generate_ecdsa, generate_ed25519, generate_rsa

_log = logging.getLogger(__name__)

TYPES = ("ed25519", "ecdsa", "rsa")
"""The types of host keys that cloud-init makes by default, the one that is quickest to use first.

Before 23.4 it made one of type `dsa`, too, which OpenSSH has not used since 7.0 (2015).
"""

# Words that configure or make host keys, in cloud-config, scripts, templates.
_DECISIONS = re.compile(
    rb"ssh_keys|ssh_genkeytypes|ssh_deletekeys|ssh_host_|ssh-keygen|HostKey", re.IGNORECASE
)
# Words that include other documents, which are unknown here.
_UNKNOWN = re.compile(rb"#include|#part-handler|x-include-|part-handler", re.IGNORECASE)

# As many machines can be launched at once without waiting for a key.
KEPT = 16
_NICENESS = 10

_MAKERS = {"ed25519": generate_ed25519, "ecdsa": generate_ecdsa, "rsa": generate_rsa}


@dataclass(frozen=True, slots=True)
class HostKey:
    """One host key.

    Attributes:
        type: `ed25519`, `ecdsa` or `rsa`.
        private: The private key in OpenSSH's format.
        public: The public key's line: type, base64, comment.
    """

    type: str
    private: str
    public: str

    @property
    def line(self) -> str:
        """The public key without its comment: `type base64`."""
        return " ".join(self.public.split()[:2])


@dataclass(frozen=True, slots=True)
class MachineHostKeys:
    """The host keys of one machine, kept in a file that only we write.

    A key that is not in the file is accepted, and kept from then on, if the connection on which it
    was shown is proven to end in the machine: then the server has port 22 of the guest, which only
    the guest's root can have. So it does not matter who made the key, and in which boot. The serial
    console would not be proof: other users of this host can type there.

    Attributes:
        known_hosts: Lines of `type base64`; absent when no key was supplied or shown yet.
        ends_in_machine: Whether a connection is proven to end in the machine.
    """

    known_hosts: Path
    ends_in_machine: Callable[[socket.socket], bool]

    def pinned(self) -> Sequence[str]:
        """Return the keys in the file."""
        try:
            return self.known_hosts.read_text(encoding="ascii", errors="replace").splitlines()
        except (FileNotFoundError, IsADirectoryError):
            return ()

    def accepts(self, key_line: str, connection: socket.socket) -> bool:
        """Decide on a key that is not pinned; an accepted one is pinned from then on.

        Args:
            key_line: The key, as `type base64`.
            connection: The connection on which it was shown.
        """
        if not self.ends_in_machine(connection):
            return False
        _log.info("Pinning the host key %s, which the machine itself showed", key_line)
        _write(self.known_hosts, [key_line])
        return True


def pin(known_hosts: Path, keys: Sequence[HostKey]) -> None:
    """Write the keys that a machine is given, in place of others."""
    _write(known_hosts, [key.line for key in keys])


def _write(known_hosts: Path, lines: Sequence[str]) -> None:
    with replace_atomically(known_hosts, synced=False) as temporary:
        write_private(temporary, "".join(f"{line}\n" for line in lines))


def are_decided_by(document: bytes, name: str) -> bool:
    """Whether user-data or vendor-data may configure host keys: then the guest makes them.

    It is searched as text: a script, a template or a file that it writes may configure them, too.

    Args:
        document: The document, of any kind.
        name: What it is called in the log.
    """
    try:
        texts = [document, *userdata.split(document, name)]
    except ValueError as error:
        _log.debug("The guest makes its host keys itself: %s", error)
        return True
    return any(_DECISIONS.search(text) or _UNKNOWN.search(text) for text in texts)


class HostKeyPool:
    """RSA host keys in a directory, each for one machine; made by a thread in the background.

    Safe to use from several threads and processes. If keys cannot be kept, they are made when they
    are needed, which takes time.

    Args:
        directory: Where they are; made when missing, and this user's alone.
        kept: How many are kept.
    """

    def __init__(self, directory: Path, kept: int = KEPT) -> None:
        self._directory = directory
        self._kept = kept
        self._filling: threading.Thread | None = None

    def take(self, comment: str) -> tuple[HostKey, ...]:
        """Return new host keys for one machine, one of each type.

        Args:
            comment: The end of their public lines.
        """
        return tuple(
            (self._take_kept(comment) if kind == "rsa" else None) or _make(kind, comment)
            for kind in TYPES
        )

    def fill(self) -> None:
        """Start to make keys for the next launches, in the background.

        A program that ends meanwhile waits for the key that is being made, and for no other.
        """
        if self._filling is not None and self._filling.is_alive():
            return
        if len(self._list()) < self._kept:
            self._filling = threading.Thread(target=self._fill, name="host-keys")
            self._filling.start()

    def _list(self) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):
            # Another user's directory would have another user's keys.
            if is_private_directory(self._directory):
                return sorted(self._directory.glob("rsa-*.json"))
        return []

    def _take_kept(self, comment: str) -> HostKey | None:
        for file in self._list():
            try:
                text = file.read_bytes()
                file.unlink()  # succeeds in one process only
                key = decode(HostKey, parse_json(text))
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                _log.warning("%s holds no host key: %s", file, error)
                continue
            return dataclasses.replace(key, public=f"{key.line} {comment}")
        return None

    def _fill(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            create_private_directory(self._directory)
            while len(self._list()) < self._kept and threading.main_thread().is_alive():
                text = json.dumps(dataclasses.asdict(_make("rsa", "")))
                file = self._directory / f"rsa-{secrets.token_hex(8)}.json"
                with replace_atomically(file, synced=False) as temporary:
                    write_private(temporary, text)
        except (OSError, CloudSetupError) as error:
            _log.debug("No host keys are kept in %s: %s", self._directory, error)


def _make(kind: str, comment: str) -> HostKey:
    return HostKey(kind, *_MAKERS[kind](comment))
