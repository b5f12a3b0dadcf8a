"""Copies between here and a machine: what `cp -r` would do, and nothing outside."""

from __future__ import annotations

import errno
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import pytest

from pycloudlib.cli import tarball, transfer
from pycloudlib.cli.transfer import Place
from pycloudlib.errors import PycloudlibError
from pycloudlib.progress import Progress
from pycloudlib.qemu.instance import QemuInstance
from tests.unit.sshserver import LocalInstance


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    directory = tmp_path / "guest"
    directory.mkdir()
    return directory


@pytest.fixture
def here(tmp_path: Path) -> Path:
    directory = tmp_path / "here"
    directory.mkdir()
    return directory


@pytest.fixture
def instance(guest: Path) -> Iterator[QemuInstance]:
    local = LocalInstance(guest)
    yield cast("QemuInstance", local)
    local.close()


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
    assert Place.parse(text) == Place(machine, path)


def test_file_is_pushed_with_its_permissions(
    instance: QemuInstance, tree: Path, guest: Path
) -> None:
    transfer.push(instance, tree / "sub dir" / "run.sh", "copy.sh")

    assert (guest / "copy.sh").read_text() == "#!/bin/sh\n"
    assert (guest / "copy.sh").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("target", [".", "./", "there", "there/"])
def test_file_goes_into_a_directory(
    instance: QemuInstance, tree: Path, guest: Path, target: str
) -> None:
    (guest / "there").mkdir()

    transfer.push(instance, tree / "file", target)

    assert (guest / target / "file").read_text() == "content"


def test_directory_is_pushed_whole(instance: QemuInstance, tree: Path, guest: Path) -> None:
    transfer.push(instance, tree, "copy")
    transfer.push(instance, tree, "copy")  # by now it is there: into it

    assert (guest / "copy" / "tree").is_dir()
    first = {k: v for k, v in portrait(guest / "copy").items() if not k.startswith("tree")}
    assert first == portrait(tree) == portrait(guest / "copy" / "tree")


def test_directories_tell_how_far_they_are(
    instance: QemuInstance, tree: Path, guest: Path, here: Path
) -> None:
    size = sum(file.lstat().st_size for file in tree.rglob("*") if file.is_file())
    pushed: list[Progress] = []
    pulled: list[Progress] = []

    transfer.push(instance, tree, "copy", pushed.append)
    transfer.pull(instance, "copy", here / "back", pulled.append)

    for reports, total in ((pushed, size), (pulled, None)):
        done = [report.done or 0 for report in reports]
        assert done == sorted(done)
        assert done[-1] >= size
        assert {(report.total, report.unit) for report in reports} == {(total, "B")}


def test_file_here_that_cannot_be_read_ends_a_copy(
    instance: QemuInstance, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_source: Path, stream: IO[bytes]) -> None:
        stream.write(b"the beginning")
        raise PermissionError(errno.EACCES, "Permission denied", "secret")

    monkeypatch.setattr(tarball, "pack", fail)

    with pytest.raises(PermissionError, match="secret"):
        transfer.push(instance, tree, "copy")


