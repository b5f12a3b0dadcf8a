"""Which SSH host keys are a machine's own: the one supplied to it, or one it told of itself."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pycloudlib.files import write_private

_log = logging.getLogger(__name__)

# cloud-init's keys-to-console module prints the machine's host keys between these marks. The first
# may follow the prompt of getty, which waits on the console by then; whatever is typed there comes
# after a prompt in each line, and so is no key. The second follows right after a key that came
# without a line end.
_KEYS_BLOCK = re.compile(
    r"^(?:[^\n]* login: )?-----BEGIN SSH HOST KEY KEYS-----$(.*?)-----END SSH HOST KEY KEYS-----",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class MachineHostKeys:
    """The host keys of one machine, kept in a file that only we write.

    A key that is not in the file is believed in two cases only: the machine itself printed it on
    its serial console (user-data may bring host keys of its own, and then it wins), or the file
    does not exist because no key was ever supplied (no seed), and then the first key seen is kept.

    Attributes:
        known_hosts: Lines of `type base64`; absent when no key was supplied.
        console_log: What the machine wrote to its serial console.
    """

    known_hosts: Path
    console_log: Path

    def pinned(self) -> Sequence[str]:
        """Give the keys in the file."""
        try:
            return self.known_hosts.read_text(encoding="ascii").splitlines()
        except FileNotFoundError:
            return ()

    def accepts(self, key_line: str) -> bool:
        """Decide on a key that is not pinned; an accepted one is pinned from then on."""
        supplied = self.known_hosts.exists()
        if supplied and key_line not in announced_host_keys(self._console()):
            return False
        origin = "it is on the machine's console" if supplied else "it is the first one seen"
        _log.info("Pinning the host key %s: %s", key_line, origin)
        write_private(self.known_hosts, key_line + "\n")
        return True

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
