"""A table of what `cp -r` does: each row is made twice, copied by `cp` and by us, and compared.

The rows run as a user that is not root, to whom files can be forbidden.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pycloudlib.guest.programs import copy_in_guest
from pycloudlib.guest.programs.copy_in_guest import Reader, Writer

NOBODY = 65534
LIMIT = 60

Make = Callable[[], None]


def file(path: str | bytes, content: bytes = b"content", mode: int = 0o644) -> Make:
    def make() -> None:
        made = Path(os.fsdecode(path))
        made.write_bytes(content)
        made.chmod(mode)

    return make


def sparse(path: str, *data: tuple[int, bytes], size: int) -> Make:
    def make() -> None:
        with Path(path).open("wb") as written:
            for offset, content in data:
                written.seek(offset)
                written.write(content)
            written.truncate(size)

    return make


def directory(path: str, *inside: Make, mode: int = 0o755) -> Make:
    def make() -> None:
        Path(path).mkdir()
        here = Path.cwd()
        os.chdir(path)
        for one in inside:
            one()
        os.chdir(here)
        Path(path).chmod(mode)

    return make


def link(path: str, to: str) -> Make:
    return lambda: Path(path).symlink_to(to)


def hard(path: str, to: str) -> Make:
    return lambda: os.link(to, path)


def fifo(path: str) -> Make:
    return lambda: os.mkfifo(path, 0o640)


def sock(path: str) -> Make:
    def make() -> None:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path)

    return make


def both(first: Make, second: Make) -> Make:
    def make() -> None:
        first()
        second()

    return make


def masked(umask: int) -> Make:
    def make() -> None:
        os.umask(umask)

    return make


TREE = directory(
    "tree",
    file("file"),
    file("run", b"#!/bin/sh\n", 0o755),
    file("secret", b"s", 0o600),
    file("read only", b"r", 0o444),
    file("empty", b""),
    file("long", os.urandom(300_000)),
    file(b"n\xf6n utf-8"),
    file("-r"),
    file("line\nend"),
    file("a:b 'c' \"d\" $e"),
    hard("hard", "file"),
    link("link", "file"),
    link("up", "../outside"),
    link("absolute", "/etc/hostname"),
    link("dangling", "nowhere"),
    link("to directory", "sub"),
    fifo("pipe"),
    sock("socket"),
    sparse("holes", (1 << 16, b"x" * 5000), (1 << 18, b"y"), size=1 << 20),
    sparse("hole", size=1 << 20),
    directory("nothing"),
    directory("sub", file("one"), directory("below", file("two", mode=0o666), mode=0o700)),
    directory("not to be written", file("in it"), mode=0o555),
    directory("open", file("x"), mode=0o1777),
)
FILE = file("f", b"new content", 0o640)

# Name: what is there, the source, the target.
ROWS: dict[str, tuple[list[Make], str, str]] = {
    # A file, and what its target is.
    "new file": ([FILE], "f", "new"),
    "new file at a slash": ([FILE], "f", "new/"),
    "file there": ([FILE, file("old", b"much older content", 0o604)], "f", "old"),
    "file there at a slash": ([FILE, file("old")], "f", "old/"),
    "file there by two names": ([FILE, file("old"), hard("other", "old")], "f", "old"),
    "file that must not be written": ([FILE, file("old", mode=0o444)], "f", "old"),
    "directory": ([FILE, directory("d")], "f", "d"),
    "directory at a slash": ([FILE, directory("d")], "f", "d/"),
    "directory with a dot": ([FILE, directory("d")], "f", "d/."),
    "directory that must not be written": ([FILE, directory("d", mode=0o555)], "f", "d"),
    "this directory": ([directory("d", FILE)], "d/f", "."),
    "the one above": ([directory("d", FILE), directory("e")], "d/f", "e/.."),
    "directory has the file": ([FILE, directory("d", file("f", b"o", 0o600))], "f", "d"),
    "directory has a directory": ([FILE, directory("d", directory("f"))], "f", "d"),
    "directory has a link": ([FILE, directory("d", file("x", b"o"), link("f", "x"))], "f", "d"),
    "directory has a dangling link": ([FILE, directory("d", link("f", "x"))], "f", "d"),
    "directory has a link to one": (
        [FILE, directory("x"), directory("d", link("f", "../x"))],
        "f",
        "d",
    ),
    "link to a file": ([FILE, file("old"), link("l", "old")], "f", "l"),
    "link to a directory": ([FILE, directory("d"), link("l", "d")], "f", "l"),
    "link to a directory at a slash": ([FILE, directory("d"), link("l", "d")], "f", "l/"),
    "dangling link": ([FILE, link("l", "nowhere")], "f", "l"),
    "link to itself": ([FILE, link("l", "l")], "f", "l"),
    "nothing above": ([FILE], "f", "no/where"),
    "file above": ([FILE, file("x")], "f", "x/below"),
    "socket there": ([FILE, sock("s")], "f", "s"),
    "device there": ([FILE], "f", "/dev/null"),
    "device that is full": ([FILE], "f", "/dev/full"),
    "target without a name": ([FILE], "f", ""),
    "target with an odd name": ([FILE], "f", "-r"),
    "target on two lines": ([FILE], "f", "a\nb"),
    "target that is no text": ([FILE], "f", os.fsdecode(b"\xff\xfe")),
    "target of too long a name": ([FILE], "f", "x" * 300),
    # A file, and what it is.
    **{
        f"file of mode {mode:o}": ([file("f", mode=mode)], "f", "new")
        for mode in (0o777, 0o755, 0o600, 0o444, 0o400, 0o4755, 0o2755, 0o1644, 0o200, 0o000)
    },
    **{
        f"file under umask {umask:03o}": ([masked(umask), file("f", mode=0o666)], "f", "new")
        for umask in (0, 0o002, 0o077, 0o777)
    },
    "empty file": ([file("f", b"")], "f", "new"),
    "empty file over one": ([file("f", b""), file("old")], "f", "old"),
    "long file": ([file("f", os.urandom(600_001))], "f", "new"),
    "file with holes": ([sparse("f", (1 << 18, b"x" * 9000), size=1 << 20)], "f", "new"),
    "file with holes over one": (
        [sparse("f", (1 << 20, b"x"), size=2 << 20), file("old", b"o" * (1 << 20))],
        "f",
        "old",
    ),
    "file with holes to a device": ([sparse("f", size=1 << 20)], "f", "/dev/null"),
    "file of the kernel": ([], "/proc/version", "new"),
    "link that is named": ([FILE, link("l", "f")], "l", "new"),
    "link to a directory that is named": ([directory("d", FILE), link("l", "d")], "l", "new"),
    "link to a directory with a slash": ([directory("d", FILE), link("l", "d")], "l/", "new"),
    "dangling link that is named": ([link("l", "nowhere")], "l", "new"),
    "link to itself that is named": ([link("l", "l")], "l", "new"),
    "file with a slash": ([FILE], "f/", "new"),
    "source that is not there": ([], "f", "new"),
    "source without a name": ([], "", "new"),
    "source in what is not there": ([], "no/f", "new"),
    "pipe": ([fifo("p")], "p", "new"),
    "pipe over a file": ([fifo("p"), file("old")], "p", "old"),
    "socket": ([sock("s")], "s", "new"),
    "device": ([], "/dev/null", "new"),
    "odd source": ([file("-r")], "./-r", "new"),
    "source on two lines": ([file("a\nb"), directory("d")], "a\nb", "d"),
    "source that is no text": ([file(b"\xff"), directory("d")], os.fsdecode(b"\xff"), "d"),
    # A tree, and what its target is.
    "new tree": ([TREE], "tree", "new"),
    "new tree at a slash": ([TREE], "tree", "new/"),
    "tree with a slash": ([TREE, directory("d")], "tree/", "d"),
    "tree's content": ([TREE, directory("d")], "tree/.", "d"),
    "new tree of its content": ([TREE], "tree/.", "new"),
    "what is above": ([TREE, directory("t", directory("d"))], "tree/sub/..", "t/d"),
    "content that is above": ([TREE, directory("d")], "tree/nothing/..", "d"),
    "tree into a directory": ([TREE, directory("d", mode=0o711)], "tree", "d"),
    "tree into a directory at a slash": ([TREE, directory("d")], "tree", "d/"),
    "tree over a file": ([TREE, file("old")], "tree", "old"),
    "tree over a link to a file": ([TREE, file("old"), link("l", "old")], "tree", "l"),
    "tree into a link": ([TREE, directory("d"), link("l", "d")], "tree", "l"),
    "content into a link": ([TREE, directory("d"), link("l", "d")], "tree/.", "l"),
    "tree over a dangling link": ([TREE, link("l", "nowhere")], "tree", "l"),
    "tree where nothing is above": ([TREE], "tree", "no/where"),
    "tree where nothing may be": ([TREE, directory("d", mode=0o555)], "tree", "d"),
    "tree under another umask": ([masked(0o077), TREE], "tree", "new"),
    "tree under no umask": ([masked(0), TREE], "tree", "new"),
    **{
        f"directory of mode {mode:o}": ([directory("d", file("f"), mode=mode)], "d", "new")
        for mode in (0o777, 0o700, 0o555, 0o500, 0o1777, 0o2755, 0o300, 0o600, 0o000)
    },
    # A tree, and what is there of it already.
    "tree that is there": (
        [TREE, directory("d", directory("tree", file("file", b"old", 0o606), file("more")))],
        "tree",
        "d",
    ),
    "directories there keep their modes": (
        [TREE, directory("d", directory("sub", file("own"), mode=0o750), mode=0o711)],
        "tree/.",
        "d",
    ),
    **{
        f"{what} over {over}": (
            [directory("s", make("x")), file("o", b"of old"), directory("d", there("x"))],
            "s/.",
            "d",
        )
        for what, make in {
            "file": lambda name: file(name, b"new", 0o640),
            "directory": lambda name: directory(name, file("below")),
            "link": lambda name: link(name, "anywhere"),
            "pipe": fifo,
            "socket": sock,
        }.items()
        for over, there in {
            "file": lambda name: file(name, b"older", 0o604),
            "directory": directory,
            "directory with files": lambda name: directory(name, file("below", b"old", 0o606)),
            "dangling link": lambda name: link(name, "nowhere"),
            "link within": lambda name: both(file("y"), link(name, "y")),
            "link to a directory within": lambda name: both(directory("y"), link(name, "y")),
            "socket": sock,
        }.items()
    },
    "some that cannot be read": (
        [
            directory(
                "s",
                file("a"),
                file("b", mode=0),
                directory("c", file("x"), mode=0),
                directory("d", file("x"), mode=0o444),
                directory("e", file("x", mode=0), file("y")),
                file("f"),
            )
        ],
        "s",
        "new",
    ),
    "some that cannot be written": (
        [
            directory("s", file("a"), file("b"), directory("c", file("x")), file("e")),
            directory(
                "d",
                file("a", b"old", 0o444),
                directory("c", file("x", b"old"), mode=0o500),
            ),
        ],
        "s/.",
        "d",
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What a copy has left, and what it has complained of."""

    left: dict[str, Any]
    complaints: list[str]


