"""Commands whose input and outputs flow, with a real SSH connection to a server in this process."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import paramiko
import pytest

from pycloudlib._base.deadline import Deadline
from pycloudlib.errors import PycloudlibTimeoutError
from pycloudlib.guest.access import commands, sessions
from pycloudlib.guest.access.commands import run, stream
from pycloudlib.guest.access.sessions import Connections, close_if_unanswered, open_session
from tests.unit import sshserver
from tests.unit.sshserver import LocalInstance


@pytest.fixture
def client(local: LocalInstance) -> paramiko.SSHClient:
    return local._ssh_connect()


class Outputs:
    def __init__(self) -> None:
        self.out, self.err = io.BytesIO(), io.BytesIO()

    def run(
        self,
        client: paramiko.SSHClient,
        command: str | None,
        stdin: bytes | None = None,
        on_wait: Callable[[], None] = lambda: None,
    ) -> int:
        return stream(
            open_session(client),
            command,
            stdin=None if stdin is None else io.BytesIO(stdin).read,
            stdout=self.out.write,
            stderr=self.err.write,
            on_wait=on_wait,
        )


PATH = b"/gr\xf6\xdfe"
"""A path that is no UTF-8."""


@pytest.fixture
def outputs() -> Outputs:
    return Outputs()


def test_outputs_and_status_are_the_command_s(client: paramiko.SSHClient, outputs: Outputs) -> None:
    assert outputs.run(client, "echo out; echo err >&2; exit 7") == 7
    assert outputs.out.getvalue() == b"out\n"
    assert outputs.err.getvalue() == b"err\n"


def test_input_is_read_to_its_end(client: paramiko.SSHClient, outputs: Outputs) -> None:
    assert outputs.run(client, "cat; echo end", b"a\0b\xff") == 0
    assert outputs.out.getvalue() == b"a\0b\xffend\n"


def test_command_may_name_what_is_no_text(client: paramiko.SSHClient, outputs: Outputs) -> None:
    assert outputs.run(client, f"printf %s {os.fsdecode(PATH)}") == 0
    assert outputs.out.getvalue() == PATH


def test_command_without_input_reads_nothing(client: paramiko.SSHClient, outputs: Outputs) -> None:
    assert outputs.run(client, "wc -c") == 0
    assert outputs.out.getvalue().strip() == b"0"


def test_input_that_nobody_reads_is_no_error(client: paramiko.SSHClient, outputs: Outputs) -> None:
    assert outputs.run(client, "exit 3", bytes(8 << 20)) == 3


def test_large_input_and_output_flow_at_once(client: paramiko.SSHClient, outputs: Outputs) -> None:
    data = hashlib.sha256(b"seed").digest() * (1 << 17)

    assert outputs.run(client, "cat", data) == 0
    assert outputs.out.getvalue() == data


def test_output_comes_before_the_command_has_ended(client: paramiko.SSHClient, guest: Path) -> None:
    begun = threading.Event()
    go = guest / "go"

    def take(chunk: bytes) -> None:
        begun.set()
        go.touch()

    status = stream(
        open_session(client),
        "echo begun; while [ ! -e go ]; do sleep 0.02; done",
        stdout=take,
        stderr=take,
    )

    assert status == 0
    assert begun.is_set()


def test_end_by_a_signal_has_no_status(client: paramiko.SSHClient, outputs: Outputs) -> None:
    assert outputs.run(client, "kill -9 $$") == -1


def test_login_shell_reads_commands(client: paramiko.SSHClient, outputs: Outputs) -> None:
    assert outputs.run(client, None, b"echo $((6 * 7))\nexit 5\n") == 5
    assert outputs.out.getvalue() == b"42\n"


def test_output_that_cannot_be_written_ends_the_command(client: paramiko.SSHClient) -> None:
    def refuse(chunk: bytes) -> None:
        raise BrokenPipeError("nobody reads")

    with pytest.raises(BrokenPipeError, match="nobody reads"):
        stream(open_session(client), "yes", stdout=refuse, stderr=refuse)


def test_what_is_found_while_waiting_ends_the_command(
    client: paramiko.SSHClient, outputs: Outputs
) -> None:
    def find() -> None:
        raise RuntimeError("the machine is gone")

    with pytest.raises(RuntimeError, match="the machine is gone"):
        outputs.run(client, "sleep 60", on_wait=find)


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_what_ends_the_wait_is_the_error(local: LocalInstance, timeout: float | None) -> None:
    """Also where it is a time-out itself, as for a boot that never ends."""

    def find() -> None:
        raise PycloudlibTimeoutError("the guest is gone")

    connections = Connections(lambda _deadline: local._ssh_connect())
    with pytest.raises(PycloudlibTimeoutError, match=r"^the guest is gone$"):
        run(connections, "sleep 60", timeout=timeout, on_wait=find)


def test_lost_connection_has_no_status(client: paramiko.SSHClient, outputs: Outputs) -> None:
    def cut() -> None:
        client.close()

    assert outputs.run(client, "sleep 60", on_wait=cut) == -1


def test_closed_connection_is_an_error(client: paramiko.SSHClient) -> None:
    client.close()

    with pytest.raises(paramiko.SSHException):
        open_session(client)


def test_hanging_up_on_a_lost_connection_is_no_error_of_a_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python would print its traceback."""
    failed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    closed = threading.Event()

    class LostChannel:
        def close(self) -> None:
            closed.set()
            raise EOFError

    with close_if_unanswered(LostChannel(), Deadline.after(0.01)):  # type: ignore[arg-type]
        assert closed.wait(30)
        for thread in threading.enumerate():
            if isinstance(thread, threading.Timer):
                thread.join(30)
    assert failed == []


