"""What is opened where standard input and outputs are closed, and commands that begin so."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pycloudlib._base import files

REDIRECTIONS = ("<&-", ">&-", "2>&-")
CLOSED = [each for n in (1, 2, 3) for each in itertools.combinations(REDIRECTIONS, n)]

OPENING = """
import os, socket, sys
from pycloudlib._base import files
for closed in sys.argv[2:]:
    if os.fork() == 0:
        break
    assert os.wait()[1] == 0
else:
    sys.exit()
numbers = [int(number) for number in closed]
for number in numbers:
    os.close(number)
pair = files.make_socket_pair()
pipe = files.make_pipe()
sock = files.make_socket(socket.AF_UNIX)
file = files.moved(os.open("/dev/null", os.O_RDONLY))
with files.keep_standard_streams_free():
    other = os.open("/dev/null", os.O_RDONLY)
pair[0].sendall(b"x")
opened = [*(each.fileno() for each in (*pair, sock)), *pipe, file, other]
said = [min(opened) > 2, pair[1].recv(1) == b"x", len(set(opened)) == len(opened)]
said += [not os.get_inheritable(number) for number in opened]
# The program's own stay closed: it may be about to open them.
free = []
for number in numbers:
    try:
        os.fstat(number)
        free.append(number)
    except OSError:
        pass
said.append(free == [])
with open(f"{sys.argv[1]}/{closed}", "w") as result:
    result.write(str(said))
"""


def test_forked_children_have_no_part_in_sockets() -> None:
    listener = files.make_socket(socket.AF_INET)
    listener.bind(("127.0.0.1", 0))
    listener.listen(1)
    address = listener.getsockname()
    reader, writer = files.make_socket_pair()
    begun, go_on = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.write(begun[1], b"x")
        os.close(go_on[1])
        os.read(go_on[0], 1)
        os._exit(0)
    try:
        os.read(begun[0], 1)
        listener.close()
        writer.close()
        reader.settimeout(30)
        assert reader.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address).close()
    finally:
        reader.close()
        for end in (*begun, *go_on):
            os.close(end)
        os.waitpid(child, 0)


def test_what_is_opened_is_out_of_the_way(tmp_path: Path) -> None:
    combinations = ["0", "1", "2", "01", "02", "12", "012"]

    done = subprocess.run(
        [sys.executable, "-c", OPENING, tmp_path, *combinations], check=False, capture_output=True
    )

    assert done.returncode == 0, done.stderr
    for closed in combinations:
        result = (tmp_path / closed).read_text()
        assert set(result.strip("[]").split(", ")) == {"True"}, closed


def test_what_is_not_in_the_way_stays_as_it_is() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        assert files.moved_socket(sock) is sock
    descriptor = os.open(os.devnull, os.O_RDONLY)
    try:
        assert files.moved(descriptor) == descriptor
    finally:
        os.close(descriptor)


def run(redirections: str, *arguments: str) -> tuple[int, str, str]:
    """Run a command as a shell does; give its exit code and what came of its two outputs."""
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirections}', "sh", sys.executable, "-m", "pycloudlib", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


COMMANDS = (
    ("--help",),
    ("--version",),
    ("list", "--json"),
    ("exec", "nothing", "true"),
    ("console", "nothing"),
    ("copy", "nothing:/x", "."),
    ("launch", "no/such/image.img"),
)
MORE_COMMANDS = (
    ("list",),
    ("images", "list"),
    ("info", "nothing"),
    ("logs", "nothing"),
    ("delete", "nothing"),
    ("prune",),
    ("prune", "--stopped"),
    ("completion", "bash"),
    ("no-such-command",),
)


@pytest.mark.parametrize(("words", "arguments"), list(zip(CLOSED, COMMANDS, strict=True)))
def test_command_ends_as_ever_with_closed_descriptors(
    words: tuple[str, ...], arguments: tuple[str, ...]
) -> None:
    """Each combination, each with another kind of command."""
    check_as_ever(words, arguments)


@pytest.mark.thorough
@pytest.mark.parametrize("words", CLOSED, ids=" ".join)
@pytest.mark.parametrize("arguments", [*COMMANDS, *MORE_COMMANDS], ids=" ".join)
def test_every_command_ends_as_ever_with_closed_descriptors(
    words: tuple[str, ...], arguments: tuple[str, ...]
) -> None:
    check_as_ever(words, arguments)


def check_as_ever(words: tuple[str, ...], arguments: tuple[str, ...]) -> None:
    expected = run("< /dev/null", *arguments)
    assert "defect" not in expected[2]

    code, out, err = run(" ".join(words), *arguments)

    assert code == expected[0]
    assert out == ("" if ">&-" in words else expected[1])
    assert err == ("" if "2>&-" in words else expected[2])


def test_standard_output_that_is_only_read_from_is_as_a_closed_one() -> None:
    """A shell that is run without them has its own script there, for one thing."""
    code, _out, err = run(f"1< {__file__} 0> /dev/null", "images", "list")

    assert code == 0
    assert err.startswith("There are no images")


def test_reader_that_is_gone_ends_a_command_without_a_word() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pycloudlib", "--help"],
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(writer)

    assert done.returncode == 1
    assert done.stderr == b""


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("list", "--json"),
        pytest.param(("completion", "bash"), marks=pytest.mark.thorough),
    ],
)
def test_result_that_cannot_be_written_is_an_error(arguments: tuple[str, ...]) -> None:
    code, _out, err = run("> /dev/full", *arguments)

    assert code == 1
    assert err == "Error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    "arguments",
    [("list",), pytest.param(("prune",), marks=pytest.mark.thorough), ("info", "nothing")],
)
def test_note_that_cannot_be_written_is_dropped(arguments: tuple[str, ...]) -> None:
    expected = run("", *arguments)
    assert expected[2]

    assert run("2> /dev/full", *arguments) == (*expected[:2], "")