def describe(path: Path, before: dict[str, int]) -> dict[str, Any]:
    """Describe all that is below a directory."""
    seen: dict[str, Any] = {}
    for found in sorted(path.rglob("*")):
        name = ascii(str(found.relative_to(path)))
        try:
            facts = found.lstat()
        except PermissionError:
            seen[name] = "cannot be seen"
            continue
        seen[name] = {
            "mode": oct(facts.st_mode),
            "links": facts.st_nlink if not stat.S_ISDIR(facts.st_mode) else 0,
            "kept": before.get(name) == facts.st_ino,
        }
        if stat.S_ISLNK(facts.st_mode):
            seen[name]["to"] = str(found.readlink())
        elif stat.S_ISREG(facts.st_mode):
            seen[name]["size"] = facts.st_size
            seen[name]["sparse"] = facts.st_blocks * 512 < facts.st_size
            if os.access(found, os.R_OK):
                seen[name]["content"] = hash(found.read_bytes())
    return seen


def inodes(path: Path) -> dict[str, int]:
    """List the inodes of what is there, and hold on to them, so that nothing new gets one."""
    found = {}
    for at in path.rglob("*"):
        with contextlib.suppress(PermissionError):
            os.open(at, os.O_PATH | os.O_NOFOLLOW)
            found[ascii(str(at.relative_to(path)))] = at.lstat().st_ino
    return found