SCRIPT = f"eval 'exec 9<> <(:)'; echo $$; {commands.LEAVE_SHELL}"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a home directory with start-up files of bash, which is the login shell."""
    home = tmp_path / "own-home"
    home.mkdir()
    (home / ".bashrc").touch()
    os.utime(home / ".bashrc", (0, 0))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SHELL", "/bin/bash")
    return home


def leave_shell(local: LocalInstance, script: str = SCRIPT) -> str:
    """Run a script that leaves its shell; return what it printed before that."""
    with commands.leaving_shell():
        result = local.execute(["bash", "-c", script], timeout=30)
    assert result.ok
    return result.stdout


def test_next_command_takes_the_shell_that_was_left(local: LocalInstance, home: Path) -> None:
    for timeout in (None, 30):
        pid = leave_shell(local)
        result = local.execute(["sh", "-c", "cat; echo $$ >&2; exit 7"], "in\n", timeout=timeout)
        assert (result, result.stderr, result.return_code) == ("in", pid, 7)
        assert local.execute("echo $$") != pid
    assert len(local.transports) == 1


def test_a_command_in_a_shell_that_was_left_is_like_any_other(
    local: LocalInstance, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHLVL", "0")
    # Not by dash, which the login shell is here.
    monkeypatch.setattr(sshserver, "SHELL", ("bash", "-c"))
    script = "env; pwd; umask; ls -l /proc/self/fd | sed 's/.* [0-9:]* //; /proc/d'; ulimit -a; set"
    usual = local.execute(script)
    leave_shell(local)
    left = local.execute(script)

    def facts(text: str) -> list[str]:
        return [re.sub(r"\d{3,}|pipe|socket", "", line) for line in sorted(text.splitlines())]

    assert facts(left) == facts(usual)


def test_late_command_in_a_shell_that_was_left_is_ended(local: LocalInstance, home: Path) -> None:
    pid = leave_shell(local)
    with pytest.raises(PycloudlibTimeoutError, match="hung up on"):
        local.execute("exec sleep 900", timeout=0.3)
    with contextlib.suppress(FileNotFoundError):  # once its parent has noticed
        assert ") Z " in Path("/proc", pid, "stat").read_text()


@pytest.mark.parametrize(
    "ended", ["", "printf '\\n%s\\n' $leave_mark; exit"], ids=["not left", "over"]
)
def test_command_runs_anew_where_the_shell_is_gone(
    local: LocalInstance, home: Path, ended: str
) -> None:
    leave_shell(local, ended or "echo done")
    assert local.execute("echo hello; cat", stdin="in") == "hello\nin"
    assert local.execute("echo hello") == "hello"


def test_command_that_may_have_begun_is_not_run_anew(
    local: LocalInstance, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the connection is lost with what the command has said first."""
    monkeypatch.setattr(sshserver, "SHELL", ("bash", "-c"))  # it becomes the command
    lost = "printf '\\n%s\\n' $leave_mark; read -r -d '' line; eval \"$line\"; kill -9 $$"
    leave_shell(local, lost)
    result = local.execute(f"echo ran >>{home}/log")
    assert (result, result.return_code) == ("", -1)
    assert (home / "log").read_text() == "ran\n"


def test_a_command_that_a_shell_may_have_itself_is_left_to_a_login_shell(
    local: LocalInstance, home: Path
) -> None:
    leave_shell(local)
    assert local.execute(["type", "type"]) == "type is a shell builtin"
    assert len(local.transports) == 1


def test_a_shell_that_nothing_came_for_costs_no_connection(
    local: LocalInstance, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "SHELL_LIMIT", 0)
    for _ in range(3):
        pid = leave_shell(local)
        assert local.execute("echo $$") != pid
    assert len(local.transports) == 1


def test_shell_is_not_left_where_its_start_up_files_have_changed(
    local: LocalInstance, home: Path
) -> None:
    changes = SCRIPT.replace("echo $$", "echo x=1 >~/.bashrc; echo $$")
    with commands.leaving_shell():
        pid = local.execute(["bash", "-c", changes]).stdout
    assert pid.isdigit()
    assert local.execute("echo $$") != pid


def test_late_script_that_would_leave_a_shell_is_ended(local: LocalInstance, home: Path) -> None:
    with (
        commands.leaving_shell(),
        pytest.raises(PycloudlibTimeoutError, match="hung up on"),
    ):
        local.execute(f"echo $$ >{home}/pid; exec sleep 900", timeout=0.5)
    pid = (home / "pid").read_text().strip()
    with contextlib.suppress(FileNotFoundError):
        assert ") Z " in Path("/proc", pid, "stat").read_text()


def test_failed_script_that_would_leave_a_shell_is_told(local: LocalInstance, home: Path) -> None:
    with commands.leaving_shell():
        result = local.execute("echo out; echo err >&2; exit 3")
    assert (result, result.stderr, result.return_code) == ("out", "err", 3)
