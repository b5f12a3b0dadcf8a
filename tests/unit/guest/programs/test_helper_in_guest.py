"""The program as it is sent to guests: run for real where it is harmless, else on files of ours."""

from __future__ import annotations

import ast
import getpass
import io
import json
import os
import pwd
import signal
import stat
import subprocess
import sys
import time
import tokenize
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pycloudlib.guest import helper
from pycloudlib.guest.programs import helper_in_guest

ME = getpass.getuser()
GUEST = Path(helper_in_guest.__file__).parent
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="another user's commands need root")


def run_program(requests: bytes, *, limit: float = 60) -> subprocess.CompletedProcess[bytes]:
    """Run the program as SSH does where no helper runs."""
    return subprocess.run(
        ["sh", "-c", helper.once_command()],
        input=requests,
        check=False,
        capture_output=True,
        timeout=limit,
        cwd="/",
    )


def ask(*requests: dict[str, Any] | bytes) -> list[dict[str, Any]]:
    """Give the answers to requests; the bytes that an answer announces are its `data`."""
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in requests]
    done = run_program(b"".join(lines))
    assert (done.returncode, done.stderr) == (0, b"")
    answers = []
    output = io.BytesIO(done.stdout)
    while line := output.readline():
        if not line.strip():
            continue  # each answer begins a line
        answer = json.loads(line)
        size = answer.get("out", answer.get("err"))
        if size is not None:
            answer["data"] = output.read(size)
        answers.append(answer)
    return answers


def exec_request(*argv: str, stdin: int = 0, **more: Any) -> dict[str, Any]:
    return {"id": 7, "op": "exec", "argv": list(argv), "user": ME, "stdin": stdin, **more}


def outcome(answers: list[dict[str, Any]], number: int = 7) -> tuple[bytes, bytes, int | None]:
    """Put the answers to one command together."""
    ours = [answer for answer in answers if answer["id"] == number]
    out = b"".join(answer["data"] for answer in ours if "out" in answer)
    err = b"".join(answer["data"] for answer in ours if "err" in answer)
    return out, err, next((answer["exit"] for answer in ours if "exit" in answer), None)


def test_clock_is_told() -> None:
    (answer,) = ask({"id": 1, "op": "clock"})
    assert answer["id"] == 1
    assert answer["now"] == pytest.approx(time.time(), abs=60)


def test_unknown_operation_is_an_error() -> None:
    (answer,) = ask({"id": 2, "op": "dance"})
    assert answer == {"id": 2, "error": "unknown operation dance"}


@pytest.mark.parametrize(
    "request_",
    [{"id": 3}, {"id": 3, "op": 5}, {"id": 3, "op": "exec"}, {"id": 3, "op": "fix"}],
    ids=["none", "number", "exec", "fix"],
)
def test_request_that_lacks_something_is_an_error(request_: dict[str, Any]) -> None:
    answers = ask(request_, {"id": 4, "op": "clock"})
    assert [answer["id"] for answer in answers] == [3, 4]
    assert "error" in answers[0]


@pytest.mark.parametrize(
    "line",
    [b"\n", b"rubbish\n", b'op": "clock"}\n', b"\xff\xfe\n", b"5\n", b"null\n", b"[1]\n", b'"a"\n'],
)
def test_line_that_is_no_request_does_not_end_the_helper(line: bytes) -> None:
    assert ask(line, {"id": 4, "op": "clock"})[-1]["id"] == 4


def test_nothing_to_do_is_no_error() -> None:
    assert ask() == []


@needs_root
def test_command_runs_with_its_input_outputs_and_status() -> None:
    script = "cat; echo told >&2; exit 5"
    answers = ask(exec_request("sh", "-c", script, stdin=6), b"hello\n", {"id": 8, "op": "clock"})
    assert outcome(answers) == (b"hello\n", b"told\n", 5)
    assert answers[-1]["id"] == 8


