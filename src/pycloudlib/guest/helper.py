"""The host's side of the helper in a guest: commands and fix-ups without SSH and a network.

All copies of a saved machine are equal at first, and their clock is late. The helper, a small
program that runs in the saved machine, fixes up a copy (its time, its random numbers, its identity)
and runs the first commands: in emulation, SSH's cryptography takes a second in a machine that was
just restored. It answers on a virtio-serial port and listens to nothing else.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import re
import secrets
import shlex
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from pycloudlib._base.deadline import Deadline, capped
from pycloudlib._base.documents import decode, parse_json, safe_repr
from pycloudlib.errors import CloudError, PycloudlibTimeoutError
from pycloudlib.guest.access.hostkeys import HostKey
from pycloudlib.guest.access.portstream import PortStream

LARGEST_STDIN = 1 << 20
"""Bytes of input beyond which a command is better run by SSH."""

_CHUNK = 1 << 16
_ENTROPY_BYTES = 64
# Seconds: the error of reading the other clock is at most a round trip; a longer one is repeated.
_GOOD_ROUND_TRIP = 0.1
_CLOCK_TRIES = 6
_SEND_LIMIT = 60.0
# Limits for a helper's answers: exit status and seconds, and bytes of an output at a time.
_LARGEST_NUMBER = 2.0**53
_LONGEST_PIECE = 1 << 24
# An answer has some hundred bytes; output for an earlier connection may come first.
_LONGEST_LINE = 4 << 20
_LONGEST_REASON = 2000
# Seconds between checks of whether the helper runs: the connection stays when it ends.
_LOOK = 0.5

_INSTALL = """
set -e
sudo mkdir -p -m 755 /run/pycloudlib
env -0 | grep -zvE '^(SSH_|XDG_SESSION|XDG_RUNTIME|_=|PWD=|OLDPWD=|SHLVL=|SUDO_)' \\
  | sudo sh -c 'umask 077; cat >/run/pycloudlib/environment'
umask | sudo sh -c 'cat >/run/pycloudlib/umask'
sudo sh -c 'umask 022; cat >/run/pycloudlib/helper.py'
if command -v systemd-run >/dev/null; then
  sudo systemd-run --quiet --collect --unit=pycloudlib-helper python3 /run/pycloudlib/helper.py
else
  sudo setsid --fork python3 /run/pycloudlib/helper.py </dev/null >/dev/null 2>&1
fi
"""

_PLACEHOLDER = re.compile(r"^FACTS = .*$", re.MULTILINE)
RESULT = "/run/pycloudlib/first-boot"
"""The file in the guest into which the program writes its problems, if any."""


class HelperError(CloudError):
    """The helper did not fulfil a request, or is gone."""


class HelperRefusedError(HelperError):
    """The helper refused a request; nothing was begun."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The new identity of a copy.

    Attributes:
        hostname: Its name.
        machine_id: 32 hexadecimal digits (machine-id(5)).
        instance_id: For cloud-init.
        host_keys: Its SSH host keys; the copy gets those of the types that the saved machine has.
    """

    hostname: str
    machine_id: str
    instance_id: str
    host_keys: tuple[HostKey, ...]


@dataclass(frozen=True, slots=True)
class NewKey:
    """An SSH key that replaces another one.

    Attributes:
        user: The login user.
        old: The public key that was authorized.
        new: The public key to authorize.
    """

    user: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class FixUp:
    """What is fixed up in a copy before it is used; its clock and random numbers always.

    Attributes:
        identity: Its new identity; None to keep the saved one.
        new_key: The SSH key to authorize, if it is another one.
    """

    identity: Identity | None = None
    new_key: NewKey | None = None

    def to_json(self) -> str:
        """Return it as text, for the run directory of a machine that is not fixed up yet."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> FixUp:
        """Read what `to_json` wrote.

        Raises:
            ValueError: It is something else; names the difference.
        """
        return decode(cls, parse_json(text))

    def request(self) -> dict[str, Any]:
        """Return the request for the helper, with fresh random bytes."""
        fields: dict[str, Any] = {
            "op": "fix",
            "entropy": base64.b64encode(secrets.token_bytes(_ENTROPY_BYTES)).decode(),
        }
        if self.new_key is not None:
            fields["authorize"] = dataclasses.asdict(self.new_key)
        if self.identity is not None:
            fields["identity"] = dataclasses.asdict(self.identity)
        return fields


