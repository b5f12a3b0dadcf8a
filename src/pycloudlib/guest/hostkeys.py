"""Which SSH host keys are a machine's own: those supplied to it, and those it told of itself."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pycloudlib.files import write_private
from pycloudlib.guest import userdata
from pycloudlib.guest.seed import read_iso

_log = logging.getLogger(__name__)

# cloud-init's keys-to-console module prints the machine's host keys between these marks. The first
# may follow the prompt of getty, which waits on the console by then; whatever is typed there comes
# after a prompt in each line, and so is no key. The second follows right after a key that came
# without a line end.
_KEYS_BLOCK = re.compile(
    r"^(?:[^\n]* login: )?-----BEGIN SSH HOST KEY KEYS-----$(.*?)-----END SSH HOST KEY KEYS-----",
    re.MULTILINE | re.DOTALL,
)

# cloud-init's `ssh_keys`, in YAML or JSON.
_PUBLIC_KEY = re.compile(
    rb"\b(?:rsa|dsa|ecdsa|ed25519)_public[\"']?\s*:\s*[|>+-]*\s*[\"']?([\w@.-]+)\s+([\w+/]+=*)"
)


@dataclass(frozen=True, slots=True)
class MachineHostKeys:
    """The host keys of one machine, kept in a file that only we write.

    A key that is not in the file is believed in three cases only: the machine itself printed it on
    its serial console, or its user-data supplies it (user-data may bring host keys of its own, and
    then it wins), or the file does not exist because no key was ever supplied (no seed), and then
    the first key seen is kept.

    The console alone would not do: what a guest prints in the moment in which its getty hangs up
    the terminal, to begin with it anew, may be lost (seen on a busy host).

    Attributes:
        known_hosts: Lines of `type base64`; absent when no key was supplied.
        console_log: What the machine wrote to its serial console.
        seed: The machine's NoCloud volume; it need not exist.
    """

    known_hosts: Path
    console_log: Path
    seed: Path

    def pinned(self) -> Sequence[str]:
        """Give the keys in the file."""
        try:
            return self.known_hosts.read_text(encoding="ascii").splitlines()
        except FileNotFoundError:
            return ()

    def accepts(self, key_line: str) -> bool:
        """Decide on a key that is not pinned; an accepted one is pinned from then on."""
        origin = self._find_origin(key_line)
        if origin is None:
            return False
        _log.info("Pinning the host key %s: %s", key_line, origin)
        write_private(self.known_hosts, key_line + "\n")
        return True

    def _find_origin(self, key_line: str) -> str | None:
        """Say where a key comes from that is believed."""
        if not self.known_hosts.exists():
            return "it is the first one seen"
        if key_line in announced_host_keys(self._console()):
            return "it is on the machine's console"
        if key_line in self._user_data_keys():
            return "it is in the machine's user-data"
        return None

    def _user_data_keys(self) -> set[str]:
        if not self.seed.exists():
            return set()
        try:
            return configured_host_keys(read_iso(self.seed).user_data)
        except ValueError as error:
            _log.debug("The user-data tells of no host keys: %s", error)
            return set()

    def _console(self) -> str:
        try:
            return self.console_log.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""


def announced_host_keys(console: str) -> set[str]:
    """Find the host keys that cloud-init printed last, as `type base64` lines."""
    blocks = _KEYS_BLOCK.findall(console.replace("\r", ""))
    lines = blocks[-1].splitlines() if blocks else []
    return {" ".join(line.split()[:2]) for line in lines if line.strip()}


def configured_host_keys(user_data: bytes) -> set[str]:
    """Find the host keys that user-data of any kind brings along, as `type base64` lines.

    Raises:
        ValueError: It is damaged.
    """
    return {
        b" ".join(found.groups()).decode("ascii", "replace")
        for document in userdata.split(user_data, "user_data")
        for found in _PUBLIC_KEY.finditer(document)
    }