def test_stream_that_is_damaged_ends_a_copy_while_more_comes(
    instance: QemuInstance, guest: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (guest / "tree").mkdir()
    # More than the other side can get rid of when nobody reads.
    (guest / "tree" / "large").write_bytes(bytes(16 << 20))

    def fail(_stream: IO[bytes], _target: Path) -> None:
        raise tarfile.ReadError("invalid header")

    monkeypatch.setattr(tarball, "unpack", fail)
    monkeypatch.setattr(transfer, "_LAST_WORDS_LIMIT", 0.3)

    with pytest.raises(PycloudlibError, match=r"is damaged: invalid header"):
        transfer.pull(instance, "tree", here / "copy")


def test_directory_is_pulled_whole(
    instance: QemuInstance, tree: Path, guest: Path, here: Path
) -> None:
    tree.rename(guest / "tree")

    transfer.pull(instance, "tree", here / "copy")
    transfer.pull(instance, "tree/", here / "copy")

    first = {k: v for k, v in portrait(here / "copy").items() if not k.startswith("tree")}
    assert first == portrait(guest / "tree") == portrait(here / "copy" / "tree")


def test_file_is_pulled_with_its_permissions(
    instance: QemuInstance, guest: Path, here: Path
) -> None:
    (guest / "run.sh").write_text("#!/bin/sh\n")
    (guest / "run.sh").chmod(0o700)

    transfer.pull(instance, "run.sh", here)

    assert (here / "run.sh").stat().st_mode & 0o777 == 0o700


def test_missing_sources_are_named(instance: QemuInstance, here: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        transfer.push(instance, here / "nothing", "x")
    with pytest.raises(FileNotFoundError, match="nothing"):
        transfer.pull(instance, "nothing", here / "x")


def test_guest_s_own_words_tell_why_it_failed(
    instance: QemuInstance, tree: Path, guest: Path
) -> None:
    (guest / "file").touch()

    with pytest.raises(PycloudlibError, match=r"web: .*file"):
        transfer.push(instance, tree, "file/below")


def archive(*members: tuple[str, bytes, str]) -> io.BytesIO:
    """Make a tar stream of (name, type, what it is linked to)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, kind, link in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mode = kind, link, 0o777
            member.size = 4 if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(b"evil"))
    stream.seek(0)
    return stream


FILE, LINK, HARD, DIRECTORY = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE


@pytest.mark.parametrize(
    "members",
    [
        [("../out", FILE, "")],
        [("/tmp/out-of-the-tree", FILE, "")],
        [("a/../../out", FILE, "")],
        [("hard", HARD, "../secret")],
        [("hard", HARD, "/etc/passwd")],
        [("there/out", FILE, "")],
        [("there", DIRECTORY, "")],
        [("there/sub", DIRECTORY, "")],
    ],
)
def test_nothing_is_written_outside(here: Path, members: list[tuple[str, bytes, str]]) -> None:
    target, outside = here / "target", here / "outside"
    target.mkdir()
    outside.mkdir(mode=0o700)
    (here / "secret").write_text("secret")
    (target / "there").symlink_to(outside)

    with pytest.raises(tarball.UnsafeArchiveError):
        tarball.unpack(archive(*members), target)

    assert list(outside.iterdir()) == []
    assert outside.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in here.iterdir()) == ["outside", "secret", "target"]


def test_links_of_the_archive_are_not_followed(here: Path) -> None:
    outside = here / "outside"
    outside.mkdir()
    target = here / "target"
    target.mkdir()

    # The link comes last of all, so that what is "below" it makes a directory first.
    with pytest.raises(OSError, match="link"):
        tarball.unpack(archive(("link", LINK, str(outside)), ("link/out", FILE, "")), target)

    assert list(outside.iterdir()) == []


def test_link_here_is_replaced_not_followed(here: Path) -> None:
    victim = here / "victim"
    victim.write_text("good")
    target = here / "target"
    target.mkdir()
    (target / "name").symlink_to(victim)

    tarball.unpack(archive(("name", FILE, "")), target)

    assert victim.read_text() == "good"
    assert (target / "name").read_bytes() == b"evil"
    assert not (target / "name").is_symlink()


def test_devices_are_left_out(here: Path) -> None:
    target = here / "target"
    target.mkdir()

    tarball.unpack(archive(("null", tarfile.CHRTYPE, ""), ("pipe", tarfile.FIFOTYPE, "")), target)

    assert list(target.iterdir()) == []


def test_stream_that_ends_early_is_an_error(here: Path) -> None:
    whole = archive(("a", FILE, ""), ("b", FILE, "")).getvalue()

    with pytest.raises(tarfile.TarError):
        tarball.unpack(io.BytesIO(whole[:700]), here)
