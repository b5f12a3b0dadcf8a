"""Log in on a machine's serial console, as its administrator would without a network.

python examples/serial_login.py [IMAGE]
"""

from __future__ import annotations

import re
import socket
import sys
import time

from pycloudlib import Qemu

PASSWORD = "open sesame"
USER_DATA = f"""\
#cloud-config
chpasswd:
  expire: false
  users: [{{name: ubuntu, password: {PASSWORD}, type: text}}]
  list: ["ubuntu:{PASSWORD}"]
"""

# Commands of telnet (RFC 854).
_COMMANDS = re.compile(rb"\xff(?:[\xfb-\xfe].|\xfa.*?\xff\xf0|[\xf0-\xf9])", re.DOTALL)


class Console:
    """A connection to a machine's serial console: enough telnet to log in and run a command."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), 30)
        self._seen = b""

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._socket.close()

    def send(self, line: str) -> None:
        """Type a line."""
        self._socket.sendall(line.encode() + b"\r")

    def expect(self, pattern: str, seconds: float = 120) -> str:
        """Read until a pattern is found; return all text up to its end."""
        limit = time.monotonic() + seconds
        while (match := re.search(pattern.encode(), self._seen)) is None:
            self._socket.settimeout(max(0.1, limit - time.monotonic()))
            chunk = self._socket.recv(4096)
            if not chunk:
                raise EOFError(f"the console was closed after {self._seen!r}")
            self._seen = _COMMANDS.sub(b"", self._seen + chunk)
        text, self._seen = self._seen[: match.end()], self._seen[match.end() :]
        return text.decode(errors="replace")


def log_in(console: Console, user: str, password: str) -> None:
    """Log in, up to the shell's prompt."""
    console.send("")
    console.expect("login: ")
    console.send(user)
    console.expect("Password: ")
    console.send(password)
    console.expect(r"\$ ")


def main() -> None:
    """Launch a machine, log in, and show what a command prints there."""
    with Qemu(tag="serial-login") as cloud:
        image = sys.argv[1] if len(sys.argv) > 1 else cloud.build_image("bookworm")
        with cloud.launch(image, user_data=USER_DATA) as machine:
            machine.wait()
            with Console(int(machine.telnet_port)) as console:
                log_in(console, "ubuntu", PASSWORD)
                console.send("tty; echo $((6 * 7)) is the answer")
                print(console.expect(r"[^(]42 is the answer"))
                console.send("exit")


if __name__ == "__main__":
    main()
