"""Copies between here and a machine: what `cp -r` would do, and nothing outside."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path
from typing import cast

import pytest

from pycloudlib.cli import transfer
from pycloudlib.cli.transfer import CopyError, Location
from pycloudlib.errors import PycloudlibError
from pycloudlib.guest.programs import copy_in_guest
from pycloudlib.guest.programs.copy_in_guest import (
    CLOSE,
    DATA,
    DIRECTORY,
    END,
    FILE,
    LINK,
    MODE,
    NUMBER,
    SPECIAL,
    UP,
    Problem,
    StreamError,
    Writer,
)
from pycloudlib.progress import Progress
from pycloudlib.qemu.instance import QemuInstance
from tests.unit.sshserver import LocalInstance, LocalPort, replace_program


@pytest.fixture
def over_ssh(local: LocalInstance) -> QemuInstance:
    """Give a machine that SSH alone leads to."""
    return cast("QemuInstance", local)


@pytest.fixture(params=["ssh", pytest.param("port", marks=pytest.mark.thorough)])
def instance(request: pytest.FixtureRequest, local: LocalInstance) -> QemuInstance:
    """Give a machine for each way in which copies go."""
    if request.param == "port":
        local.port_of_files = LocalPort(local.directory, is_ready=True)
    return cast("QemuInstance", local)


@pytest.fixture
def tree(here: Path) -> Path:
    """Give a directory with what directories have in them."""
    tree = here / "tree"
    (tree / "sub dir" / "empty").mkdir(parents=True)
    (tree / "file").write_text("content")
    (tree / "sub dir" / "run.sh").write_text("#!/bin/sh\n")
    (tree / "sub dir" / "run.sh").chmod(0o755)
    (tree / "grüß").write_bytes(bytes(100_000))
    (tree / "link").symlink_to("file")
    (tree / "dangling").symlink_to("/nowhere/at/all")
    os.link(tree / "file", tree / "hard")
    return tree


def portrait(directory: Path) -> dict[str, object]:
    """Describe all that is in a directory."""
    seen: dict[str, object] = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_symlink():
            seen[name] = str(path.readlink())
        elif path.is_dir():
            seen[name] = "directory"
        else:
            seen[name] = (path.read_bytes(), path.stat().st_mode & 0o777)
    return seen


@pytest.mark.parametrize(
    ("text", "machine", "path"),
    [
        ("web:/etc/motd", "web", "/etc/motd"),
        ("web:", "web", "."),
        ("web:a:b", "web", "a:b"),
        ("job/web:x", "job/web", "x"),
        ("file", "", "file"),
        ("./web:x", "", "./web:x"),
        ("/tmp/a:b", "", "/tmp/a:b"),
        ("a/b/c:x", "", "a/b/c:x"),
        ("File:x", "", "File:x"),
        ("~/x", "", "~/x"),
    ],
)
def test_places_are_told_apart(text: str, machine: str, path: str) -> None:
    assert Location.parse(text) == Location(machine, path)


def test_file_is_pushed_with_its_permissions(
    instance: QemuInstance, tree: Path, guest: Path
) -> None:
    transfer.push(instance, f"{tree}/sub dir/run.sh", "copy.sh")

    assert (guest / "copy.sh").read_text() == "#!/bin/sh\n"
    assert (guest / "copy.sh").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("target", [".", "./", "there", "there/"])
def test_file_goes_into_a_directory(
    instance: QemuInstance, tree: Path, guest: Path, target: str
) -> None:
    (guest / "there").mkdir()

    transfer.push(instance, f"{tree}/file", target)

    assert (guest / target / "file").read_text() == "content"


@pytest.mark.parametrize("is_ready", [False, True])
def test_copies_go_by_the_port(
    local: LocalInstance, tree: Path, guest: Path, here: Path, is_ready: bool
) -> None:
    port = local.port_of_files = LocalPort(guest, is_ready=is_ready)
    instance = cast("QemuInstance", local)
    transfer.push(instance, str(tree), "copy")
    transfer.pull(instance, "copy", str(here / "back"))
    transfer.pull(instance, "copy/file", str(here / "file"))
    assert portrait(guest / "copy") == portrait(here / "back") == portrait(tree)
    assert (here / "file").read_text() == "content"
    # How large a directory is, is not known before.
    roles = ["write", "read", "read"] if is_ready else ["write", "read"]
    assert [role for role, _ in port.copies] == roles
    with pytest.raises(FileNotFoundError, match="web:missing"):
        transfer.pull(instance, "missing", str(here / "missing"))


def test_directory_is_pushed_whole(instance: QemuInstance, tree: Path, guest: Path) -> None:
    transfer.push(instance, str(tree), "copy")
    transfer.push(instance, str(tree), "copy")  # by now it is there: into it

    assert (guest / "copy" / "tree").is_dir()
    first = {k: v for k, v in portrait(guest / "copy").items() if not k.startswith("tree")}
    assert first == portrait(tree) == portrait(guest / "copy" / "tree")


def test_copies_tell_how_far_they_are(
    instance: QemuInstance, tree: Path, guest: Path, here: Path
) -> None:
    size = sum(
        file.lstat().st_size for file in tree.rglob("*") if not file.is_symlink() and file.is_file()
    )
    reports: dict[str, list[Progress]] = {name: [] for name in ("push", "pull", "file")}

    transfer.push(instance, str(tree), "copy", reports["push"].append)
    transfer.pull(instance, "copy", str(here / "back"), reports["pull"].append)
    transfer.pull(instance, "copy/grüß", str(here / "one"), reports["file"].append)

    for name, least, total in (
        ("push", size, size),
        ("pull", size, None),
        ("file", 100000, 100000),
    ):
        done = [report.done or 0 for report in reports[name]]
        assert done == sorted(done)
        assert done[-1] >= least
        assert reports[name][-1].total == total
        assert {report.unit for report in reports[name]} == {"B"}


def test_directory_is_pulled_whole(
    instance: QemuInstance, tree: Path, guest: Path, here: Path
) -> None:
    tree.rename(guest / "tree")

    transfer.pull(instance, "tree", str(here / "copy"))
    transfer.pull(instance, "tree/", str(here / "copy"))

    first = {k: v for k, v in portrait(here / "copy").items() if not k.startswith("tree")}
    assert first == portrait(guest / "tree") == portrait(here / "copy" / "tree")


def test_link_that_is_named_is_followed(instance: QemuInstance, guest: Path, here: Path) -> None:
    (guest / "lib").mkdir()
    (guest / "lib" / "os-release").write_text("ID=debian\n")
    (guest / "lib" / "os-release").chmod(0o644)
    (guest / "os-release").symlink_to("lib/os-release")

    transfer.pull(instance, "os-release", str(here))

    assert not (here / "os-release").is_symlink()
    assert (here / "os-release").read_text() == "ID=debian\n"
    assert (here / "os-release").stat().st_mode & 0o777 == 0o644


def test_content_of_a_directory_goes_into_another(
    instance: QemuInstance, tree: Path, guest: Path, here: Path
) -> None:
    (guest / "there").mkdir()

    transfer.push(instance, f"{tree}/.", "there/")
    transfer.pull(instance, "there/.", str(here / "back"))

    assert portrait(guest / "there") == portrait(tree) == portrait(here / "back")


@pytest.mark.parametrize("name", ["-rf", "a b", "a:b", "line\nend", "~", "$HOME 'x'", "\udcff"])
def test_names_mean_nothing(instance: QemuInstance, guest: Path, here: Path, name: str) -> None:
    (here / name).write_text("content")

    transfer.push(instance, f"{here}/{name}", ".")
    transfer.pull(instance, name, str(here / "back"))

    assert (guest / name).read_text() == (here / "back").read_text() == "content"


@pytest.mark.parametrize("path", ["", "nothing", "nothing/", "no/thing", "no/thing/."])
def test_missing_sources_are_named(instance: QemuInstance, here: Path, path: str) -> None:
    with pytest.raises(FileNotFoundError) as pushing:
        transfer.push(instance, f"{here}/{path}" if path else "", "x")
    with pytest.raises(FileNotFoundError) as pulling:
        transfer.pull(instance, path, str(here / "x"))

    assert pushing.value.filename == (f"{here}/{path}" if path else "")
    assert pulling.value.filename == f"web:{path}"
    assert not (here / "x").exists()


def test_missing_targets_are_named(instance: QemuInstance, tree: Path, guest: Path) -> None:
    (guest / "file").touch()

    with pytest.raises(FileNotFoundError) as pushing:
        transfer.push(instance, f"{tree}/file", "no/where")
    with pytest.raises(FileNotFoundError) as pulling:
        transfer.pull(instance, "file", f"{tree}/no/where")

    assert pushing.value.filename == "web:no/where"
    assert pulling.value.filename == f"{tree}/no/where"


def test_what_cannot_be_copied_is_named_and_the_rest_is_copied(
    instance: QemuInstance, tree: Path, guest: Path, here: Path
) -> None:
    (guest / "file").touch()
    for there, name in ((guest, "push"), (here, "pull")):
        (there / name / "tree" / "file").mkdir(parents=True)
        (there / name / "tree" / "sub dir").touch()

    with pytest.raises(CopyError) as pushing:
        transfer.push(instance, str(tree), "push")
    transfer.push(instance, str(tree), "tree")
    with pytest.raises(CopyError) as pulling:
        transfer.pull(instance, "tree", str(here / "pull"))

    assert pushing.value.problems == (
        "cannot create regular file 'web:push/tree/file': there is a directory",
        "cannot create directory 'web:push/tree/sub dir': there is something that is no directory",
    )
    assert [problem.replace("web:push", f"{here}/pull") for problem in pushing.value.problems] == [
        *pulling.value.problems
    ]
    for there in (guest / "push", here / "pull"):
        assert {"grüß", "link", "dangling", "hard"} <= {*portrait(there / "tree")}


def test_guest_without_python_is_told_of(
    over_ssh: QemuInstance,
    tree: Path,
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replace_program(tmp_path, monkeypatch, "python3", None)

    with pytest.raises(PycloudlibError, match="web has no python3"):
        transfer.push(over_ssh, str(tree), "x")
    with pytest.raises(PycloudlibError, match="web has no python3"):
        transfer.pull(over_ssh, "x", str(here))


def test_words_of_a_guest_s_login_are_not_taken_for_files(
    over_ssh: QemuInstance, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_program(tmp_path, monkeypatch, "python3", "echo Welcome to this machine")

    with pytest.raises(PycloudlibError, match="What web sends is refused"):
        transfer.pull(over_ssh, "x", str(here / "x"))

    assert not (here / "x").exists()


def test_guest_that_names_more_problems_than_it_keeps_is_refused(
    over_ssh: QemuInstance, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "file").touch()
    problem = Problem("write", b"/x", errno.EIO, "Input/output error").pack()
    record = copy_in_guest.HEAD.pack(copy_in_guest.PROBLEM, len(problem)) + problem
    (tmp_path / "said").write_bytes(record * 1500 + copy_in_guest.HEAD.pack(END, 0))
    replace_program(tmp_path, monkeypatch, "python3", f"cat >/dev/null; cat {tmp_path}/said")

    with pytest.raises(PycloudlibError, match="in place of the end of the problems"):
        transfer.push(over_ssh, str(here / "file"), "copy")


def test_stream_that_is_damaged_ends_a_copy_while_more_comes(
    instance: QemuInstance, guest: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More than the other side can get rid of when nobody reads.
    (guest / "large").write_bytes(bytes(16 << 20))

    def fail(_writer: Writer, _kind: bytes, _payload: bytes) -> None:
        raise StreamError("a record that is none")

    monkeypatch.setattr(Writer, "take", fail)

    with pytest.raises(PycloudlibError, match="is refused: a record that is none"):
        transfer.pull(instance, "large", str(here / "copy"), last_words_limit=0.3)


def test_guest_that_hangs_up_is_told_in_its_own_words(
    over_ssh: QemuInstance, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "large").write_bytes(bytes(16 << 20))
    replace_program(tmp_path, monkeypatch, "python3", "echo out of order >&2; exit 3")

    with pytest.raises(PycloudlibError, match="web: out of order"):
        transfer.push(over_ssh, str(here / "large"), "copy")


def test_programs_need_what_guests_have(
    over_ssh: QemuInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text is ASCII, whatever the guest's encoding is, and fits one argument."""
    said = tmp_path / "said"
    replace_program(tmp_path, monkeypatch, "python3", f"printf '%s' \"$*\" > {said}; exit 3")
    with pytest.raises(PycloudlibError):
        transfer.pull(over_ssh, "x", str(tmp_path / "x"))
    text = said.read_bytes()

    assert text.startswith(b"-IS -c ")
    text.decode("ascii")
    assert len(text) < 128 << 10  # MAX_ARG_STRLEN of execve(2)


