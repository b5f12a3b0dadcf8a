"""Single files to and from a guest: what is there stays what it is, and errors name the file."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest

from pycloudlib.progress import Progress
from tests.unit.sshserver import FileServer, LocalInstance, LocalPort

LARGE = os.urandom(700_000)


@pytest.fixture
def over_sftp(guest: Path) -> Iterator[LocalInstance]:
    """Give a machine that has SFTP alone."""
    instance = LocalInstance(guest)
    yield instance
    instance.close()


@pytest.fixture(params=["sftp", "port", "port alone"])
def local(request: pytest.FixtureRequest, guest: Path) -> Iterator[LocalInstance]:
    """Give a machine for each way in which files are copied."""
    port = LocalPort(guest, is_ready=request.param == "port alone")
    instance = LocalInstance(guest, port=None if request.param == "sftp" else port)
    yield instance
    instance.close()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("content", [b"", b"a\0b", LARGE])
def test_files_arrive_whole_both_ways(
    local: LocalInstance, guest: Path, here: Path, content: bytes
) -> None:
    (here / "sent").write_bytes(content)
    reports: list[Progress] = []
    local.push_file(here / "sent", "there", on_progress=reports.append)
    local.pull_file("there", here / "back", on_progress=reports.append)
    assert (guest / "there").read_bytes() == (here / "back").read_bytes() == content
    assert [report.done for report in reports if report.done == len(content)] == (
        [len(content)] * 2 if content else []
    )
    assert names(here) == ["back", "sent"]


def test_kernel_files_that_say_they_are_empty_are_read(local: LocalInstance, here: Path) -> None:
    local.pull_file("/proc/version", here / "version")
    assert (here / "version").read_text() == Path("/proc/version").read_text()
    local.push_file("/proc/version", "version")
    assert (local.directory / "version").read_text() == Path("/proc/version").read_text()


def test_a_fifo_in_the_guest_is_read(local: LocalInstance, guest: Path, here: Path) -> None:
    fifo = guest / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(LARGE))
    writer.start()
    local.pull_file("fifo", here / "file")
    writer.join(30)
    assert (here / "file").read_bytes() == LARGE
    assert stat.S_ISFIFO(fifo.stat().st_mode)


def test_a_stream_that_cannot_be_read_changes_nothing(local: LocalInstance, here: Path) -> None:
    (here / "file").write_text("before")
    with pytest.raises(OSError, match="No such device or address: '/dev/tty'"):
        local.pull_file("/dev/tty", here / "file")
    assert (here / "file").read_text() == "before"


class TestPulledOnto:
    """What becomes of what is there already, as of `cp`."""

    def pull(self, local: LocalInstance, guest: Path, target: Path) -> None:
        (guest / "source").write_text("new")
        local.pull_file("source", target)

    def test_a_regular_file_keeps_its_mode(
        self, local: LocalInstance, guest: Path, here: Path
    ) -> None:
        target = here / "file"
        target.write_text("what was there before, longer")
        target.chmod(0o640)
        self.pull(local, guest, target)
        assert (target.read_text(), stat.S_IMODE(target.stat().st_mode)) == ("new", 0o640)

    def test_other_names_of_a_file_show_the_same(
        self, local: LocalInstance, guest: Path, here: Path
    ) -> None:
        target, other = here / "file", here / "other"
        target.write_text("before")
        os.link(target, other)
        self.pull(local, guest, target)
        assert target.samefile(other)
        assert other.read_text() == "new"

    @pytest.mark.parametrize("end", ["file", "there/file", "second"])
    def test_a_link_stays_and_leads_to_the_file(
        self, local: LocalInstance, guest: Path, here: Path, end: str
    ) -> None:
        (here / "there").mkdir()
        (here / "second").symlink_to("file")
        (here / "file").write_text("before")
        (here / "there/file").write_text("before")
        (here / "link").symlink_to(end)
        self.pull(local, guest, here / "link")
        assert str((here / "link").readlink()) == end
        assert (here / end).read_text() == "new"

    def test_a_link_that_leads_nowhere_is_refused(
        self, local: LocalInstance, guest: Path, here: Path
    ) -> None:
        (here / "link").symlink_to("nowhere")
        with pytest.raises(FileNotFoundError, match=r"leads nowhere.*link"):
            self.pull(local, guest, here / "link")
        assert names(here) == ["link"]

    def test_a_fifo_is_written_into(self, local: LocalInstance, guest: Path, here: Path) -> None:
        fifo = here / "fifo"
        os.mkfifo(fifo)
        read: list[str] = []
        reader = threading.Thread(target=lambda: read.append(fifo.read_text()))
        reader.start()
        self.pull(local, guest, fifo)
        reader.join(30)
        assert read == ["new"]
        assert stat.S_ISFIFO(fifo.stat().st_mode)

    def test_a_device_is_written_into(self, local: LocalInstance, guest: Path) -> None:
        self.pull(local, guest, Path("/dev/null"))
        assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)

    def test_a_full_device_is_named(self, local: LocalInstance, guest: Path) -> None:
        with pytest.raises(OSError, match="/dev/full") as caught:
            self.pull(local, guest, Path("/dev/full"))
        assert caught.value.errno == errno.ENOSPC

    def test_a_descriptor_is_written_to(
        self, local: LocalInstance, guest: Path, here: Path
    ) -> None:
        with (here / "gone").open("w+b") as file:
            (here / "gone").unlink()
            self.pull(local, guest, Path(f"/dev/fd/{file.fileno()}"))
            assert os.pread(file.fileno(), 100, 0) == b"new"
        assert names(here) == []
        read, write = os.pipe()
        self.pull(local, guest, Path(f"/proc/self/fd/{write}"))
        assert os.read(read, 100) == b"new"
        os.close(read)
        os.close(write)

    @pytest.mark.parametrize("through_a_link", [False, True])
    def test_a_file_is_written_into_that_is_named_by_who_has_it_open(
        self, local: LocalInstance, guest: Path, here: Path, through_a_link: bool
    ) -> None:
        """As /dev/stdout is, of a program whose output goes to a file."""
        with (here / "output").open("a+") as file:
            target = Path(f"/proc/self/fd/{file.fileno()}")
            if through_a_link:
                (here / "stdout").symlink_to(target)
                target = here / "stdout"
            self.pull(local, guest, target)
            print(", and more", file=file)
        assert (here / "output").read_text() == "new, and more\n"

    def test_an_access_control_list_stays(
        self, local: LocalInstance, guest: Path, here: Path
    ) -> None:
        target = here / "file"
        target.write_text("before")
        try:
            os.setxattr(target, "user.whose", b"mine")
        except OSError as error:
            pytest.skip(f"no extended attributes here: {error}")
        self.pull(local, guest, target)
        assert os.getxattr(target, "user.whose") == b"mine"
        assert target.read_text() == "new"

    def test_a_directory_is_refused(self, local: LocalInstance, guest: Path, here: Path) -> None:
        with pytest.raises(IsADirectoryError, match=str(here)):
            self.pull(local, guest, here)
        assert names(here) == []

    def test_a_directory_that_is_not_there_is_named(
        self, local: LocalInstance, guest: Path, here: Path
    ) -> None:
        with pytest.raises(FileNotFoundError, match="missing/file"):
            self.pull(local, guest, here / "missing/file")

    def test_a_name_of_many_bytes_is_as_good_as_any(
        self, local: LocalInstance, guest: Path, here: Path
    ) -> None:
        target = here / ("\N{SNOWMAN}" * 85)
        self.pull(local, guest, target)
        assert target.read_text() == "new"


def test_what_was_there_stays_when_a_pull_fails(
    over_sftp: LocalInstance, guest: Path, here: Path
) -> None:
    # More than can have arrived before the first of it is looked at.
    with (guest / "source").open("wb") as source:
        source.truncate(256 << 20)
    (here / "kept").write_text("before")

    def cut(_report: Progress) -> None:
        over_sftp.transports[0].close()

    with pytest.raises(paramiko.SSHException, match="source"):
        over_sftp.pull_file("source", here / "kept", on_progress=cut)
    assert (here / "kept").read_text() == "before"
    assert names(here) == ["kept"]


@pytest.mark.parametrize("error", [InterruptedError(), FileNotFoundError(2, "mine"), EOFError()])
def test_errors_of_the_function_that_reports_are_passed_on(
    local: LocalInstance, here: Path, error: Exception
) -> None:
    (here / "sent").write_text("content")

    def stop(_report: Progress) -> None:
        raise error

    with pytest.raises(type(error)) as pushed:
        local.push_file(here / "sent", "there", on_progress=stop)
    local.push_file(here / "sent", "there")
    with pytest.raises(type(error)) as pulled:
        local.pull_file("there", here / "back", on_progress=stop)
    assert pushed.value is error
    assert pulled.value is error
    assert not (here / "back").exists()


class TestPushedOnto:
    """The same in the guest."""

    def push(self, local: LocalInstance, here: Path, target: object) -> None:
        (here / "source").write_text("new")
        local.push_file(here / "source", str(target))

    def test_files_and_links_stay_what_they_are(
        self, local: LocalInstance, guest: Path, here: Path
    ) -> None:
        (guest / "file").write_text("what was there before, longer")
        (guest / "file").chmod(0o640)
        (guest / "link").symlink_to("file")
        self.push(local, here, "link")
        assert (guest / "link").is_symlink()
        assert (guest / "file").read_text() == "new"
        assert stat.S_IMODE((guest / "file").stat().st_mode) == 0o640

    def test_a_link_that_leads_nowhere_is_refused(
        self, local: LocalInstance, guest: Path, here: Path
    ) -> None:
        (guest / "link").symlink_to("nowhere")
        with pytest.raises(FileNotFoundError, match=r"leads nowhere.*link"):
            self.push(local, here, "link")
        assert names(guest) == ["link"]

    def test_a_fifo_is_written_into(self, local: LocalInstance, guest: Path, here: Path) -> None:
        fifo = guest / "fifo"
        os.mkfifo(fifo)
        read: list[str] = []
        reader = threading.Thread(target=lambda: read.append(fifo.read_text()))
        reader.start()
        self.push(local, here, "fifo")
        reader.join(30)
        assert read == ["new"]

    def test_a_device_is_written_into(self, local: LocalInstance, here: Path) -> None:
        self.push(local, here, "/dev/null")
        assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)

    @pytest.mark.parametrize(
        ("target", "number"),
        [
            ("/dev/full", errno.ENOSPC),
            ("/tmp", errno.EISDIR),
            (".", errno.EISDIR),
            ("new/", errno.EISDIR),
            ("missing/file", errno.ENOENT),
            ("/dev/null/file", errno.ENOENT),
            ("n" * 300, errno.ENAMETOOLONG),
            ("loop", errno.ELOOP),
            ("/proc/sys/kernel/ostype", errno.EACCES),
            ("/proc/uptime", errno.EIO),
        ],
    )
    def test_what_cannot_be_written_is_named_with_the_reason(
        self, local: LocalInstance, guest: Path, here: Path, target: str, number: int
    ) -> None:
        (guest / "loop").symlink_to("loop")
        with pytest.raises(OSError, match=target[:10]) as caught:
            self.push(local, here, target)
        # Root may open what nobody may write to.
        assert caught.value.errno in {number, errno.EIO} if target[:6] == "/proc/" else {number}
        assert caught.value.filename == target


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ("missing", errno.ENOENT),
        ("~/missing", errno.ENOENT),
        (".", errno.EISDIR),
        ("/proc/self/mem", errno.EIO),
        ("n" * 300, errno.ENAMETOOLONG),
    ],
)
def test_what_cannot_be_read_is_named_with_the_reason(
    local: LocalInstance, here: Path, source: str, number: int
) -> None:
    (here / "kept").write_text("before")
    with pytest.raises(OSError, match=source[:10]) as caught:
        local.pull_file(source, here / "kept")
    assert (caught.value.errno, caught.value.filename) == (number, source)
    assert (here / "kept").read_text() == "before"
    assert ("home directory" in str(caught.value)) is source.startswith("~")


class _Refusing(paramiko.SFTPServerInterface):
    """Refuses all with one answer."""

    def __init__(self, server: Any, answer: int) -> None:
        super().__init__(server)
        self._answer = answer

    def stat(self, path: str) -> Any:
        return self._answer

    def lstat(self, path: str) -> Any:
        return self._answer

    def open(self, path: str, flags: int, attr: Any) -> Any:
        return self._answer


@pytest.mark.parametrize("answer", range(1, 9))
def test_every_answer_of_sftp_is_an_error_that_names_the_file(
    over_sftp: LocalInstance, guest: Path, here: Path, answer: int
) -> None:
    over_sftp.execute("true")
    over_sftp.transports[0].set_subsystem_handler("sftp", FileServer, _Refusing, answer)
    (here / "source").write_text("x")
    (guest / "file").write_text("y")
    copies: list[Callable[[], None]] = [
        lambda: over_sftp.push_file(here / "source", "file"),
        lambda: over_sftp.pull_file("file", here / "target"),
    ]
    for copy in copies:
        with pytest.raises((OSError, paramiko.SSHException), match="file") as caught:
            copy()
        assert str(caught.value) not in ("Failure", "file")
    assert not (here / "target").exists()


def test_server_without_file_transfer_says_so(over_sftp: LocalInstance, here: Path) -> None:
    over_sftp.execute("true")
    over_sftp.transports[0].subsystem_table.clear()
    with pytest.raises(paramiko.SSHException, match="SFTP"):
        over_sftp.pull_file("file", here / "x")
    assert over_sftp.execute("echo alive") == "alive"


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("", FileNotFoundError),
        ("a\0b", ValueError),
        ("\ud800", ValueError),
        (None, TypeError),
        (5, TypeError),
    ],
)
def test_what_is_no_path_is_refused_at_once(
    local: LocalInstance, here: Path, path: Any, error: type[Exception]
) -> None:
    (here / "file").write_text("x")
    attempts: list[tuple[Callable[[], None], str]] = [
        (lambda: local.push_file(path, "x"), "local_path"),
        (lambda: local.push_file(here / "file", path), "remote_path"),
        (lambda: local.pull_file(path, here / "x"), "remote_path"),
        (lambda: local.pull_file("x", path), "local_path"),
    ]
    for attempt, name in attempts:
        with pytest.raises(error, match=None if error is TypeError else name):
            attempt()
    assert not local.transports, "nothing was asked of the guest"


def test_names_of_other_bytes_than_utf_8_are_themselves(
    local: LocalInstance, guest: Path, here: Path
) -> None:
    name = os.fsdecode(b"gr\xfc\xdf")
    (here / name).write_text("x")
    local.push_file(here / name, "there")
    assert (guest / "there").read_text() == "x"
    local.pull_file(os.fsencode(guest / "there"), here / "back")  # type: ignore[arg-type]
    assert (here / "back").read_text() == "x"


def test_errors_here_are_not_taken_for_the_guests(local: LocalInstance, here: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        local.push_file(here / "absent", "there")
    with pytest.raises(IsADirectoryError, match=str(here)):
        local.push_file(here, "there")
    with pytest.raises(OSError, match="/proc/self/mem") as caught:
        local.push_file("/proc/self/mem", "there")
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, "/proc/self/mem")
