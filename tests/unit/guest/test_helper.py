from __future__ import annotations

import base64
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pycloudlib._base.deadline import Deadline
from pycloudlib.errors import PycloudlibTimeoutError
from pycloudlib.guest import helper
from pycloudlib.guest.access.hostkeys import HostKey
from pycloudlib.guest.helper import (
    LARGEST_STDIN,
    Command,
    FixUp,
    HelperConnection,
    HelperError,
    Identity,
    NewKey,
    measure_clock,
)

HOST_KEY = HostKey("ed25519", "private\n", "ssh-ed25519 AAAA root@second")
IDENTITY = Identity("second", "0" * 32, "iid-second", (HOST_KEY,))
NEW_KEY = NewKey("ubuntu", "ssh-ed25519 old", "ssh-ed25519 new")

Script = Callable[["Peer"], None]


class Peer:
    """The other end, which follows a script; what it was asked is kept."""

    def __init__(self, sock: socket.socket, script: Script) -> None:
        self.socket = sock
        self.file = sock.makefile("rb")
        self.requests: list[dict[str, Any]] = []
        self.errors: list[BaseException] = []
        self._script = script
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._script(self)
        except BaseException as error:  # noqa: BLE001 - looked at in the test's thread
            self.errors.append(error)

    def request(self) -> dict[str, Any]:
        """Read a request."""
        self.requests.append(json.loads(self.file.readline()))
        return self.requests[-1]

    def say(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self, *, data: bytes = b"", number: int | None = None, **fields: Any) -> None:
        """Answer the latest request, or another one."""
        fields["id"] = self.requests[-1]["id"] if number is None else number
        self.say(b"\n" + json.dumps(fields).encode() + b"\n" + data)

    def close(self) -> None:
        self.file.close()
        self.socket.close()