@dataclass
class Command:
    """A command's outputs and exit status, as they come.

    Attributes:
        out: Its standard output.
        err: Its standard error.
        status: Its exit status; None until it has ended.
    """

    out: bytearray = field(default_factory=bytearray)
    err: bytearray = field(default_factory=bytearray)
    status: int | None = None


def program() -> str:
    """Return the text of the program that runs in the guest."""
    return _read_program("helper_in_guest.py")


def _read_program(name: str) -> str:
    return resources.files("pycloudlib.guest.programs").joinpath(name).read_text("utf-8")


def install_script() -> str:
    """Return the script that starts the helper; it reads the program from its input.

    Run as the login user over SSH, whose environment the helper's commands get, too.
    """
    return _INSTALL


def measure_clock(read_guest: Callable[[], float]) -> float:
    """Measure how far our clock is ahead of the guest's, in seconds.

    Args:
        read_guest: Reads the guest's clock; the faster, the more exact is the result.
    """
    best = (float("inf"), 0.0)
    for _ in range(_CLOCK_TRIES):
        sent = time.time()
        guest = read_guest()
        came = time.time()
        best = min(best, (came - sent, (sent + came) / 2 - guest))
        if best[0] < _GOOD_ROUND_TRIP:
            break
    return best[1]


class HelperConnection:
    """A connection to the helper; a context manager. One at a time, for one thread.

    Args:
        sock: The connection.
        is_there: Whether the helper still runs, which the connection does not show.
    """

    def __init__(self, sock: socket.socket, is_there: Callable[[], bool] = lambda: True) -> None:
        self._socket = sock
        self._is_there = is_there
        self._buffer = bytearray()

    def __enter__(self) -> HelperConnection:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._socket.close()

    def fix(self, fix_up: FixUp, deadline: Deadline) -> None:
        """Fix up a copy.

        Raises:
            HelperError: It could not be done; gives the reason.
            PycloudlibTimeoutError: The helper did not answer in time.
        """
        ahead = measure_clock(lambda: _number(self._ask({"op": "clock"}, deadline), "now"))
        self._ask({**fix_up.request(), "ahead": ahead}, deadline)

    def wait_for_ssh(self, deadline: Deadline) -> bool:
        """Wait until the SSH server that was restarted by `fix` listens; return whether it does.

        Raises:
            HelperRefusedError: The helper is an older one, which does not know of this.
            HelperError: The helper was gone meanwhile.
            PycloudlibTimeoutError: The helper did not answer in time.
        """
        # The helper is to answer first.
        answer = self._ask({"op": "ssh", "limit": deadline.remaining * 0.9}, deadline)
        return answer.get("up") is True

    def execute(
        self, argv: Sequence[str], user: str, stdin: bytes, deadline: Deadline | None
    ) -> Command:
        """Run a command to its end.

        Raises:
            HelperRefusedError: It could not be run.
            HelperError: The helper was gone before the command had ended.
            PycloudlibTimeoutError: It did not end before the deadline; it is hung up on.
        """
        request = {"op": "exec", "argv": list(argv), "user": user, "stdin": len(stdin)}
        number = self._send(request, deadline, stdin)
        command = Command()
        while command.status is None:
            answer = self._receive(number, deadline)
            if "exit" in answer:
                command.status = int(_number(answer, "exit"))
            for name, output in (("out", command.out), ("err", command.err)):
                if name in answer:
                    output.extend(self._read(_length(answer, name), deadline))
        return command

    def is_listening(self, deadline: Deadline) -> bool:
        """Whether it answers, and not a program that has not ended since it was lent the port."""
        try:
            self._ask({"op": "clock"}, deadline)
        except (HelperError, PycloudlibTimeoutError):
            return False
        return True

    @contextlib.contextmanager
    def lend(self, program: str, argv: Sequence[str], user: str) -> Iterator[PortStream]:
        """Have a program of ours use the port in the guest during the block.

        Args:
            program: Its text, for the guest's Python.
            argv: Its arguments; two follow: the token that it begins with, and a descriptor.
            user: The login user, as which it runs.

        Raises:
            HelperRefusedError: It was not begun.
            HelperError: The helper is gone.
            PortError: The program is gone.
        """

        def check() -> None:
            if not self._is_there():
                raise HelperError("the helper is gone")

        def look(line: bytes) -> None:
            with contextlib.suppress(ValueError):
                answer = parse_json(line)
                if isinstance(answer, dict) and answer.get("id") == number:
                    raise HelperRefusedError(safe_repr(answer.get("error", answer)))

        stream = PortStream(self._socket, check, self._buffer)
        request = {"op": "lend", "program": program, "argv": [*argv, stream.token], "user": user}
        number = self._send(request, None)
        self._socket.setblocking(False)
        stream.begin(look)
        yield stream
        stream.end()
        with contextlib.suppress(HelperRefusedError):
            for line in stream.read_lines():
                look(line)

    def _ask(self, request: Mapping[str, Any], deadline: Deadline | None) -> dict[str, Any]:
        return self._receive(self._send(request, deadline), deadline)

    def _send(
        self, request: Mapping[str, Any], deadline: Deadline | None, data: bytes = b""
    ) -> int:
        # Answers to an earlier connection may still be on their way.
        number = secrets.randbits(48)
        line = json.dumps({**request, "id": number}).encode() + b"\n"
        try:
            self._socket.settimeout(_SEND_LIMIT if deadline is None else deadline.remaining + 0.1)
            self._socket.sendall(line + data)
        except TimeoutError:
            raise PycloudlibTimeoutError("the helper did not read its request in time") from None
        except OSError as error:
            raise HelperError(f"the helper cannot be reached: {error}") from error
        return number

    def _receive(self, number: int, deadline: Deadline | None) -> dict[str, Any]:
        while True:
            while b"\n" not in self._buffer:
                if len(self._buffer) > _LONGEST_LINE:
                    raise HelperError("what is in the guest sends a line without an end")
                self._fill(deadline)
            line, _, rest = self._buffer.partition(b"\n")
            self._buffer = rest
            try:
                answer = parse_json(line)
            except ValueError:
                continue  # cut off, of an earlier connection
            if not isinstance(answer, dict):
                continue
            if answer.get("id") != number:
                for output in ("out", "err"):
                    self._read(_length(answer, output), deadline)
                continue
            if "error" in answer:
                reason = str(answer["error"])[:_LONGEST_REASON]
                raise HelperRefusedError(f"the helper in the guest: {reason}")
            return answer

    def _read(self, size: int, deadline: Deadline | None) -> bytes:
        while len(self._buffer) < size:
            self._fill(deadline)
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def _fill(self, deadline: Deadline | None) -> None:
        if deadline is not None and deadline.expired:
            raise PycloudlibTimeoutError("the helper did not answer in time")
        self._socket.settimeout(max(capped(_LOOK, deadline), 0.001))
        try:
            data = self._socket.recv(_CHUNK)
        except TimeoutError:
            if not self._is_there():
                raise HelperError("the helper is gone") from None
            return
        except OSError as error:
            raise HelperError(f"the connection to the helper is lost: {error}") from error
        if not data:
            raise HelperError("the connection to the helper is lost")
        self._buffer += data


