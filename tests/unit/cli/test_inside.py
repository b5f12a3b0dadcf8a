"""What goes on inside a machine, which is this host behind a real SSH connection."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import paramiko
import pytest
from paramiko.sftp import SFTP_FAILURE

from pycloudlib.cli import inside
from pycloudlib.cli.common import ExitCode, Session
from pycloudlib.diagnosis import Cause, Diagnosis
from pycloudlib.errors import KernelPanicError
from tests.unit import sshserver
from tests.unit.clirun import Outcome
from tests.unit.clirun import run as run_cli
from tests.unit.sshserver import LocalInstance, replace_program

HANGS = 100.0
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def web(local: LocalInstance, monkeypatch: pytest.MonkeyPatch) -> LocalInstance:
    def open_it(_session: Session, name: str) -> LocalInstance:
        assert name == "web"
        return local

    monkeypatch.setattr(inside, "open_running", open_it)
    return local


def run(capfd: Capture, *arguments: str, stdin: bytes = b"") -> Outcome:
    """Run the command line with an input of its own."""
    read, write = os.pipe()
    before = os.dup(0)
    os.dup2(read, 0)
    try:
        os.write(write, stdin)
        os.close(write)
        return run_cli(capfd, *arguments)
    finally:
        os.dup2(before, 0)
        for descriptor in (read, before):
            os.close(descriptor)


def test_exec_hands_on_streams_and_status(web: LocalInstance, capfd: Capture) -> None:
    done = run(capfd, "exec", "web", "--", "sh", "-c", "cat; echo err >&2; exit 7", stdin=b"in")

    assert done == Outcome(7, "in", "err\n")


@pytest.mark.parametrize(
    "arguments", [["exec", "web", "true"], ["shell", "web"], ["copy", "web:log", "."]]
)
def test_copy_is_fixed_up_before_it_is_used(
    web: LocalInstance,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    capfd: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    (web.directory / "log").touch()

    assert run(capfd, *arguments).code == 0

    assert web.fixed_up == [0]  # before any connection is made


@pytest.mark.parametrize("dashes", [["--"], []])
def test_exec_hands_on_words_as_they_are(
    web: LocalInstance, capfd: Capture, dashes: list[str]
) -> None:
    words = ["a b", "$HOME", "'", "*", "--help", "-v", "--"]

    done = run(capfd, "exec", "web", *dashes, "printf", "%s|", *words)

    assert done == Outcome(0, "a b|$HOME|'|*|--help|-v|--|", "")


def test_exec_of_what_a_signal_ends_gives_255(web: LocalInstance, capfd: Capture) -> None:
    done = run(capfd, "exec", "web", "sh", "-c", "kill -9 $PPID; sleep 1")

    assert done.code == int(ExitCode.CONNECTION_LOST)


def test_shell_without_a_terminal_reads_commands(web: LocalInstance, capfd: Capture) -> None:
    done = run(capfd, "shell", "web", stdin=b"echo $((6 * 7))\nexit 3\n")

    assert done == Outcome(3, "42\n", "")


def test_machine_that_boots_still_is_told_how_to_wait_for(
    web: LocalInstance, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = paramiko.SSHException("no banner")
    error.diagnosis = Diagnosis(Cause.STILL_BOOTING)  # type: ignore[attr-defined]

    def refuse() -> paramiko.SSHClient:
        raise error

    monkeypatch.setattr(web, "_ssh_connect", refuse)

    done = run(capfd, "exec", "web", "true")

    assert done.code == ExitCode.FAILURE
    assert done.err == "'pycloudlib wait web' waits until it is ready\nError: no banner\n"


def test_copy_goes_both_ways(
    web: LocalInstance, capfd: Capture, guest: Path, tmp_path: Path
) -> None:
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    (tmp_path / "tree" / "sub" / "file").write_text("content")

    assert run(capfd, "copy", str(tmp_path / "tree"), "web:") == Outcome(0, "", "")
    assert (guest / "tree" / "sub" / "file").read_text() == "content"
    assert run(capfd, "copy", "web:tree/sub/file", str(tmp_path)) == Outcome(0, "", "")
    assert (tmp_path / "file").read_text() == "content"


def test_what_is_not_there_to_copy_is_named(
    web: LocalInstance, capfd: Capture, tmp_path: Path
) -> None:
    done = run(capfd, "copy", str(tmp_path / "nothing"), "web:")

    assert done.code == ExitCode.FAILURE
    assert done.err == f"Error: No such file or directory: {tmp_path / 'nothing'}\n"


PANIC = KernelPanicError("web", Cause.KERNEL_PANIC, "---[ end Kernel panic ]---")


def panics_once(path: Path, web: LocalInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine's kernel panic when there is a file, at which a command of it stops."""

    def check() -> None:
        if path.exists():
            raise PANIC

    monkeypatch.setattr(web, "check_answers", check)


@pytest.mark.parametrize("arguments", [["exec", "web"], ["shell", "web"]], ids=["exec", "shell"])
def test_command_ends_with_the_guests_kernel(
    web: LocalInstance,
    capfd: Capture,
    guest: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    panics_once(guest / "panicked", web, monkeypatch)
    script = "touch panicked; exec sleep 300"
    words = ["sh", "-c", script] if arguments[0] == "exec" else []
    done = run(capfd, *arguments, *words, stdin=script.encode())
    assert done.code == ExitCode.FAILURE
    assert "The kernel of web has panicked" in done.err


@pytest.mark.parametrize("direction", ["push", "pull"])
def test_copy_ends_with_the_guests_kernel(
    web: LocalInstance,
    capfd: Capture,
    guest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    direction: str,
) -> None:
    """Its program in the guest stops before it reads or writes anything."""
    panics_once(guest / "panicked", web, monkeypatch)
    replace_program(tmp_path, monkeypatch, "python3", "touch panicked; exec sleep 300")
    (tmp_path / "file").write_text("content")
    where = {"push": (str(tmp_path / "file"), "web:"), "pull": ("web:file", str(tmp_path / "new"))}
    done = run(capfd, "copy", *where[direction])
    assert done.code == ExitCode.FAILURE
    assert "The kernel of web has panicked" in done.err


@pytest.mark.parametrize("direction", ["push", "pull"])
def test_file_of_a_guest_whose_kernel_panics_is_not_waited_for(
    web: LocalInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    begun, over = threading.Event(), threading.Event()

    def stall(*_: object) -> int:
        begun.set()
        over.wait(HANGS)
        return SFTP_FAILURE

    def check() -> None:
        if begun.is_set():
            raise PANIC

    (tmp_path / "file").write_text("content")
    monkeypatch.setattr(sshserver.ServedFiles, "open", stall)
    monkeypatch.setattr(sshserver.ServedFiles, "lstat", stall)
    monkeypatch.setattr(sshserver.ServedFiles, "stat", stall)
    monkeypatch.setattr(web, "_check_alive", check)
    copies = {
        "push": lambda: web.push_file(tmp_path / "file", "there"),
        "pull": lambda: web.pull_file("file", tmp_path / "here"),
    }
    with pytest.raises(KernelPanicError):
        copies[direction]()
    over.set()
