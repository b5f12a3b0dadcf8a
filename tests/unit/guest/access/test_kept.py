"""The connection that is kept by a real `ssh`, to an SSH server of the tests' own."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import paramiko
import pytest

from pycloudlib._base.deadline import Deadline
from pycloudlib.errors import CloudError
from pycloudlib.guest.access import commands, kept, sessions, ssh
from pycloudlib.guest.access.kept import Keeper
from pycloudlib.guest.access.sessions import open_session
from pycloudlib.key import generate_ed25519
from tests.unit.sshserver import ListeningServer

pytestmark = pytest.mark.skipif(shutil.which("ssh") is None, reason="there is no ssh here")

LIMIT = 30.0


@dataclass(frozen=True)
class Pinned:
    """Host keys that are known."""

    lines: tuple[str, ...]

    def pinned(self) -> tuple[str, ...]:
        return self.lines

    def accepts(self, key_line: str, connection: object) -> bool:
        return False


class Machine:
    """A machine that is this host: the connection to it is kept.

    Attributes:
        keeper: The connection.
        group: The file behind its logins.
        usual: How often the usual way to connect was taken.
    """

    def __init__(self, directory: Path, server: ListeningServer) -> None:
        private, public = generate_ed25519("test")
        self.key = directory / "key"
        self.key.write_text(private)
        self.key.chmod(0o600)
        (directory / "key.pub").write_text(public)
        login, self.group = directory / "login", directory / "group"
        for file in (self.group, login):
            file.touch()
        os.utime(self.group, (1, 1))
        run = directory / "run"
        run.mkdir(mode=0o700)
        self.keeper = Keeper(run / "ssh", str(login), (str(self.group),))
        self.server = server
        self.endpoint = ssh.Endpoint("127.0.0.1", server.port, "me", str(self.key))
        self.host_keys = Pinned((server.host_key,))
        self.usual = 0

    def connect_usually(self) -> paramiko.SSHClient:
        self.usual += 1
        return ssh.connect(self.endpoint, self.host_keys, banner_timeout=LIMIT)

    def connect(self) -> paramiko.SSHClient:
        return self.keeper.connect(
            self.endpoint, self.host_keys, self.connect_usually, self.connect, may_start=True
        )

    def run(self, command: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        """Run a command as the command line does."""
        out, err = list[bytes](), list[bytes]()
        inputs = iter((stdin, b""))
        with contextlib.closing(self.connect()) as client:
            status = commands.stream(
                open_session(client),
                command,
                stdin=lambda _: next(inputs),
                stdout=out.append,
                stderr=err.append,
            )
        return status, b"".join(out), b"".join(err)

    def pid(self) -> int:
        """The process that keeps the connection."""
        master = self.keeper.find()
        assert master is not None
        try:
            return master.ask_pid(Deadline.after(LIMIT))
        finally:
            master.close()


@pytest.fixture
def make(tmp_path: Path, guest: Path) -> Iterator[Callable[..., Machine]]:
    with contextlib.ExitStack() as stack:

        def make_one(most_sessions: int = 10) -> Machine:
            server = stack.enter_context(ListeningServer(guest, most_sessions))
            machine = Machine(tmp_path, server)
            stack.callback(machine.keeper.end)
            return machine

        yield make_one


@pytest.fixture
def machine(make: Callable[..., Machine]) -> Machine:
    return make()


def is_gone(pid: int) -> bool:
    """Wait until a process has ended; it may be a zombie where nobody waits for orphans."""
    limit = time.monotonic() + LIMIT
    while time.monotonic() < limit:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def test_commands_share_one_connection(machine: Machine) -> None:
    for _ in range(3):
        done = machine.run("cat; echo err >&2; exit 7", b"in\0\xff")
        assert done == (7, b"in\0\xff", b"err\n")

    assert machine.server.connections == 1
    assert machine.usual == 0
    assert machine.server.ended == [7] * 3  # a session each, the first one, too


def test_command_need_not_be_text(machine: Machine) -> None:
    assert machine.run("printf '%s' 'caf\udce9 \xe9'") == (0, b"caf\xe9 \xc3\xa9", b"")


def test_builtins_and_keywords_of_the_shell_work(machine: Machine) -> None:
    assert machine.run("! false && echo yes; test $? = 0 && echo '$?'")[1] == b"yes\n$?\n"


def test_command_that_a_signal_ends_has_no_status(machine: Machine) -> None:
    machine.run("true")

    assert machine.run("kill -9 $$")[0] == -1


def test_input_that_is_not_read_is_no_error(machine: Machine) -> None:
    assert machine.run("exit 3", b"x" * (1 << 20))[0] == 3


def test_large_streams_flow(machine: Machine) -> None:
    data = os.urandom(1 << 20)

    assert machine.run("cat", data) == (0, data, b"")


def test_files_are_this_users_alone(machine: Machine) -> None:
    machine.run("true")

    directory = machine.keeper.directory
    assert directory.stat().st_mode & 0o077 == 0
    modes = {file.name: file.stat().st_mode & 0o777 for file in directory.iterdir()}
    assert modes["socket"] == 0o600
    assert modes["hosts"] == 0o600


def test_keeper_has_nothing_of_the_program_that_started_it(machine: Machine) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    try:
        machine.run("true")
    finally:
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            assert pipe.read() == b""  # it would not end
    pid = machine.pid()
    assert os.getsid(pid) != os.getsid(0)
    links = [file.readlink() for file in Path(f"/proc/{pid}/fd").iterdir()]
    assert {str(link).partition(":")[0] for link in links} <= {"/dev/null", "socket", "pipe"}


def test_path_of_any_length_will_do(machine: Machine, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    machine.keeper = dataclasses.replace(machine.keeper, directory=deep / "ssh")
    try:
        machine.run("true")
        assert machine.run("echo x") == (0, b"x\n", b"")
        assert (machine.server.connections, machine.usual) == (1, 0)
    finally:
        machine.keeper.end()


def test_keeper_ends_with_the_connection(machine: Machine) -> None:
    machine.run("true")
    pid = machine.pid()

    machine.server.hang_up()

    assert is_gone(pid)
    assert machine.run("echo again") == (0, b"again\n", b"")


def test_keeper_ends_when_asked_to(machine: Machine) -> None:
    machine.run("true")
    pid = machine.pid()

    machine.keeper.end()

    assert is_gone(pid)
    assert not machine.keeper.is_there()


def test_keeper_ends_when_nobody_uses_it(machine: Machine) -> None:
    machine.keeper = dataclasses.replace(machine.keeper, idle_limit=1)
    machine.run("true")

    assert is_gone(machine.pid())


def test_keeper_that_was_killed_leaves_nothing_in_the_way(machine: Machine) -> None:
    machine.run("true")
    pid = machine.pid()
    os.kill(pid, signal.SIGKILL)
    assert is_gone(pid)

    assert machine.run("echo again") == (0, b"again\n", b"")
    assert (machine.server.connections, machine.usual) == (2, 0)


def test_guest_that_answers_no_more_is_connected_to_anew(machine: Machine, guest: Path) -> None:
    """As after a reset: what is sent to the old connection is never answered."""
    machine.run("true")
    machine.keeper = dataclasses.replace(machine.keeper, open_limit=0.5)
    machine.server.silent.set()

    def wake() -> None:
        # The new connection shows that the old one was given up.
        while machine.server.connections < 2:
            time.sleep(0.01)
        machine.server.silent.clear()

    waker = threading.Thread(target=wake)
    waker.start()
    assert machine.run("echo ran >>log; cat", b"once") == (0, b"once", b"")
    waker.join()
    assert machine.server.connections == 2
    while len(machine.server.ended) < 3:  # with that of the session that was opened too late
        time.sleep(0.01)
    assert (guest / "log").read_text() == "ran\n"


def test_request_that_another_connection_does_not_answer_has_a_limit(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "ANSWER_LIMIT", 0.5)
    machine.server.answers_requests = False
    client = kept.client(machine.keeper, machine.connect_usually)  # nobody keeps one

    with contextlib.closing(client), pytest.raises(paramiko.SSHException):
        commands.stream(open_session(client), "true", stdout=len, stderr=len)


def test_shell_that_prints_without_end_is_given_up(machine: Machine) -> None:
    """As a start-up file that ends at last, or one of a guest that lies."""
    machine.run("true")
    machine.server.prelude = "while :; do echo another line; done; "
    client = machine.connect()

    with contextlib.closing(client), pytest.raises(paramiko.SSHException, match="does not begin"):
        commands.stream(open_session(client), "true", stdout=len, stderr=len)


def test_shell_that_prints_now_and_then_is_given_up(machine: Machine) -> None:
    machine.run("true")
    machine.server.prelude = "while :; do echo another line; sleep 0.05; done; "

    with pytest.raises(TimeoutError):
        machine.keeper.open(b"true", None, Deadline.after(1))


def test_session_that_ran_nothing_has_ended(machine: Machine) -> None:
    connections = sessions.Connections(lambda _deadline: machine.connect())
    try:
        with connections.session() as session:
            session.wait_for_end(LIMIT)
        assert session.ended
        assert connections.any_open
    finally:
        connections.close()


def test_error_of_the_connection_that_is_made_instead_is_raised(machine: Machine) -> None:
    def refuse() -> paramiko.SSHClient:
        raise CloudError("the machine is paused")

    client = kept.client(machine.keeper, refuse)  # nobody keeps one
    with pytest.raises(CloudError, match="the machine is paused"):
        commands.stream(open_session(client), "true", stdout=len, stderr=len)


def test_login_whose_files_were_changed_is_made_anew(machine: Machine, guest: Path) -> None:
    machine.run("true")
    login = Path(machine.keeper.login)
    changed = login.stat().st_mtime_ns + 1
    os.utime(machine.group, ns=(0, changed))
    # What makes the login writes its file.
    machine.server.on_login = lambda: os.utime(login, ns=(0, changed + 1))

    assert machine.run("echo ran >>log; cat", b"in") == (0, b"in", b"")

    assert (guest / "log").read_text() == "ran\n"
    assert (machine.server.connections, machine.usual) == (2, 0)


def test_login_without_a_file_of_its_own_is_not_shared(machine: Machine) -> None:
    Path(machine.keeper.login).unlink()

    for _ in range(2):
        assert machine.run("cat", b"in") == (0, b"in", b"")

    assert machine.usual == 2
    assert not machine.keeper.is_there()
    assert machine.server.connections == 3, "it is tried once"


@pytest.mark.parametrize("version", ["4.2.46", "5.0.17"])
def test_login_shell_that_runs_commands_otherwise_is_not_used(
    machine: Machine, guest: Path, version: str
) -> None:
    machine.server.prelude = f"BASH_VERSION={version}; "

    assert machine.run("echo ran >>log; cat", b"in") == (0, b"in", b"")

    assert (guest / "log").read_text() == "ran\n"
    assert machine.usual == 1
    assert not machine.keeper.is_there()


def test_sessions_beyond_the_servers_limit_get_a_connection(
    make: Callable[..., Machine], guest: Path
) -> None:
    machine = make(most_sessions=1)
    machine.run("true")
    os.mkfifo(guest / "over")
    long = threading.Thread(target=machine.run, args=("echo >begun; cat over",))
    long.start()
    while not (guest / "begun").exists():
        time.sleep(0.01)
    assert machine.run("echo another") == (0, b"another\n", b"")
    (guest / "over").write_text("")
    long.join(LIMIT)
    assert not long.is_alive()
    assert machine.server.connections == 2


def test_another_host_key_is_not_accepted(machine: Machine) -> None:
    key = paramiko.ECDSAKey.generate()
    machine.host_keys = Pinned((f"{key.get_name()} {key.get_base64()}",))

    with pytest.raises(paramiko.SSHException, match="host key changed"):
        machine.run("true")

    assert machine.usual == 1
    assert not machine.keeper.is_there()


def test_machine_without_a_known_host_key_is_reached_in_the_usual_way(machine: Machine) -> None:
    machine.host_keys = Pinned(())

    with pytest.raises(paramiko.SSHException, match="unknown host key"):
        machine.run("true")
    assert machine.server.connections == 1


def test_host_without_ssh_is_no_obstacle(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(tmp_path / "none"))

    assert machine.run("echo x") == (0, b"x\n", b"")
    assert machine.usual == 1


def test_users_own_configuration_is_not_read(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config").write_text("Host *\n  ProxyCommand false\n")
    monkeypatch.setenv("HOME", str(tmp_path))

    assert machine.run("echo x") == (0, b"x\n", b"")
    assert machine.usual == 0


def test_terminal_has_the_size_and_takes_what_is_typed(machine: Machine) -> None:
    machine.run("true")
    with contextlib.closing(machine.connect()) as client, open_session(client) as channel:
        channel.get_pty("vt100", 90, 30)
        channel.exec_command(b"stty -echo; echo ready; read line; stty size; echo got $line")
        output = b""
        while b"ready" not in output:
            output += channel.recv(100)
        channel.resize_pty(100, 40)
        while (100, 40) not in machine.server.sizes:
            time.sleep(0.01)
        channel.sendall(b"typed\r")
        while chunk := channel.recv(100):
            output += chunk
        assert channel.recv_exit_status() == 0
    assert machine.server.sizes[0] == (90, 30)
    assert output.replace(b"\r", b"").endswith(b"40 100\ngot typed\n")
    assert machine.server.connections == 1


def test_login_shell_reads_commands(machine: Machine) -> None:
    machine.run("true")
    out = list[bytes]()
    inputs = iter((b"echo $((6 * 7))\nexit 3\n", b""))
    with contextlib.closing(machine.connect()) as client:
        status = commands.stream(
            open_session(client),
            None,
            stdin=lambda _: next(inputs),
            stdout=out.append,
            stderr=len,
        )
    assert (status, b"".join(out)) == (3, b"42\n")
    assert machine.server.connections == 1


def test_closing_the_client_ends_the_command(machine: Machine) -> None:
    machine.run("true")
    client = machine.connect()
    timer = threading.Timer(0.2, client.close)
    timer.start()
    status = commands.stream(open_session(client), "sleep 300", stdout=len, stderr=len)
    timer.join()
    assert status == -1


def test_programs_that_begin_at_once_make_one_connection(machine: Machine) -> None:
    done = list[tuple[int, bytes, bytes]]()
    threads = [
        threading.Thread(target=lambda: done.append(machine.run("echo x"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert done == [(0, b"x\n", b"")] * 4
    assert (machine.server.connections, machine.usual) == (1, 0)


def test_commands_need_no_library() -> None:
    """What a command that is run on the kept connection does not import."""
    code = (
        "import sys\n"
        "from pycloudlib.guest.access import commands, kept, sessions\n"
        "print('paramiko' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"False\n"
