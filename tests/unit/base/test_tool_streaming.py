from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pycloudlib._base.tools import find_tool, run_tool_streaming
from pycloudlib.errors import MissingPrerequisiteError, ToolError


def ignore(_line: str) -> None:
    pass


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.01)


def test_lines_of_output_and_errors_are_handed_on_as_they_come() -> None:
    lines: list[str] = []

    run_tool_streaming(
        "x", ["sh", "-c", "echo a; echo b >&2; printf '10%%\\r20%%\\r'"], on_line=lines.append
    )

    assert lines == ["a", "b", "10%", "20%"]


def test_a_failure_tells_the_step_and_the_last_words() -> None:
    with pytest.raises(
        ToolError, match=r"doing it failed: .*sh ended with exit status 3"
    ) as caught:
        run_tool_streaming("doing it", ["sh", "-c", "seq 1000; exit 3"], on_line=ignore)

    assert str(caught.value).endswith("\n  1000")


@pytest.mark.parametrize("entry", ["", ".", "tools"])
def test_programs_of_the_current_directory_are_not_run(
    entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tools").mkdir()
    for directory in (tmp_path, tmp_path / "tools"):
        (directory / "gpgv").write_text("#!/bin/sh\necho '[GNUPG:] GOODSIG '\n")
        (directory / "gpgv").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{entry}:{os.environ['PATH']}:{entry}")
    assert find_tool("gpgv").is_absolute()
    assert not find_tool("gpgv").is_relative_to(tmp_path)


def test_program_that_is_passed_over_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/qemu").symlink_to("/bin/true")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "tools")
    with pytest.raises(MissingPrerequisiteError, match=r"'tools/qemu' is passed over.*relative"):
        find_tool("qemu")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(MissingPrerequisiteError, match=r"'qemu' was not found$"):
        find_tool("qemu")


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)

    with pytest.raises(MissingPrerequisiteError, match="'qemu-utils'"):
        run_tool_streaming("x", ["qemu-img"], on_line=ignore)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_program_ends_with_whatever_ends_the_call(error: type[BaseException]) -> None:
    pids: list[int] = []

    def fail(line: str) -> None:
        pids.append(int(line))
        raise error

    with pytest.raises(error):
        run_tool_streaming("x", ["sh", "-c", "echo $$; exec sleep 100"], on_line=fail)

    assert not is_running(pids[0])


def test_a_program_that_ends_with_its_input_is_left_to_do_so(tmp_path: Path) -> None:
    farewell = tmp_path / "farewell"

    def fail(_line: str) -> None:
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - the one above
        run_tool_streaming(
            "x",
            ["sh", "-c", 'echo ready; read -r _; echo bye >"$1"', "sh", farewell],
            on_line=fail,
            ends_with_stdin=True,
        )

    assert farewell.read_text() == "bye\n"


def test_the_program_does_not_outlive_a_killed_process() -> None:
    program = """
from pycloudlib._base.tools import find_tool, run_tool_streaming
command = ["sh", "-c", "echo $$; exec sleep 100"]
run_tool_streaming("x", command, on_line=lambda line: print(line, flush=True))
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert is_running(pid)
        os.kill(owner.pid, signal.SIGKILL)

    wait_until_gone(pid)
