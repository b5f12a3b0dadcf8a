"""The local terminal, handed to something remote: a pseudo-terminal stands for it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator

import pytest

from pycloudlib.cli.terminal import Greeting, SerialConsole, SshTerminal, write_all
from pycloudlib.guest.access import sessions
from tests.unit.sshserver import LocalInstance

LIMIT = 20

# Hands its terminal to whom it is connected with on a descriptor.
PROGRAM = """
import fcntl, socket, sys, termios
from pycloudlib.cli import terminal

class Remote:
    def __init__(self): self.socket = socket.socket(fileno=int(sys.argv[1]))
    def fileno(self): return self.socket.fileno()
    def receive(self): return self.socket.recv(4096) or None
    def send(self, data): self.socket.sendall(data)
    def resize(self, columns, lines): self.socket.sendall(b"<%dx%d>" % (columns, lines))

fcntl.ioctl(0, termios.TIOCSCTTY, 0)
print("left" if terminal.relay(Remote(), escape=b"\\x1d") else "ended", flush=True)
"""


class Relayed:
    """A process whose terminal is relayed, seen from both sides."""

    def __init__(self) -> None:
        self.terminal, slave = pty.openpty()
        self.resize(80, 24)
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.remote, theirs = socket.socketpair()
        self.remote.settimeout(LIMIT)
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(theirs.fileno())],
            stdin=slave,
            stdout=slave,
            pass_fds=[theirs.fileno()],
            env=environment,
            start_new_session=True,
        )
        theirs.close()
        assert self.sent(b"<80x24>") == b"<80x24>"

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def sent(self, end: bytes) -> bytes:
        """Give what the remote end got, up to something."""
        seen = b""
        while not seen.endswith(end):
            chunk = self.remote.recv(1)
            assert chunk, seen
            seen += chunk
        return seen

    def shown(self, end: bytes) -> bytes:
        """Give what the terminal shows, up to something."""
        seen = b""
        while end not in seen:
            ready, _, _ = select.select([self.terminal], [], [], LIMIT)
            assert ready, seen
            seen += os.read(self.terminal, 4096)
        return seen

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.remote.close()
        os.close(self.slave)
        os.close(self.terminal)


@pytest.fixture
def relayed() -> Iterator[Relayed]:
    relayed = Relayed()
    yield relayed
    relayed.close()


def test_every_key_goes_to_the_other_end_at_once(relayed: Relayed) -> None:
    os.write(relayed.terminal, b"a\x03\x1a\x04\r\xc3\xa4")

    assert relayed.sent(b"\xa4") == b"a\x03\x1a\x04\r\xc3\xa4"


def test_what_comes_is_shown_as_it_is(relayed: Relayed) -> None:
    relayed.remote.sendall(b"one\ntwo\r\n\x1b[1m")

    assert relayed.shown(b"\x1b[1m") == b"one\ntwo\r\n\x1b[1m"


def test_new_size_is_told(relayed: Relayed) -> None:
    relayed.resize(132, 50)

    assert relayed.sent(b"<132x50>") == b"<132x50>"


def test_escape_leaves_and_the_terminal_is_as_before(relayed: Relayed) -> None:
    os.write(relayed.terminal, b"abc\x1dxyz")

    assert relayed.sent(b"c") == b"abc"
    assert b"left" in relayed.shown(b"left")
    assert relayed.process.wait(LIMIT) == 0
    assert termios.tcgetattr(relayed.slave) == relayed.before


def test_end_of_the_other_side_restores_the_terminal(relayed: Relayed) -> None:
    relayed.remote.sendall(b"bye")
    relayed.remote.shutdown(socket.SHUT_WR)

    assert b"bye" in relayed.shown(b"ended")
    assert relayed.process.wait(LIMIT) == 0
    assert termios.tcgetattr(relayed.slave) == relayed.before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_restores_the_terminal(relayed: Relayed, number: signal.Signals) -> None:
    assert termios.tcgetattr(relayed.slave) != relayed.before

    relayed.process.send_signal(number)

    assert relayed.process.wait(LIMIT) == 128 + number
    assert termios.tcgetattr(relayed.slave) == relayed.before


def read_all(remote: SshTerminal, end: bytes) -> bytes:
    seen = b""
    while end not in seen:
        select.select([remote], [], [], LIMIT)
        chunk = remote.receive()
        assert chunk is not None, seen
        seen += chunk
    return seen


def test_command_on_a_terminal_knows_its_size_and_has_a_status(local: LocalInstance) -> None:
    with local._ssh_connect() as client:
        channel = sessions.open_session(client)
        remote = SshTerminal(channel, "test -t 0 && stty size; read x; stty size; exit 9", (90, 30))
        assert b"30 90" in read_all(remote, b"30 90")
        remote.resize(100, 40)
        deadline = time.monotonic() + LIMIT
        while local.sizes[-1] != (100, 40):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        remote.send(b"\r")
        assert b"40 100" in read_all(remote, b"40 100")
        while remote.receive() is not None:
            pass

        assert remote.wait() == 9


def test_shell_on_a_terminal_takes_what_is_typed(local: LocalInstance) -> None:
    with local._ssh_connect() as client:
        remote = SshTerminal(sessions.open_session(client), None, (80, 24))
        remote.send(b"echo $((6 * 7))\r")
        assert b"42" in read_all(remote, b"42")
        remote.send(b"exit 3\r")
        while remote.receive() is not None:
            pass

        assert remote.wait() == 3


GREETING = b"\xff\xfb\x01\xff\xfb\x03\xff\xfb\x00\xff\xfd\x00"


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"login: ",
        b"\xff",
        b"\xff\xff",
        b"a\xff\xfb\x01b",
        b"\xff\xfa\x18 hidden \xff\xf0 shown",
        b"\xff\xfa hidden for ever",
        b"\xff\xfb\x01",
    ],
)
def test_greeting_alone_is_taken_out_wherever_it_is_cut(said: bytes) -> None:
    """What comes after it is the guest's, which may look like telnet."""
    data = GREETING + said
    for cut in range(len(data) + 1):
        greeting = Greeting()
        assert greeting.remove_from(data[:cut]) + greeting.remove_from(data[cut:]) == said, cut


@pytest.mark.parametrize("said", [b"login: ", b"\xfflogin: ", b"\xff\xf1 x", b"\xfe"])
def test_server_that_does_not_greet_is_shown_as_it_is(said: bytes) -> None:
    assert Greeting().remove_from(said) == said


def test_serial_console_speaks_telnet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        got: list[bytes] = []

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"\xff\xfb\x01login: ")
                got.append(connection.recv(100))

        thread = threading.Thread(target=serve)
        thread.start()
        console = SerialConsole("127.0.0.1", server.getsockname()[1])
        assert console.receive() == b"login: "
        console.resize(80, 24)
        console.send(b"me\xff\r")
        thread.join(LIMIT)
        assert got == [b"me\xff\xff\r"]
        assert console.receive() is None
        console.close()


def test_output_is_written_to_a_descriptor_that_does_not_block() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    data = bytes(range(256)) * 4096  # more than a pipe takes at once

    def write() -> None:
        write_all(writing, data)
        os.close(writing)

    thread = threading.Thread(target=write)
    thread.start()
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == data
    thread.join()