def by_cp(source: str, target: str) -> list[str]:
    done = subprocess.run(
        # One that is named is followed: what it points at is on the other side. (`cp -r` would copy
        # the link; and with `-H` it does not let a pipe take the place of a file.)
        ["cp", "-rH" if Path(source).is_symlink() else "-r", "--", source, target],
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=LIMIT,
    )
    said = os.fsdecode(done.stderr).splitlines()
    assert bool(done.returncode) is bool(said)
    return said


def by_us(source: str, target: str, *, trusting: bool) -> list[str]:
    path = os.fsencode(source)
    stream = io.BytesIO()
    send = copy_in_guest.sender(stream)
    Reader(send).read(path)
    send(copy_in_guest.END, b"")
    stream.seek(0)
    name = copy_in_guest.name_in_directory(path)
    writer = Writer(os.fsencode(target), name, trusting=trusting)
    problems = copy_in_guest.write(stream, writer)
    return [f"{one.attempt} {os.fsdecode(one.path)}: {one.why}" for one in problems]


def run_row(work: Path, makes: list[Make], copy: Callable[[], list[str]]) -> Outcome:
    """Make what is there, copy, and see what has come of it; in a process of its own."""
    work.mkdir(mode=0o777)
    work.chmod(0o777)
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(ours)
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            os.umask(0o022)
            os.chdir(work)
            for make in makes:
                make()
            before = inodes(work)
            complaints = copy()
            with os.fdopen(theirs, "w") as told:
                json.dump({"left": describe(work, before), "complaints": complaints}, told)
            status = 0
        finally:
            os._exit(status)
    os.close(theirs)
    with os.fdopen(ours) as told:
        text = told.read()
    assert os.waitpid(child, 0)[1] == 0
    return Outcome(**json.loads(text))