def _number(answer: Mapping[str, Any], key: str) -> float:
    """Read a number of an answer, which is not trusted."""
    value = answer.get(key)
    if not isinstance(value, (int, float)) or not -_LARGEST_NUMBER < value < _LARGEST_NUMBER:
        raise HelperError(f"the helper answered {key} = {safe_repr(value)}, expected a number")
    return float(value)


def _length(answer: Mapping[str, Any], output: str) -> int:
    """Read how many bytes of an output follow; 0 by default."""
    length = int(_number(answer, output)) if output in answer else 0
    if not 0 <= length <= _LONGEST_PIECE:
        raise HelperError(f"the helper announced {length} bytes of {output}")
    return length


def once_command() -> str:
    """Return the command that answers requests on its standard input, where no helper runs."""
    return f"python3 -c {shlex.quote(program())} once"


def first_boot_program(*, saved_at: float, rtc_lag: float) -> str:
    """Return the program that fixes up one guest; it holds secrets.

    Args:
        saved_at: When the other machine was stopped, in seconds since the epoch.
        rtc_lag: Seconds that the machine's real-time clock is behind the host's clock.
    """
    facts = {
        "saved_at": str(saved_at),
        "rtc_lag": str(rtc_lag),
        "entropy": secrets.token_hex(_ENTROPY_BYTES),
        "machine_id": uuid.uuid4().hex,
    }
    text = _read_program("firstboot_in_guest.py")
    return _PLACEHOLDER.sub(lambda _: f"FACTS = {facts!r}", text, count=1)


def first_boot_hook(text: str) -> bytes:
    """Return that program as a document for cloud-init."""
    return f"#cloud-boothook\n{text}".encode()


def first_boot_check() -> str:
    """Return the command that prints the problems, and runs the program if it has not run yet.

    It takes the program on its standard input.
    """
    return f"cat {RESULT} 2>/dev/null || {{ sudo python3 -IS -; cat {RESULT}; }}"
