"""What goes on inside a machine, which is this host behind a real SSH connection."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import paramiko
import pytest

from pycloudlib.cli import inside
from pycloudlib.cli.failures import ExitCode
from pycloudlib.cli.session import Session
from pycloudlib.diagnosis import Cause, Diagnosis
from tests.unit.clirun import Outcome
from tests.unit.clirun import run as run_cli
from tests.unit.sshserver import LocalInstance

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    directory = tmp_path / "guest"
    directory.mkdir()
    return directory


@pytest.fixture
def web(guest: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalInstance]:
    instance = LocalInstance(guest)
    instance.machine = SimpleNamespace(check_on=lambda: None)  # type: ignore[attr-defined]

    def open_it(_session: Session, name: str) -> LocalInstance:
        assert name == "web"
        return instance

    monkeypatch.setattr(inside, "open_running", open_it)
    yield instance
    instance.close()


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


@pytest.mark.parametrize("dashes", [["--"], []])
def test_exec_hands_on_words_as_they_are(
    web: LocalInstance, capfd: Capture, dashes: list[str]
) -> None:
    words = ["a b", "$HOME", "'", "*", "--help", "-v", "--"]

    done = run(capfd, "exec", "web", *dashes, "printf", "%s|", *words)

    assert done == Outcome(0, "a b|$HOME|'|*|--help|-v|--|", "")


def test_exec_of_what_a_signal_ends_gives_255(web: LocalInstance, capfd: Capture) -> None:
    done = run(capfd, "exec", "web", "sh", "-c", "kill -9 $PPID; sleep 9")

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