Record = tuple[bytes, bytes]


def stream(*records: Record) -> io.BytesIO:
    written = io.BytesIO()
    send = copy_in_guest.sender(written)
    for kind, payload in (*records, (END, b"")):
        send(kind, payload)
    written.seek(0)
    return written


def mode(bits: int) -> bytes:
    return MODE.pack(bits)


def a_file(name: bytes) -> list[Record]:
    size = NUMBER.pack(4)
    return [
        (FILE, mode(0o777) + size + name),
        (DATA, NUMBER.pack(0) + b"evil"),
        (CLOSE, size),
    ]


def a_link(name: bytes, to: bytes) -> Record:
    return LINK, MODE.pack(len(name)) + name + to


def below(name: bytes, *records: Record) -> list[Record]:
    return [(DIRECTORY, mode(0o777) + name), *records, (UP, b"")]


OUTSIDE = b"@"
"""Stands for the directory outside of the target in the rows below."""


@pytest.mark.parametrize(
    "inside",
    [
        a_file(b"../out"),
        a_file(b"/tmp/out-of-the-tree"),
        a_file(b".."),
        a_file(b""),
        a_file(b"a/b"),
        below(b"..", *a_file(b"out")),
        below(b"there", *a_file(b"out")),
        below(b"there", a_link(b"out", b"x")),
        below(b"there", (SPECIAL, mode(stat.S_IFIFO | 0o666) + NUMBER.pack(0) + b"out")),
        [a_link(b"new", OUTSIDE), *below(b"new", *a_file(b"out"))],
        [a_link(b"new", OUTSIDE + b"/out"), *a_file(b"new")],
        [a_link(b"new", OUTSIDE + b"/secret"), *a_file(b"new")],
        a_file(b"to secret"),
        [a_link(b"../out", b"x")],
        [(UP, b""), *a_file(b"out")],
        [(UP, b""), (UP, b""), *a_file(b"out")],
        [(UP, b""), *below(b"", *a_file(b"out"))],
    ],
)
def test_nothing_is_written_outside(here: Path, inside: list[Record]) -> None:
    target, outside = here / "target", here / "outside"
    target.mkdir()
    outside.mkdir(mode=0o700)
    (outside / "secret").write_text("secret")
    (target / "there").symlink_to(outside)
    (target / "to secret").symlink_to(outside / "secret")
    records = [(kind, data.replace(OUTSIDE, os.fsencode(outside))) for kind, data in inside]
    writer = Writer(os.fsencode(target), b"", trusting=False)

    try:
        problems = copy_in_guest.write(stream(*below(b"", *records)), writer)
    except StreamError:
        problems = []
    else:
        assert problems

    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert (outside / "secret").read_text() == "secret"
    assert outside.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in here.iterdir()) == ["outside", "target"]


