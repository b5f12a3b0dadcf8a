"""SSH host keys: those a guest is given, and whether one that it shows is its own."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pycloudlib.files import replace_atomically, write_private
from pycloudlib.guest import userdata

_log = logging.getLogger(__name__)

TYPES = ("ed25519", "ecdsa", "rsa")
"""The types of host keys that cloud-init makes by default, the one that is quickest to use first.

Before 23.4 it made one of type `dsa`, too, which OpenSSH has not used since 7.0 (2015).
"""

# What decides about host keys, or makes them by other means, in cloud-config, scripts, templates.
_DECISIONS = re.compile(
    rb"ssh_keys|ssh_genkeytypes|ssh_deletekeys|ssh_host_|ssh-keygen|HostKey", re.IGNORECASE
)
# What brings other documents, which cannot be looked at here.
_UNKNOWN = re.compile(rb"#include|#part-handler|x-include-|part-handler", re.IGNORECASE)


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

    A key that is not in the file is believed, and kept from then on, if the connection on which it
    was shown is proven to end in the machine: then whoever answers has port 22 of the guest, which
    only the guest's root can have. So it does not matter who made the key, and in which boot. What
    the guest prints on its serial console would not do: other users of this host can type there.

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
    """Keep the keys that a machine is given, in place of others."""
    _write(known_hosts, [key.line for key in keys])


def _write(known_hosts: Path, lines: Sequence[str]) -> None:
    with replace_atomically(known_hosts, synced=False) as temporary:
        write_private(temporary, "".join(f"{line}\n" for line in lines))


def are_decided_by(document: bytes, name: str) -> bool:
    """Whether user-data or vendor-data says anything of host keys, or may: then the guest decides.

    It is looked at as text: a script, a template or a file that it writes may decide, too.

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
