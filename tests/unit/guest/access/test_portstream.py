"""Files by the port: what comes on it is not believed, and whoever hangs up is not waited for."""

from __future__ import annotations

import contextlib
import getpass
import io
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest

from pycloudlib._base.deadline import Deadline
from pycloudlib.guest.access import portstream
from pycloudlib.guest.access.portstream import PortError, PortStream
from pycloudlib.guest.helper import HelperConnection, HelperError
from pycloudlib.guest.programs import copy_in_guest, helper_in_guest
from pycloudlib.guest.programs.copy_in_guest import (
    CLOSE,
    DATA,
    END,
    FILE,
    LINK,
    MODE,
    NUMBER,
    PROBLEM,
    SPECIAL,
    Problem,
    StreamError,
)
from tests.unit.sshserver import LocalInstance, LocalPort

ME = getpass.getuser()
HELPER = Path(helper_in_guest.__file__).read_text()


@pytest.fixture
def port(guest: Path) -> LocalPort:
    """Give a port with a process at its other end."""
    return LocalPort(guest)


@pytest.fixture
def machine(guest: Path, port: LocalPort) -> Iterator[LocalInstance]:
    """Give a machine that has it."""
    instance = LocalInstance(guest, port=port)
    yield instance
    instance.close()


def test_files_go_by_the_port(machine: LocalInstance, port: LocalPort, here: Path) -> None:
    (here / "sent").write_bytes(os.urandom(700_000))
    machine.push_file(here / "sent", "there")
    machine.pull_file("there", here / "back")
    there = str(machine.directory / "there")
    assert [role for role, _ in port.copies] == ["write-regular", "read"]
    assert {Path(path).name for _, path in port.copies} == {Path(there).name}
    assert (here / "back").read_bytes() == (here / "sent").read_bytes()


def test_no_ssh_is_needed_where_a_helper_has_the_port(
    machine: LocalInstance, port: LocalPort, here: Path
) -> None:
    port.is_ready = True
    (here / "sent").write_bytes(b"few")
    machine.push_file(here / "sent", "there")
    machine.pull_file("there", here / "back")
    assert (here / "back").read_bytes() == b"few"
    assert not machine.transports


def test_holes_stay_holes(machine: LocalInstance, guest: Path, here: Path) -> None:
    with (here / "sparse").open("wb") as file:
        file.truncate(1 << 30)
        file.seek(1 << 29)
        file.write(b"middle")
    machine.push_file(here / "sparse", "there")
    machine.pull_file("there", here / "back")
    for copy in (guest / "there", here / "back"):
        facts = copy.stat()
        assert (facts.st_size, facts.st_blocks < 1 << 10) == (1 << 30, True)
        with copy.open("rb") as file:
            file.seek(1 << 29)
            assert file.read(6) == b"middle"


def test_what_came_before_is_not_the_copy(
    machine: LocalInstance, port: LocalPort, here: Path
) -> None:
    port.prefix = b'{"id": 5, "out": 3}\nabc\0\xff\n\n' + b"0" * 32 + b"\n"
    (here / "sent").write_bytes(b"content")
    machine.push_file(here / "sent", "there")
    machine.pull_file("there", here / "back")
    assert (here / "back").read_bytes() == b"content"


class ScriptedPort(LocalPort):
    """A port on which a guest sends what it likes; None for one that cannot be had."""

    def __init__(self, directory: Path, sent: bytes | None) -> None:
        super().__init__(directory)
        self.sent = sent

    @contextlib.contextmanager
    def copying(
        self, role: str, path: str, name: str = "", *, size: int = 0
    ) -> Iterator[PortStream | None]:
        if self.sent is None:
            yield None
            return
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(self.sent)
            theirs.shutdown(socket.SHUT_WR)
            yield PortStream(ours, lambda: None)


def record(kind: bytes, payload: bytes = b"") -> bytes:
    return copy_in_guest.HEAD.pack(kind, len(payload)) + payload


BEGUN = record(FILE, MODE.pack(0o644) + NUMBER.pack(4)) + record(DATA, NUMBER.pack(0) + b"half")


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"rubbish",
        BEGUN,
        BEGUN + record(DATA, NUMBER.pack(1) + b"over"),
        BEGUN + record(CLOSE, NUMBER.pack(2)) + record(END),
        BEGUN + record(LINK, MODE.pack(1) + b"ab") + record(END),
        BEGUN + record(PROBLEM, b"what") + record(END),
        copy_in_guest.HEAD.pack(DATA, 1 << 31),
    ],
    ids=["nothing", "text", "half", "overlap", "short", "link", "problem", "huge"],
)
def test_nonsense_of_a_guest_changes_nothing_here(guest: Path, here: Path, sent: bytes) -> None:
    machine = LocalInstance(guest, port=ScriptedPort(guest, sent))
    (guest / "file").write_text("content")
    (here / "kept").write_text("before")
    with pytest.raises(paramiko.SSHException, match="file"):
        machine.pull_file("file", here / "kept")
    assert (here / "kept").read_text() == "before"
    machine.close()