def test_link_of_an_earlier_copy_leads_no_later_one_out(here: Path) -> None:
    """A file that is copied to a directory, in which the guest has had a link of its name made."""
    (here / "target").mkdir()
    (here / "secret").write_text("secret")
    (here / "target" / "name").symlink_to(here / "secret")
    writer = Writer(os.fsencode(here / "target"), b"name", trusting=False)

    (problem,) = copy_in_guest.write(stream(*a_file(b"")), writer)

    assert "leads out of the target" in problem.why
    assert (here / "secret").read_text() == "secret"


def test_link_that_stays_within_is_written_through(here: Path) -> None:
    (here / "target").mkdir()
    (here / "target" / "file").write_text("good")
    (here / "target" / "name").symlink_to("file")
    writer = Writer(os.fsencode(here / "target"), b"", trusting=False)

    assert copy_in_guest.write(stream(*below(b"", *a_file(b"name"))), writer) == []

    assert (here / "target" / "file").read_text() == "evil"


@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK])
def test_no_device_is_made_at_a_guest_s_word(here: Path, kind: int) -> None:
    device = (SPECIAL, mode(kind | 0o666) + NUMBER.pack(os.makedev(1, 3)) + b"null")
    writer = Writer(os.fsencode(here / "new"), b"x", trusting=False)

    (problem,) = copy_in_guest.write(stream(*below(b"", device)), writer)

    assert (problem.path, problem.why) == (
        os.fsencode(here / "new" / "null"),
        "no device is made at a guest's word",
    )
    assert list((here / "new").iterdir()) == []


