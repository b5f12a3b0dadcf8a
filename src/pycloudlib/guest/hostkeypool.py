"""Host keys made ahead: an RSA key takes up to a second, which no launch has to wait for."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import secrets
import threading
from pathlib import Path

from pycloudlib.documents import decode, parse_json
from pycloudlib.errors import CloudSetupError
from pycloudlib.files import (
    create_private_directory,
    is_private_directory,
    replace_atomically,
    write_private,
)
from pycloudlib.guest.hostkeys import TYPES, HostKey
from pycloudlib.key import generate_ecdsa, generate_ed25519, generate_rsa

_log = logging.getLogger(__name__)

# As many machines can be launched at once without waiting for a key.
_KEPT = 16
_NICENESS = 10

_MAKERS = {"ed25519": generate_ed25519, "ecdsa": generate_ecdsa, "rsa": generate_rsa}


class HostKeyPool:
    """RSA host keys in a directory, each for one machine; made by a thread in the background.

    Safe to use from several threads and processes. What is in the way of keeping keys costs time,
    no launch: then keys are made when they are needed.

    Args:
        directory: Where they are; made when missing, and this user's alone.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._filling: threading.Thread | None = None

    def take(self, comment: str) -> tuple[HostKey, ...]:
        """Return new host keys for one machine, one of each type.

        Args:
            comment: What stands at the end of their public lines.
        """
        return tuple(
            (self._take_kept(comment) if kind == "rsa" else None) or _make(kind, comment)
            for kind in TYPES
        )

    def fill(self) -> None:
        """Begin to make keys for the next launches, in the background.

        A program that ends meanwhile waits for the key that is being made, and for no other.
        """
        if self._filling is not None and self._filling.is_alive():
            return
        if len(self._list()) < _KEPT:
            self._filling = threading.Thread(target=self._fill, name="host-keys")
            self._filling.start()

    def _list(self) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):
            # Keys in a directory of somebody else's would be somebody else's, too.
            if is_private_directory(self._directory):
                return sorted(self._directory.glob("rsa-*.json"))
        return []

    def _take_kept(self, comment: str) -> HostKey | None:
        for file in self._list():
            try:
                text = file.read_bytes()
                file.unlink()  # fails for all but one of those who want it
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
            while len(self._list()) < _KEPT and threading.main_thread().is_alive():
                text = json.dumps(dataclasses.asdict(_make("rsa", "")))
                file = self._directory / f"rsa-{secrets.token_hex(8)}.json"
                with replace_atomically(file, synced=False) as temporary:
                    write_private(temporary, text)
        except (OSError, CloudSetupError) as error:
            _log.debug("No host keys are kept in %s: %s", self._directory, error)


def _make(kind: str, comment: str) -> HostKey:
    return HostKey(kind, *_MAKERS[kind](comment))