@pytest.fixture
def place() -> Iterator[Path]:
    """Give a directory that others than root can come to."""
    directory = Path(tempfile.mkdtemp(prefix="pycloudlib-copy-", dir="/tmp"))
    directory.chmod(0o755)
    yield directory
    for found in [directory, *directory.rglob("*")]:
        if found.is_dir() and not found.is_symlink():
            found.chmod(0o700)
    shutil.rmtree(directory)


@pytest.mark.parametrize("row", ROWS)
def test_copy_is_what_cp_makes_of_it(row: str, place: Path) -> None:
    makes, source, target = ROWS[row]

    theirs = run_row(place / "cp", makes, lambda: by_cp(source, target))
    pushed = run_row(place / "push", makes, lambda: by_us(source, target, trusting=True))
    pulled = run_row(place / "pull", makes, lambda: by_us(source, target, trusting=False))

    for ours in (pushed, pulled):
        assert ours.left == theirs.left
        assert len(ours.complaints) == len(theirs.complaints), (ours.complaints, theirs.complaints)


@pytest.mark.parametrize("row", ["some that cannot be read", "some that cannot be written"])
def test_what_is_left_out_is_named(row: str, place: Path) -> None:
    makes, source, target = ROWS[row]

    theirs = run_row(place / "theirs", makes, lambda: by_cp(source, target))
    ours = run_row(place / "ours", makes, lambda: by_us(source, target, trusting=False))

    def names(complaints: list[str]) -> list[str]:
        paths = (re.findall(r"[sd](?:/[a-z.]+)+", complaint) for complaint in complaints)
        return sorted(path[0].replace("/./", "/") for path in paths)

    assert names(ours.complaints) == names(theirs.complaints)
    assert names(ours.complaints)


LEADING_OUT = [
    *(file("outside"), directory("beside")),
    directory("s", file("x", b"new"), file("y", b"new")),
    directory("d", link("x", "../outside"), link("y", "../beside/y")),
    file("beside/y"),
]


@pytest.mark.parametrize(("source", "refused"), [("s/.", 2), ("s/x", 1)])
def test_link_is_written_through_in_the_guest_but_not_out_of_a_directory_here(
    place: Path, source: str, refused: int
) -> None:
    theirs = run_row(place / "theirs", LEADING_OUT, lambda: by_cp(source, "d"))
    pushed = run_row(place / "push", LEADING_OUT, lambda: by_us(source, "d", trusting=True))
    pulled = run_row(place / "pull", LEADING_OUT, lambda: by_us(source, "d", trusting=False))

    assert pushed == theirs
    assert [complaint.partition(":")[2] for complaint in pulled.complaints] == [
        " there is a symbolic link that leads out of the target"
    ] * refused
    assert (place / "pull" / "outside").read_bytes() == b"content"
    assert (place / "pull" / "beside" / "y").read_bytes() == b"content"