def test_new_file_has_no_more_than_permissions(here: Path) -> None:
    records = a_file(b"")
    records[0] = (FILE, mode(0o4777) + records[0][1][4:])
    writer = Writer(os.fsencode(here / "new"), b"x", trusting=False)

    assert copy_in_guest.write(stream(*records), writer) == []

    assert (here / "new").stat().st_mode & 0o7000 == 0


@pytest.mark.parametrize(
    "records",
    [
        [(b"?", b"x" * 20)],
        [(FILE, b"")],
        [(FILE, b"\0" * 5)],
        [*a_file(b"")[:1], (DATA, b"x")],
        [*a_file(b"")[:1], *a_file(b"")],
        [*a_file(b""), *a_file(b"")],
        [*a_file(b"")[:2], (DATA, NUMBER.pack(1) + b"back")],
        [*a_file(b"")[:2], (CLOSE, NUMBER.pack(1))],
        [a_file(b"")[0], (DATA, NUMBER.pack(-1) + b"x")],
        [a_link(b"", b"a\0b")],
        [a_link(b"", b"x")],
        [(UP, b"")],
        [(copy_in_guest.PROBLEM, b"no problem")],
        [(SPECIAL, mode(stat.S_IFREG) + NUMBER.pack(0))],
    ],
)
def test_what_is_no_such_stream_is_refused(here: Path, records: list[Record]) -> None:
    with pytest.raises(StreamError):
        copy_in_guest.write(stream(*records), Writer(os.fsencode(here / "x"), b"x", trusting=False))


