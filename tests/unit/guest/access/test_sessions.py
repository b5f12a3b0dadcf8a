"""Sessions over connections: bounded, opened as needed, and given up when a place is lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import paramiko
import pytest

from pycloudlib._base.deadline import Deadline
from pycloudlib.errors import PycloudlibTimeoutError
from pycloudlib.guest.access.commands import Announcement
from tests.pythonlocks import holding_locks
from tests.unit.sshserver import LocalInstance

Maker = Callable[..., LocalInstance]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Maker]:
    instances: list[LocalInstance] = []

    def make_one(most_sessions: int = 10) -> LocalInstance:
        instances.append(LocalInstance(tmp_path, most_sessions))
        return instances[-1]

    yield make_one
    for instance in instances:
        instance.close()


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = Deadline.after(30)
    while not happened():
        assert not deadline.expired
        time.sleep(0.01)


def is_open(client: paramiko.SSHClient) -> bool:
    transport = client.get_transport()
    return transport is not None and transport.is_active()


def ends(pid_file: Path) -> bool:
    """Say whether a process has ended; it may be a zombie."""
    try:
        state = Path(f"/proc/{pid_file.read_text().strip()}/stat").read_text()
    except FileNotFoundError:
        return True
    return state.rpartition(")")[2].split()[0] == "Z"


def test_commands_one_after_another_share_a_connection(make: Maker) -> None:
    local = make()
    for number in range(20):
        assert local.execute(f"echo {number}") == str(number)
    assert len(local.transports) == 1


@pytest.mark.parametrize("most", [1, 3, 10])
def test_many_threads_get_sessions_whatever_the_server_allows(make: Maker, most: int) -> None:
    local = make(most)
    together = threading.Barrier(24)

    def ask(number: int) -> str:
        together.wait()
        return local.execute(f"sleep 0.1; echo {number}")

    with ThreadPoolExecutor(24) as threads:
        assert list(threads.map(ask, range(24))) == [str(number) for number in range(24)]
    assert len(local.transports) >= 24 / most / 3


@pytest.mark.parametrize("most", [1, 4])
def test_commands_whose_time_is_over_leave_the_machine_usable(make: Maker, most: int) -> None:
    local = make(most)
    for _ in range(most + 1):
        with pytest.raises(PycloudlibTimeoutError, match=r"within 0\.2 s.*sleep 900"):
            local.execute("sleep 900", timeout=0.2)
    assert local.execute("echo alive") == "alive"
    # Their places are free again: at most the command that ended them needed another connection.
    assert len(local.transports) <= 2


def test_command_that_is_not_to_be_logged_is_in_no_error(make: Maker) -> None:
    with pytest.raises(PycloudlibTimeoutError, match=r"within 0\.2 s.*not to be shown") as caught:
        make(4).execute("sleep 900 # secret", timeout=0.2, no_log=True)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "get_pty"),
    [
        ("echo $$ >pid; sleep 900", False),
        ("echo $$ >pid; exec sleep 900", True),
        ("sh -c 'echo $$ >pid; sleep 900' | cat", False),
        ("sh -c 'trap \"\" HUP TERM; echo $$ >pid; sleep 900; sleep 900' & wait", False),
        ("trap '' HUP; echo $$ >pid; sleep 900; sleep 900; sleep 900", True),
        ("echo $$ >pid; kill -STOP $$", False),
    ],
)
def test_a_command_whose_time_is_over_is_ended(
    make: Maker, tmp_path: Path, command: str, get_pty: bool
) -> None:
    local = make()
    local.sizes.append((80, 24))
    with pytest.raises(PycloudlibTimeoutError):
        local.execute(command, get_pty=get_pty, timeout=0.5)
    assert ends(tmp_path / "pid")


def test_other_commands_go_on_when_one_is_ended(make: Maker) -> None:
    local = make()
    with ThreadPoolExecutor(4) as threads:
        others = [threads.submit(local.execute, f"sleep 1.5; echo {n}") for n in range(4)]
        with pytest.raises(PycloudlibTimeoutError):
            local.execute("sleep 900", timeout=0.3)
        assert [str(other.result()) for other in others] == ["0", "1", "2", "3"]
    assert len(local.transports) == 1


def test_connection_with_a_lost_place_is_given_up_when_its_last_session_ends(
    make: Maker, tmp_path: Path
) -> None:
    local = make()
    escaped = "setsid sh -c 'echo $$ >pid; trap \"\" HUP; while sleep 0.1; do :; done' & wait"
    with ThreadPoolExecutor(1) as threads:
        (tmp_path / "go").unlink(missing_ok=True)
        other = threads.submit(
            local.execute, "touch begun; while [ ! -e go ]; do sleep 0.02; done; echo done"
        )
        wait_until((tmp_path / "begun").exists)
        with pytest.raises(PycloudlibTimeoutError):
            local.execute(escaped, timeout=0.5)
        assert local.execute("echo next") == "next"
        assert len(local.transports) == 2
        assert local.transports[0].is_active()
        (tmp_path / "go").touch()
        assert other.result() == "done"
    wait_until(lambda: not local.transports[0].is_active())
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_an_interrupted_command_costs_its_connection_alone(make: Maker) -> None:
    local = make()

    def interrupt() -> None:
        raise KeyboardInterrupt

    local._check_alive = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        local.execute("sleep 3")
    assert local.execute("echo alive") == "alive"
    assert len(local.transports) == 2


def test_server_that_lets_no_session_in_is_an_ssh_error(make: Maker) -> None:
    with pytest.raises(paramiko.SSHException, match="opens no session"):
        make(0).execute("true")


def test_a_lost_connection_is_replaced(make: Maker) -> None:
    local = make()
    local.execute("true")
    local.transports[0].close()
    wait_until(lambda: not is_open(local.clients[0]))
    assert local.execute("echo again") == "again"


def test_all_lost_connections_are_replaced_at_the_first_use(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = make(most_sessions=1)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: local.execute("sleep 0.5"), range(4)))
    assert len(local.transports) > 1

    def lost(_data: object) -> None:
        raise EOFError

    # Lost, and nobody knows before something is sent: as after a reboot of the guest.
    for client in local.clients:
        transport = client.get_transport()
        assert transport is not None
        monkeypatch.setattr(transport.packetizer, "write_all", lost)
    assert local.execute("echo again") == "again"


def test_files_share_the_sessions(make: Maker, tmp_path: Path) -> None:
    local = make(2)
    (tmp_path / "source").write_text("content")
    with ThreadPoolExecutor(8) as threads:
        copies = [
            threads.submit(local.push_file, tmp_path / "source", f"copy{n}") for n in range(8)
        ]
        answers = list(threads.map(lambda n: local.execute(f"echo {n}"), range(8)))
        for copy in copies:
            copy.result()
    assert answers == [str(n) for n in range(8)]
    assert all((tmp_path / f"copy{n}").read_text() == "content" for n in range(8))


def _execute_in_child(local: LocalInstance, answers: Any) -> None:
    answers.put([str(local.execute(f"echo {n}")) for n in range(3)])


def test_forked_child_has_connections_of_its_own(make: Maker) -> None:
    local = make()
    local.execute("true")
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    with holding_locks(local) as number:
        assert number == 1, "that of its connections"
        child = context.Process(target=_execute_in_child, args=(local, answers))
        child.start()
    child.join(60)
    assert child.exitcode == 0
    assert answers.get() == ["0", "1", "2"]
    assert local.execute("echo still") == "still"


def test_a_limit_changes_nothing_that_a_command_sees(make: Maker) -> None:
    local = make()
    command = "echo $0 $#; pwd; umask; ps -o pgid= -o args= -p $$ | tr -d 0-9; env | sort"
    for seen in (command, "cat; exit 3", "kill -9 $$", "printf 'a\\n\\n b'; echo err >&2"):
        without, limited = (local.execute(seen, stdin="in", timeout=t) for t in (None, 60))
        assert (str(without), without.stderr, without.return_code) == (
            str(limited),
            limited.stderr,
            limited.return_code,
        )


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize("before", [b"", b"noise of a start-up file\n"])
def test_announcement_is_taken_out_however_it_comes(size: int, before: bytes) -> None:
    out: list[bytes] = []
    announcement = Announcement(out.append)
    mark = announcement.ask_for("true").split()[-2]
    data = before + f"{mark} 4711\r\n".encode() + b"output\n\0" + bytes(50)
    for start in range(0, len(data), size):
        announcement.take(data[start : start + size])
    announcement.finish()
    assert announcement.pid == 4711
    assert b"".join(out) == before + b"output\n\0" + bytes(50)


def test_output_without_an_announcement_is_handed_on() -> None:
    out: list[bytes] = []
    announcement = Announcement(out.append)
    announcement.take(b"Please log in as another user\n")
    announcement.finish()
    assert announcement.pid is None
    assert b"".join(out) == b"Please log in as another user\n"
