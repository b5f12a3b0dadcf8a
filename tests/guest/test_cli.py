"""The command line with a guest: a copy of the machine that is saved for many tests."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.guest

LIMIT = 180


def run(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "pycloudlib", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=LIMIT, check=False)


def ok(*arguments: str | Path, stdin: bytes = b"") -> bytes:
    done = run(*arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.fixture(scope="module")
def web(saved: str) -> Iterator[str]:
    """Give the name of a machine of the command line that is ready."""
    name = f"cli-test-{os.getpid()}"
    try:
        assert ok("launch", saved, "--name", name, "--wait").decode().strip() == name
        yield name
    finally:
        run("delete", name)
        # What was saved of it is built on what it was launched from.
        for image in json.loads(ok("images", "list", "--json")):
            if image["name"].startswith(f"{name}-"):
                ok("images", "delete", image["name"])


class Terminal:
    """A command of the command line on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._terminal, theirs = pty.openpty()
        self._seen = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pycloudlib", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def expect(self, pattern: str) -> str:
        """Read until a pattern comes; give what it matched."""
        limit = time.monotonic() + LIMIT
        while (match := re.search(pattern.encode(), self._seen)) is None:
            ready, _, _ = select.select([self._terminal], [], [], limit - time.monotonic())
            assert ready, self._seen
            self._seen += os.read(self._terminal, 4096)
        self._seen = self._seen[match.end() :]
        return match[0].decode(errors="replace")


def test_command_has_the_streams_and_the_status(web: str) -> None:
    done = run("exec", web, "--", "sh", "-c", "cat; echo err >&2; exit 7", stdin=b"in\0\xff")

    assert (done.returncode, done.stdout, done.stderr) == (7, b"in\0\xff", b"err\n")


def test_words_reach_the_command_as_they_are(web: str) -> None:
    words = ["a b", "$HOME", "'", '"', "*", "--help"]

    assert ok("exec", web, "printf", "%s\\n", *words).decode().splitlines() == words


def test_command_that_a_signal_ends_gives_255(web: str) -> None:
    assert run("exec", web, "sh", "-c", "kill -9 $$").returncode == 255


def test_connection_is_kept_as_long_as_its_login_is_good(web: str) -> None:
    login = ok("exec", web, "sh", "-c", "echo $PPID")
    assert ok("exec", web, "sh", "-c", "echo $PPID") == login

    ok(
        "exec",
        web,
        "sudo",
        "sh",
        "-c",
        "groupadd kept && usermod --append --groups kept $SUDO_USER",
    )
    groups, another_login = ok("exec", web, "sh", "-c", "id -nG; echo $PPID").splitlines()
    assert b"kept" in groups.split()
    assert another_login != login.strip()


@pytest.mark.thorough
def test_large_streams_flow(web: str) -> None:
    data = os.urandom(1 << 20) * 4

    assert ok("exec", web, "cat", stdin=data) == data


def test_files_and_directories_are_copied_both_ways(web: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (tree / "sub" / "run.sh").chmod(0o755)
    (tree / "link").symlink_to("sub/run.sh")

    ok("copy", tree, f"{web}:")
    assert ok("exec", web, "tree/link") == b"ran\n"
    ok("copy", f"{web}:tree", tmp_path / "back")
    assert (tmp_path / "back" / "sub" / "run.sh").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "back" / "link").readlink() == Path("sub/run.sh")

    ok("copy", f"{tree}/.", f"{web}:tree")  # into what is there
    assert ok("exec", web, "find", "tree", "-name", "run.sh") == b"tree/sub/run.sh\n"
    ok("copy", f"{web}:/etc/os-release", tmp_path)
    assert (tmp_path / "os-release").stat().st_mode & 0o777 == 0o644
    assert b"ID=" in (tmp_path / "os-release").read_bytes()
    done = run("copy", f"{web}:/etc/ssh", tmp_path / "ssh")
    assert done.returncode == 1
    assert b"cannot open" in done.stderr
    assert b"ssh_host_" in done.stderr
    assert (tmp_path / "ssh" / "sshd_config").is_file()

    ok("copy", tree / "sub" / "run.sh", f"{web}:/tmp/")
    ok("copy", f"{web}:/tmp/run.sh", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == (tree / "sub" / "run.sh").read_bytes()


def test_shell_is_a_real_terminal(web: str) -> None:
    with Terminal("shell", web) as terminal:
        terminal.expect(r"\$ ")
        terminal.type("tty; echo status=$((40 + 2))\r")
        terminal.expect(r"/dev/pts/\d+")
        terminal.expect(r"status=42")
        # What is typed before a program runs, or right behind Ctrl-C, the terminal may lose.
        terminal.type("sh -c 'echo be$((0 + 1))gun; exec sleep 100'\r")
        terminal.expect(r"be1gun")
        terminal.type("\x03")
        terminal.expect(r"\$ ")
        terminal.type("exit 9\r")
        assert terminal.process.wait(LIMIT) == 9


def test_shell_without_a_terminal_reads_commands(web: str) -> None:
    done = run("shell", web, stdin=b"echo $((6 * 7))\nexit 3\n")

    assert done.returncode == 3
    assert done.stdout.endswith(b"42\n"), "after what the guest tells who logs in"


def test_console_asks_for_a_login(web: str) -> None:
    with Terminal("console", web) as terminal:
        terminal.expect(r"Ctrl-\] leaves it")
        terminal.type("\r")
        terminal.expect(r"login:")
        terminal.type("\x1d")
        assert terminal.process.wait(LIMIT) == 0


def test_machine_is_saved_forked_and_taken_back(web: str) -> None:
    ok("exec", web, "touch", "before")
    image = ok("snapshot", web, "--memory").decode().strip()
    fork = f"{web}-fork"
    try:
        assert image in ok("images", "list").decode()
        ok("exec", web, "touch", "after")
        assert ok("fork", web, "--name", fork).decode().strip() == fork
        assert {b"after", b"before"} <= set(ok("exec", fork, "ls").split())

        ok("rollback", web)
        listed = ok("exec", web, "ls").split()
        assert b"before" in listed
        assert b"after" not in listed
    finally:
        run("delete", fork)
    refused = run("images", "delete", image)
    assert refused.returncode == 1  # the machine is built on it by now
    assert web.encode() in refused.stderr


def test_what_runs_is_told(web: str) -> None:
    told = ok("diagnose", web).decode()

    assert "running" in told
    assert ok("wait", web) == b""
    logs = ok("logs", web)
    assert b"login:" in logs or logs == b"", "a copy's console begins when it was made"