@needs_root
def test_large_input_comes_back_whole() -> None:
    data = os.urandom(700_000)
    assert outcome(ask(exec_request("cat", stdin=len(data)), data)) == (data, b"", 0)


@needs_root
def test_input_that_the_command_does_not_read_is_dropped() -> None:
    data = bytes(500_000)
    answers = ask(exec_request("true", stdin=len(data)), data, {"id": 8, "op": "clock"})
    assert outcome(answers) == (b"", b"", 0)
    assert answers[-1]["id"] == 8


@needs_root
def test_command_that_says_nothing_gets_all_its_input(tmp_path: Path) -> None:
    data = os.urandom(300_000)
    target = tmp_path / "target"
    script = f"exec cat >'{target}' 2>&1"
    request = json.dumps(exec_request("sh", "-c", script, stdin=len(data))).encode() + b"\n"
    done = run_program(request + data, limit=20)
    assert json.loads(done.stdout) == {"id": 7, "exit": 0}
    assert target.read_bytes() == data


@needs_root
def test_command_that_is_not_there_is_told_as_a_shell_would() -> None:
    _, err, status = outcome(ask(exec_request("no-such-program")))
    assert b"no-such-program: " in err
    assert status == 127


@needs_root
def test_command_that_a_signal_ended_has_no_exit_status_as_over_ssh() -> None:
    assert outcome(ask(exec_request("sh", "-c", "kill -TERM $$")))[2] == -1


@needs_root
def test_command_may_be_given_what_is_no_text() -> None:
    assert outcome(ask(exec_request("printf", "%s", "gr\udcf6\udcdfe"))) == (b"gr\xf6\xdfe", b"", 0)
    _, err, status = outcome(ask(exec_request("/no/gr\udcf6\udcdfe")))
    assert status == 127
    assert b"gr\xf6\xdfe" in err


def test_command_is_in_its_users_home() -> None:
    home = pwd.getpwnam(ME).pw_dir
    out, _, _ = outcome(ask(exec_request("sh", "-c", "pwd -P; id -u")))
    assert out.decode().split() == [str(Path(home).resolve()), str(os.getuid())]


@needs_root
def test_commands_are_another_users_wholly() -> None:
    request = {**exec_request("sh", "-c", "id -u; id -g; id -G"), "user": "nobody"}
    nobody = pwd.getpwnam("nobody")
    out, _, _ = outcome(ask(request))
    assert [int(number) for number in out.split()] == [
        nobody.pw_uid,
        nobody.pw_gid,
        *os.getgrouplist("nobody", nobody.pw_gid),
    ]


def test_unknown_user_is_an_error() -> None:
    (answer,) = ask({**exec_request("true"), "user": "no-such-user"})
    assert "no-such-user" in answer["error"]


def test_session_is_ended_with_those_that_do_not_hang_up() -> None:
    script = "trap '' HUP; sleep 900 & echo begun; sleep 900; sleep 900"
    leader = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    assert leader.stdout
    with leader.stdout:
        assert leader.stdout.readline() == b"begun\n"
    assert leader.pid in helper_in_guest.processes_of(leader.pid)
    helper_in_guest.end_session(leader.pid)
    assert helper_in_guest.processes_of(leader.pid) == []
    assert leader.wait(60) == -signal.SIGKILL


def test_input_of_a_command_that_cannot_run_is_no_request() -> None:
    data = b'{"id": 66, "op": "clock"}\n'
    request = {**exec_request("true", stdin=len(data)), "user": "no-such-user"}
    answers = ask(request, data, {"id": 8, "op": "clock"})
    assert [answer["id"] for answer in answers] == [7, 8]


def test_rewritten_file_keeps_its_mode_and_owner(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    file.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(file, 1234, 2345)
    before = file.stat()
    helper_in_guest.rewrite(str(file), "new\n")
    after = file.stat()
    assert file.read_text() == "new\n"
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )
    assert list(tmp_path.glob("file.*")) == []