@pytest.mark.parametrize("offset", [1 << 62, (1 << 63) - 8])
def test_offset_that_no_file_can_have_is_a_problem(here: Path, offset: int) -> None:
    records = [
        a_file(b"")[0],
        (DATA, NUMBER.pack(offset) + b"x"),
        (CLOSE, NUMBER.pack(offset + 1)),
    ]
    writer = Writer(os.fsencode(here / "x"), b"x", trusting=False)

    (problem,) = copy_in_guest.write(stream(*records), writer)

    assert problem.number in (errno.EFBIG, errno.EINVAL)


def test_stream_that_ends_early_is_an_error(here: Path) -> None:
    whole = stream(*below(b"", *a_file(b"a"), *a_file(b"b"))).getvalue()

    for end in range(len(whole)):
        writer = Writer(os.fsencode(here / str(end)), b"x", trusting=False)
        with pytest.raises(StreamError):
            copy_in_guest.write(io.BytesIO(whole[:end]), writer)


def test_problems_without_end_are_not_all_kept(here: Path) -> None:
    problem = copy_in_guest.Problem("open", b"x", 13, "no").pack()
    writer = Writer(os.fsencode(here / "x"), b"x", trusting=False)

    problems = copy_in_guest.write(stream(*[(copy_in_guest.PROBLEM, problem)] * 5000), writer)

    assert len(problems) == copy_in_guest.MOST_PROBLEMS + 1
    assert problems[-1].why == "there are more than these"
