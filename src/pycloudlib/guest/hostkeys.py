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
_KEYS_BEGIN = re.compile(r"(?:.* login: )?-----BEGIN SSH HOST KEY KEYS-----")
_KEYS_END = "-----END SSH HOST KEY KEYS-----"
# What is surely no cloud-config.
_SCRIPT = b"#!"


@dataclass(frozen=True, slots=True)
class MachineHostKeys:
    """The host keys of one machine, kept in a file that only we write.

    A key that is not in the file is believed in three cases only: the machine itself printed it on
    its serial console, or its user-data or vendor-data supplies it (the caller's may bring host
    keys of its own, and then it wins), or the file does not exist because no key was ever supplied
    (no seed), and then the first key seen is kept.

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
            return self.known_hosts.read_text(encoding="ascii", errors="replace").splitlines()
        except (FileNotFoundError, IsADirectoryError):
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
        for name, document in self._documents().items():
            if key_line in configured_host_keys(document, name):
                return f"it is in the machine's {name}"
        return None

    def _documents(self) -> dict[str, bytes]:
        """Give what cloud-init is told by the seed."""
        if not self.seed.exists():
            return {}
        try:
            seed = read_iso(self.seed)
        except ValueError as error:
            _log.warning("The seed tells of no host keys: %s", error)
            return {}
        return {"user-data": seed.user_data, "vendor-data": seed.vendor_data or b""}

    def _console(self) -> str:
        try:
            return self.console_log.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, IsADirectoryError):
            return ""


def announced_host_keys(console: str) -> set[str]:
    """Find the host keys that cloud-init printed last, as `type base64` lines."""
    keys: set[str] = set()
    block: list[str] | None = None
    for line in console.replace("\r", "").splitlines():
        before, mark, _ = line.partition(_KEYS_END)
        if mark and block is not None:
            keys = {" ".join(key.split()[:2]) for key in (*block, before) if key.strip()}
            block = None
        elif _KEYS_BEGIN.fullmatch(line):
            block = []
        elif block is not None:
            block.append(line)
    return keys


def configured_host_keys(document: bytes, name: str) -> set[str]:
    """Find the host keys that user-data or vendor-data configures, as `type base64` lines.

    https://docs.cloud-init.io/en/latest/reference/modules.html (`ssh_keys`)

    Args:
        document: The document, of any kind.
        name: What it is called in the log.
    """
    found = set()
    try:
        for part in userdata.split(document, name):
            found |= _host_keys_of(part, name)
    except ValueError as error:
        _log.debug("The %s tells of no more host keys: %s", name, error)
    return found


def _host_keys_of(part: bytes, name: str) -> set[str]:
    if part.startswith(_SCRIPT):
        return set()
    try:
        config = userdata.load_yaml(part, name)
    except ValueError:
        return set()  # a template, maybe, or no cloud-config at all
    keys = config.get("ssh_keys") if isinstance(config, dict) else None
    if not isinstance(keys, dict):
        return set()
    return {
        " ".join(key.split()[:2])
        for kind, key in keys.items()
        if str(kind).endswith("_public") and isinstance(key, str) and len(key.split()) > 1
    }