@needs_root
def test_rewritten_file_that_is_new_is_roots(tmp_path: Path) -> None:
    helper_in_guest.rewrite(str(tmp_path / "public"), "x")
    helper_in_guest.rewrite(str(tmp_path / "private"), "x", 0o600)
    assert stat.S_IMODE((tmp_path / "public").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600


def test_given_mode_replaces_the_one_that_was(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("old")
    file.chmod(0o644)
    helper_in_guest.rewrite(str(file), "new", 0o600)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.fixture
def cloud_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the state that cloud-init has of an instance."""
    directory = tmp_path / "cloud"
    (directory / "data").mkdir(parents=True)
    (directory / "instances" / "iid-first" / "sem").mkdir(parents=True)
    (directory / "instances" / "iid-first" / "user-data.txt").write_text("mine")
    (directory / "instance").symlink_to(directory / "instances" / "iid-first")
    (directory / "data" / "instance-id").write_text("iid-first\n")
    (directory / "data" / "previous-instance-id").write_text("NO_PREVIOUS_INSTANCE_ID\n")
    monkeypatch.setattr(helper_in_guest, "CLOUD", str(directory))
    # What is below /run/cloud-init is this host's own, if there is any.
    exists = os.path.exists
    monkeypatch.setattr(
        os.path, "exists", lambda path: not str(path).startswith("/run/") and exists(path)
    )
    return directory


def test_instance_id_is_taken_with_all_that_cloud_init_knows(cloud_dir: Path) -> None:
    helper_in_guest.set_instance_id("iid-second")
    assert (cloud_dir / "instance" / "user-data.txt").read_text() == "mine"
    assert (cloud_dir / "instance").readlink() == cloud_dir / "instances" / "iid-second"
    assert (cloud_dir / "data" / "instance-id").read_text() == "iid-second\n"
    assert (cloud_dir / "data" / "previous-instance-id").read_text() == "iid-second\n"
    assert [entry.name for entry in (cloud_dir / "instances").iterdir()] == ["iid-second"]


def test_instance_id_is_taken_again_for_free(cloud_dir: Path) -> None:
    helper_in_guest.set_instance_id("iid-second")
    helper_in_guest.set_instance_id("iid-second")
    assert (cloud_dir / "instance" / "user-data.txt").read_text() == "mine"


def test_instance_id_is_taken_where_an_earlier_try_was_cut_off(cloud_dir: Path) -> None:
    (cloud_dir / "instance.new").symlink_to("nowhere")
    helper_in_guest.set_instance_id("iid-second")
    assert (cloud_dir / "instance" / "user-data.txt").read_text() == "mine"


def test_guest_without_cloud_init_has_no_instance_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helper_in_guest, "CLOUD", str(tmp_path / "none"))
    helper_in_guest.set_instance_id("iid-second")
    assert list(tmp_path.glob("none*")) == []


@pytest.fixture
def authorized_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the file of the keys that a user lets in; nobody else has one."""
    directory = tmp_path / "login" / ".ssh"
    directory.mkdir(parents=True)
    entry = pwd.struct_passwd(("login", "x", 1000, 1000, "", str(directory.parent), "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwnam", {"login": entry}.__getitem__)
    monkeypatch.setattr(helper_in_guest, "KNOWN_USERS", {})
    exists = os.path.exists
    monkeypatch.setattr(
        os.path, "exists", lambda path: not str(path).startswith("/root/") and exists(path)
    )
    return directory / "authorized_keys"


KEYS = {"user": "login", "old": "ssh-ed25519 AAAAold", "new": "ssh-ed25519 AAAAnew"}


def test_key_is_let_in_in_place_of_another(authorized_keys: Path) -> None:
    authorized_keys.write_text("ssh-rsa AAAA other\nopt ssh-ed25519 AAAAold me@here\n")
    authorized_keys.chmod(0o600)
    helper_in_guest.authorize(KEYS)
    assert authorized_keys.read_text() == "ssh-rsa AAAA other\nopt ssh-ed25519 AAAAnew me@here\n"
    assert stat.S_IMODE(authorized_keys.stat().st_mode) == 0o600


def test_key_is_let_in_beside_comments_that_are_no_text(authorized_keys: Path) -> None:
    authorized_keys.write_bytes(b"ssh-rsa AAAA Ren\xe9\nssh-ed25519 AAAAold Ren\xe9\n")
    helper_in_guest.authorize(KEYS)
    assert authorized_keys.read_bytes() == b"ssh-rsa AAAA Ren\xe9\nssh-ed25519 AAAAnew Ren\xe9\n"


def test_keys_stay_where_the_old_one_was_not_let_in(authorized_keys: Path) -> None:
    authorized_keys.write_text("ssh-rsa AAAA other\n")
    before = authorized_keys.stat().st_ino
    helper_in_guest.authorize(KEYS)
    assert authorized_keys.read_text() == "ssh-rsa AAAA other\n"
    assert authorized_keys.stat().st_ino == before


def test_user_without_keys_is_no_obstacle(authorized_keys: Path) -> None:
    helper_in_guest.authorize(KEYS)
    assert not authorized_keys.exists()


for_each_program = pytest.mark.parametrize(
    "source",
    [pytest.param(file.read_text(), id=file.stem) for file in GUEST.glob("*_in_guest.py")],
)


@for_each_program
def test_program_has_only_syntax_of_its_oldest_python(source: str) -> None:
    ast.parse(source, feature_version=(3, 5))


@for_each_program
def test_no_signature_ends_with_a_comma_after_its_last_star(source: str) -> None:
    """Python 3.5 refuses it, which `ast.parse` does not know."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        last = function.args.kwarg or (not function.args.kwonlyargs and function.args.vararg)
        if last and _token_after(source, last) == ",":
            found.append(function.name)
    assert found == []


def _token_after(source: str, argument: ast.arg) -> str:
    end = (argument.end_lineno or 0, argument.end_col_offset or 0)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return next(token.string for token in tokens if token.start >= end)


@for_each_program
def test_program_needs_nothing_but_the_standard_library(source: str) -> None:
    tree = ast.parse(source)
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= sys.stdlib_module_names


def test_calls_hold_no_output_back() -> None:
    """Each answer is there when the next request is read, as on the port of a guest."""
    with subprocess.Popen(
        ["sh", "-c", helper.once_command()], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as program:
        assert program.stdin
        assert program.stdout
        times = []
        for number in range(3):
            program.stdin.write(json.dumps({"id": number, "op": "clock"}).encode() + b"\n")
            program.stdin.flush()
            assert program.stdout.readline() == b"\n"
            answer = json.loads(program.stdout.readline())
            assert answer["id"] == number
            times.append(answer["now"])
        program.stdin.close()
        assert program.wait(60) == 0
    assert all(first <= second for first, second in pairwise(times))


@pytest.fixture
def ssh_pid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the pid file of an SSH server that was restarted, as it was before."""
    path = tmp_path / "sshd.pid"
    path.write_text("1\n")
    os.utime(path, ns=(1, 1))
    monkeypatch.setattr(helper_in_guest, "SSH_PID", str(path))
    monkeypatch.setattr(helper_in_guest, "SSH_RESTARTS", [1])
    return path


def test_restarted_ssh_server_is_back_when_it_has_written_its_pid_file(ssh_pid: Path) -> None:
    assert not helper_in_guest.wait_for_ssh(0)
    ssh_pid.unlink()
    assert not helper_in_guest.wait_for_ssh(0)
    ssh_pid.write_text("1\n")

    assert helper_in_guest.wait_for_ssh(60)
    assert helper_in_guest.wait_for_ssh(0), "it was not restarted since"


def test_ssh_server_that_was_not_restarted_is_not_waited_for() -> None:
    (answer,) = ask({"id": 3, "op": "ssh", "limit": 60})
    assert answer == {"id": 3, "up": True}