Connect = Callable[[Script], tuple[HelperConnection, Peer]]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Connect to a peer that follows a script; it must have come to its end afterwards."""
    peers: list[Peer] = []
    connections: list[HelperConnection] = []

    def make(script: Script) -> tuple[HelperConnection, Peer]:
        ours, theirs = socket.socketpair()
        peers.append(Peer(theirs, script))
        connections.append(HelperConnection(ours))
        return connections[-1], peers[-1]

    yield make
    for connection in connections:
        connection.__exit__()
    for peer in peers:
        peer.thread.join(10)
        peer.close()
        assert not peer.thread.is_alive()
        assert peer.errors == []


def soon() -> Deadline:
    return Deadline.after(30)


def run(connection: HelperConnection, stdin: bytes = b"") -> Command:
    return connection.execute(["cat"], "ubuntu", stdin, soon())


@pytest.mark.parametrize("identity", [None, IDENTITY], ids=["same", "fresh"])
@pytest.mark.parametrize("new_key", [None, NEW_KEY], ids=["key stays", "new key"])
def test_fix_up_is_read_as_it_was_written(
    identity: Identity | None, new_key: NewKey | None
) -> None:
    fix_up = FixUp(identity, new_key)
    assert FixUp.from_json(fix_up.to_json()) == fix_up


def test_request_holds_what_the_helper_takes() -> None:
    request = json.loads(json.dumps(FixUp(IDENTITY, NEW_KEY).request()))
    assert request["identity"]["host_keys"] == [
        {
            "type": "ed25519",
            "private": "private\n",
            "public": "ssh-ed25519 AAAA root@second",
        }
    ]
    assert request["identity"]["hostname"] == "second"
    assert request["authorize"] == {
        "user": "ubuntu",
        "old": "ssh-ed25519 old",
        "new": "ssh-ed25519 new",
    }
    assert {"identity", "authorize"}.isdisjoint(FixUp().request())


def test_random_numbers_are_others_each_time() -> None:
    first, second = (base64.b64decode(FixUp().request()["entropy"]) for _ in range(2))
    assert first != second
    assert len(first) >= 32


def test_clock_is_told_in_the_middle_of_a_round_trip() -> None:
    assert measure_clock(lambda: time.time() - 100) == pytest.approx(100, abs=1)
    assert measure_clock(lambda: time.time() + 100) == pytest.approx(-100, abs=1)


def test_shortest_round_trip_tells_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    trips = iter([(9.0, 50.0), (0.5, 7.0), (4.0, 90.0), (2.0, 30.0), (3.0, 20.0), (8.0, 10.0)])
    monkeypatch.setattr(time, "time", lambda: now[0])

    def read_guest() -> float:
        took, behind = next(trips)
        middle = now[0] + took / 2
        now[0] += took
        return middle - behind

    assert measure_clock(read_guest) == pytest.approx(7.0)


def test_good_round_trip_is_enough() -> None:
    asked: list[int] = []

    def read_guest() -> float:
        asked.append(1)
        return 0.0

    measure_clock(read_guest)
    assert len(asked) == 1


def test_command_gives_its_outputs_and_status(connect: Connect) -> None:
    def script(peer: Peer) -> None:
        request = peer.request()
        assert peer.file.read(request["stdin"]) == b"in\n{put}"
        peer.answer(data=b'{"id"\n', out=6)
        peer.answer(data=b"\xff\0", err=2)
        peer.answer(data=b"more", out=4)
        peer.answer(exit=3)

    connection, peer = connect(script)
    assert run(connection, b"in\n{put}") == Command(
        bytearray(b'{"id"\nmore'), bytearray(b"\xff\0"), 3
    )
    assert peer.requests[0]["op"] == "exec"
    assert peer.requests[0]["argv"] == ["cat"]
    assert peer.requests[0]["user"] == "ubuntu"


def test_answer_may_come_byte_by_byte(connect: Connect) -> None:
    def script(peer: Peer) -> None:
        number = peer.request()["id"]
        for byte in b'{"id": %d, "out": 2}\nhi{"id": %d, "exit": 0}\n' % (number, number):
            peer.say(bytes([byte]))

    assert run(connect(script)[0]) == Command(bytearray(b"hi"), bytearray(), 0)


def test_large_output_is_whole(connect: Connect) -> None:
    output = bytes(range(256)) * 4096

    def script(peer: Peer) -> None:
        peer.request()
        peer.answer(data=output, out=len(output))
        peer.answer(exit=0)

    assert run(connect(script)[0]).out == output


@pytest.mark.parametrize(
    "remains",
    [
        b"",
        b"\n\n",
        b'{"id": 1, "exit": 0}\n',
        b'5, "exit": 0}\n',
        b"5\nnull\n[1]\n\xff\xfe\n",
        b'{"exit": 0}\n',
        b'{"id": 1, "error": "of another"}\n',
        b'{"id": 1, "out": 6}\nhello\n',
    ],
    ids=["none", "empty", "whole", "cut off", "odd", "no number", "error", "output"],
)
def test_late_answers_to_earlier_connections_are_ignored(connect: Connect, remains: bytes) -> None:
    def script(peer: Peer) -> None:
        peer.say(remains)
        peer.request()
        peer.answer(data=b"hi", out=2)
        peer.answer(exit=0)

    assert run(connect(script)[0]) == Command(bytearray(b"hi"), bytearray(), 0)


@pytest.mark.parametrize("remains", [b'{"id": 1, "out": 5}\nhello', b"the end of an output"])
def test_late_output_without_a_line_end_is_ignored(connect: Connect, remains: bytes) -> None:
    def script(peer: Peer) -> None:
        peer.say(remains)
        peer.request()
        peer.answer(data=b"hi", out=2)
        peer.answer(exit=0)
        peer.close()

    assert run(connect(script)[0]) == Command(bytearray(b"hi"), bytearray(), 0)


def test_error_is_raised_in_the_helpers_words(connect: Connect) -> None:
    def script(peer: Peer) -> None:
        peer.request()
        peer.answer(error="KeyError: no such user")

    with pytest.raises(HelperError, match="KeyError: no such user"):
        run(connect(script)[0])


def test_connection_lost_before_the_end_is_told(connect: Connect) -> None:
    def script(peer: Peer) -> None:
        peer.request()
        peer.answer(data=b"hal", out=4)
        peer.close()

    with pytest.raises(HelperError, match="lost"):
        run(connect(script)[0])


def test_helper_that_is_gone_is_told() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with HelperConnection(ours) as connection, pytest.raises(HelperError, match=r"reached|lost"):
        run(connection)


@pytest.mark.parametrize("said", [b"", b'{"id": 1, "exit": 0}\n'], ids=["nothing", "of another"])
def test_answer_that_does_not_come_is_not_waited_for_longer(connect: Connect, said: bytes) -> None:
    connection, _ = connect(lambda peer: peer.say(said))
    with pytest.raises(PycloudlibTimeoutError):
        connection.execute(["sleep"], "ubuntu", b"", Deadline.after(0.2))


def test_output_that_does_not_come_is_not_waited_for_longer(connect: Connect) -> None:
    def script(peer: Peer) -> None:
        peer.request()
        peer.answer(data=b"half", out=8)

    connection, _ = connect(script)
    with pytest.raises(PycloudlibTimeoutError):
        connection.execute(["sleep"], "ubuntu", b"", Deadline.after(0.2))


def test_input_that_nobody_takes_is_not_waited_for_longer() -> None:
    ours, theirs = socket.socketpair()
    raised: list[BaseException] = []

    def send() -> None:
        try:
            HelperConnection(ours).execute(
                ["cat"], "ubuntu", bytes(LARGEST_STDIN), Deadline.after(0.2)
            )
        except BaseException as error:  # noqa: BLE001 - looked at below
            raised.append(error)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    sender.join(10)
    in_time = not sender.is_alive()
    theirs.close()
    sender.join(10)
    ours.close()
    assert in_time
    assert [type(error) for error in raised] == [PycloudlibTimeoutError]


def test_fix_sends_the_clock_and_what_else_is_to_be_put_right(connect: Connect) -> None:
    def script(peer: Peer) -> None:
        assert peer.request()["op"] == "clock"
        peer.answer(now=time.time() - 1000)
        assert peer.request()["op"] == "fix"
        peer.answer(done=["clock"], now=time.time())

    connection, peer = connect(script)
    connection.fix(FixUp(IDENTITY, NEW_KEY), soon())
    fix = peer.requests[-1]
    assert fix["ahead"] == pytest.approx(1000, abs=5)
    assert fix["identity"]["instance_id"] == "iid-second"
    assert fix["authorize"]["new"] == "ssh-ed25519 new"


def test_each_request_has_a_number_of_its_own(connect: Connect) -> None:
    def script(peer: Peer) -> None:
        for _ in range(8):
            peer.request()
            peer.answer(exit=0)

    connection, peer = connect(script)
    for _ in range(8):
        assert run(connection).status == 0
    assert len({request["id"] for request in peer.requests}) == 8


def test_program_and_its_installation_go_together() -> None:
    assert "python3 /run/pycloudlib/helper.py" in helper.install_script()
    assert helper.program().startswith('"""')
    assert helper.once_command().endswith(" once")


@pytest.mark.parametrize("chunk", [b"x" * (1 << 16), b'{"id": 1, "out": "' + b" " * 60_000])
def test_line_without_an_end_is_not_taken_for_ever(connect: Connect, chunk: bytes) -> None:
    def script(peer: Peer) -> None:
        peer.request()
        with contextlib.suppress(OSError):
            while True:
                peer.say(chunk)

    connection, _ = connect(script)
    with pytest.raises(HelperError, match="a line without an end"):
        run(connection)


def test_reason_of_any_length_is_told_in_brief(connect: Connect) -> None:
    def script(peer: Peer) -> None:
        peer.request()
        peer.answer(error="no " * 100_000)

    connection, _ = connect(script)
    with pytest.raises(HelperError, match="no no") as caught:
        run(connection)
    assert len(str(caught.value)) < 3000