def test_an_error_in_the_middle_is_one_of_the_file(guest: Path, here: Path) -> None:
    broken = record(PROBLEM, Problem("read", b"/x", 5, "Input/output error").pack())
    machine = LocalInstance(guest, port=ScriptedPort(guest, BEGUN + broken + record(END)))
    (guest / "file").write_text("content")
    with pytest.raises(OSError, match=r"Input/output error.*file"):
        machine.pull_file("file", here / "new")
    assert not (here / "new").exists()
    machine.close()


@pytest.mark.parametrize("sent", [None, record(SPECIAL, MODE.pack(0)) + record(END)])
def test_what_the_port_cannot_do_is_left_to_sftp(
    guest: Path, here: Path, sent: bytes | None
) -> None:
    machine = LocalInstance(guest, port=ScriptedPort(guest, sent))
    (guest / "file").write_text("content")
    machine.pull_file("file", here / "back")
    assert (here / "back").read_text() == "content"
    machine.close()


def test_a_connection_on_which_nothing_moves_is_given_up() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(PortError, match="nothing was received"):
        PortStream(ours, lambda: None, stall_limit=0).begin()


def test_a_check_ends_the_wait() -> None:
    def check() -> None:
        raise PortError("it is gone")

    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(PortError, match="it is gone"):
        PortStream(ours, check).begin()


def test_the_half_in_the_guest_ends_when_the_host_hangs_up() -> None:
    ours, theirs = socket.socketpair()
    text = portstream.program().replace('if __name__ == "__main__":\n    main()', "")
    script = f"{text}\nend_with_host({theirs.fileno()})\nprint('begun', flush=True)\nos.read(0, 1)"
    with subprocess.Popen(
        [sys.executable, "-IS", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[theirs.fileno()],
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"begun\n"
        theirs.close()
        ours.close()
        assert process.wait(30) == 1


SERVE = """
port = Port.__new__(Port)
port.fd, port.buffer = int(sys.argv[1]), b""
port.take_back()
try:
    while True:
        serve(port, {})
except HungUp:
    pass
"""


@pytest.fixture
def helper(here: Path) -> Iterator[HelperConnection]:
    """Connect to a helper, which is a process of this host; it ends when the test hangs up."""
    ours, theirs = socket.socketpair()
    text = HELPER.replace('if __name__ == "__main__":\n    main()', SERVE)
    with subprocess.Popen(
        [sys.executable, "-IS", "-c", text, str(theirs.fileno())], pass_fds=[theirs.fileno()]
    ) as process:
        theirs.close()
        with HelperConnection(ours) as connection:
            yield connection
        assert process.wait(30) == 0


def lend(connection: HelperConnection, *argv: str, program: str = "") -> Any:
    return connection.lend(program or portstream.program(), argv, ME)


def test_helper_lends_its_port_and_has_it_back(helper: HelperConnection, here: Path) -> None:
    for number in range(2):
        target = here / f"file{number}"
        data = os.urandom(300_000)
        with lend(helper, "write-regular", str(target), "") as stream:
            stream.records(FILE, MODE.pack(0o666) + NUMBER.pack(len(data)))
            for at in range(0, len(data), 1 << 18):
                stream.records(DATA, NUMBER.pack(at) + data[at : at + (1 << 18)])
            stream.records(CLOSE, NUMBER.pack(len(data)))
            stream.records(END, b"")
            stream.flush()
            assert list(copy_in_guest.read_records(stream.answers)) == []
        assert target.read_bytes() == data
        assert helper.is_listening(Deadline.after(30))


def test_a_program_that_ended_early_leaves_no_request(helper: HelperConnection, here: Path) -> None:
    """What was meant for it is content of files, whatever it looks like."""
    mark = here / "mark"
    program = (
        "import os, sys; token, port = sys.argv[1:]; "
        "os.write(int(port), token.encode() + b'\\n'); raise SystemExit(3)"
    )
    words = f'["touch", "{mark}"]'
    content = f'\n{{"id": 1, "op": "exec", "argv": {words}, "user": "{ME}", "stdin": 0}}\n'
    with lend(helper, program=program) as stream:
        stream.records(DATA, content.encode())
        stream.flush()
    assert not helper.is_listening(Deadline.after(0.5))
    assert not mark.exists()


def test_a_guest_that_never_ends_what_it_says_is_left() -> None:
    ours, theirs = socket.socketpair()
    stream = PortStream(ours, lambda: None, bytearray(b"x\n" * (3 << 20)))
    with ours, theirs, pytest.raises(PortError, match="sends something else"):
        for _ in stream.read_lines():
            pass


def test_problems_have_an_end() -> None:
    one = record(PROBLEM, Problem("write", b"/x", 28, "No space left on device").pack())
    most = copy_in_guest.MOST_PROBLEMS + 1  # the last says that there are more
    assert len(copy_in_guest.read_problems(io.BytesIO(one * most + record(END)))) == most
    for sent in (one * (most + 1), record(DATA)):
        with pytest.raises(StreamError, match="in place of the end"):
            copy_in_guest.read_problems(io.BytesIO(sent + record(END)))


def test_a_helper_without_the_word_refuses(helper: HelperConnection) -> None:
    with pytest.raises(HelperError, match="no-such-user"), helper.lend("", [], "no-such-user"):
        pass
    assert helper.is_listening(Deadline.after(30))
