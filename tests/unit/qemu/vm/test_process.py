from __future__ import annotations

import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pycloudlib.errors import CloudError
from pycloudlib.qemu.host.processes import ProcessIdentity
from pycloudlib.qemu.vm.process import QemuProcess

Start = Callable[..., QemuProcess]

# Far more than any of these processes takes; reached only when a test fails.
LIMIT = 30


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Give a process that runs until its end is asked for."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        # The kernel closes the files of an exec a moment before it shows the new arguments.
        while not Path(f"/proc/{process.pid}/cmdline").read_bytes():
            time.sleep(0.001)
        yield process
        process.kill()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Give a function that starts a shell script in QEMU's place."""
    started: list[QemuProcess] = []

    def start_script(script: str, *, pass_fds: tuple[int, ...] = ()) -> QemuProcess:
        process = QemuProcess.start(
            ["sh", "-c", script], pass_fds=pass_fds, log=tmp_path / "qemu.log"
        )
        started.append(process)
        return process

    yield start_script
    for process in started:
        process.kill()
        assert process.wait(LIMIT)
        process.end()


def identify(pid: int) -> ProcessIdentity:
    identity = ProcessIdentity.find(pid)
    assert identity is not None
    return identity


def test_running_process_is_identified(sleeper: subprocess.Popen[bytes]) -> None:
    identity = identify(sleeper.pid)

    assert identity.pid == sleeper.pid
    assert identity.alive


def test_identity_stays_the_same(sleeper: subprocess.Popen[bytes]) -> None:
    assert identify(sleeper.pid) == identify(sleeper.pid)


def test_later_process_of_the_same_pid_is_another(sleeper: subprocess.Popen[bytes]) -> None:
    identity = identify(sleeper.pid)

    earlier = ProcessIdentity(identity.pid, identity.start_time - 1)

    assert earlier != identity
    assert not earlier.alive


def test_ended_process_is_not_alive(sleeper: subprocess.Popen[bytes]) -> None:
    identity = identify(sleeper.pid)
    sleeper.kill()
    sleeper.wait()

    assert not identity.alive
    assert ProcessIdentity.find(sleeper.pid) is None


def test_remains_of_a_process_are_not_alive(sleeper: subprocess.Popen[bytes]) -> None:
    identity = identify(sleeper.pid)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)

    assert Path(f"/proc/{sleeper.pid}").exists(), "there are no remains to look at"
    assert not identity.alive
    assert ProcessIdentity.find(sleeper.pid) is None


@pytest.mark.parametrize("name", ["a) Z 1 (b", "((", ") ) )", "with space"])
def test_name_of_a_process_may_be_anything(name: str, tmp_path: Path) -> None:
    binary = tmp_path / name
    shutil.copy(shutil.which("sleep") or "/bin/sleep", binary)
    with subprocess.Popen([str(binary), "1000"]) as process:
        found = ProcessIdentity.find(process.pid)
        process.kill()

    assert found is not None
    assert found.start_time > 0


def test_name_of_a_process_may_be_cut_within_a_character(tmp_path: Path) -> None:
    script = tmp_path / "тестирование.py"
    script.write_text("#!/bin/sh\necho begun\nread line\n")
    script.chmod(0o700)
    with subprocess.Popen([str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        # The kernel names it a moment after it counts as executed.
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        name = Path(f"/proc/{process.pid}/comm").read_bytes()
        assert name.rstrip(b"\n") == script.name.encode()[:15]
        assert identify(process.pid).alive
        process.kill()


def test_own_process_started_before_its_child(sleeper: subprocess.Popen[bytes]) -> None:
    assert identify(os.getpid()).start_time <= identify(sleeper.pid).start_time


def test_process_runs_until_it_ends(start: Start) -> None:
    process = start("exec sleep 1000")

    assert not process.ended
    assert process.identity.alive
    process.kill()
    assert process.wait(LIMIT)
    assert process.ended
    assert process.end().exit_status == -signal.SIGKILL


def test_ended_process_is_killed_again_without_an_error(start: Start) -> None:
    process = start("exit 0")
    assert process.wait(LIMIT)
    process.end()

    process.kill()


@pytest.mark.parametrize("exit_status", [0, 1, 42])
def test_end_tells_the_exit_status_and_the_last_words(start: Start, exit_status: int) -> None:
    process = start(f"echo 'qemu: cannot do that' >&2; exit {exit_status}")
    assert process.wait(LIMIT)

    end = process.end()

    assert end.exit_status == exit_status
    assert end.stderr == "qemu: cannot do that"
    assert str(exit_status) in str(end)
    assert "cannot do that" in str(end)


def test_end_by_a_signal_names_it(start: Start) -> None:
    process = start("kill -ABRT $$")
    assert process.wait(LIMIT)

    end = process.end()

    assert end.exit_status == -signal.SIGABRT
    assert "SIGABRT" in str(end)


def test_end_tells_of_this_start_alone(start: Start) -> None:
    first = start("echo first words >&2")
    assert first.wait(LIMIT)
    second = start("echo second words >&2")
    assert second.wait(LIMIT)

    assert first.end().stderr.startswith("first words")
    assert second.end().stderr == "second words"


def test_last_words_are_told_however_much_was_said_before(start: Start) -> None:
    process = start("head -c 200000 /dev/zero | tr '\\0' x >&2; echo the last words >&2; exit 1")
    assert process.wait(LIMIT)

    assert process.end().stderr.endswith("the last words")


def test_log_is_readable_by_its_owner_alone(start: Start, tmp_path: Path) -> None:
    start("exit 0")

    assert stat.S_IMODE((tmp_path / "qemu.log").stat().st_mode) == 0o600


def test_process_is_in_a_session_of_its_own(start: Start) -> None:
    process = start("exec sleep 1000")

    assert os.getsid(process.identity.pid) == process.identity.pid


def test_process_gets_the_descriptors_it_is_given_and_no_others(tmp_path: Path) -> None:
    given_reader, given = os.pipe()
    other_reader, other = os.pipe()
    os.set_inheritable(other, True)
    program = (
        f"import contextlib, os; os.write({given}, b'given')\n"
        f"with contextlib.suppress(OSError): os.write({other}, b'other')\n"
    )
    try:
        process = QemuProcess.start(
            [sys.executable, "-c", program], pass_fds=(given,), log=tmp_path / "qemu.log"
        )
        assert process.wait(LIMIT)
        assert process.end().exit_status == 0
        assert select.select([given_reader, other_reader], [], [], 0)[0] == [given_reader]
    finally:
        for descriptor in (given_reader, given, other_reader, other):
            os.close(descriptor)


def test_descriptor_tells_of_the_end(start: Start) -> None:
    process = start("exit 0")

    assert select.select([process.fileno()], [], [], LIMIT)[0]
    assert process.ended


@pytest.mark.parametrize("binary", ["{tmp_path}/missing", "{tmp_path}", "{tmp_path}/no-program"])
def test_binary_that_cannot_be_executed_is_named(binary: str, tmp_path: Path) -> None:
    (tmp_path / "no-program").write_text("not executable")
    path = binary.format(tmp_path=tmp_path)

    with pytest.raises(CloudError) as caught:
        QemuProcess.start([path], pass_fds=(), log=tmp_path / "qemu.log")

    assert path in str(caught.value)


SLEEP = Path("sleep")  # what is on the command line, in the place of a machine's disk


def test_process_of_another_disk_is_not_attached_to(
    sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    disk = tmp_path / "vm.qcow2"
    assert QemuProcess.attach(identify(sleeper.pid), disk, tmp_path / "qemu.log") is None


def test_process_that_another_one_started_is_watched(
    sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    process = QemuProcess.attach(identify(sleeper.pid), SLEEP, tmp_path / "qemu.log")

    assert process is not None
    assert not process.ended
    process.kill()
    assert process.wait(LIMIT)
    end = process.end()
    assert end.exit_status is None
    assert "unknown" in str(end)


def test_ended_process_is_not_attached_to(sleeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    identity = identify(sleeper.pid)
    sleeper.kill()
    sleeper.wait()

    assert QemuProcess.attach(identity, SLEEP, tmp_path / "qemu.log") is None


def test_remains_of_a_process_are_not_attached_to(
    sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    identity = identify(sleeper.pid)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)

    assert QemuProcess.attach(identity, SLEEP, tmp_path / "qemu.log") is None


def test_later_process_of_the_same_pid_is_not_attached_to(
    sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    identity = identify(sleeper.pid)
    earlier = ProcessIdentity(identity.pid, identity.start_time - 1)

    assert QemuProcess.attach(earlier, SLEEP, tmp_path / "qemu.log") is None
    assert identity.alive


def test_process_outlives_the_program_that_started_it(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from pycloudlib.qemu.vm.process import QemuProcess\n"
        "process = QemuProcess.start(['sleep', '1000'], pass_fds=(), log=Path(sys.argv[1]))\n"
        "print(process.identity.pid, process.identity.start_time)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "qemu.log")],
        capture_output=True,
        text=True,
        check=True,
    )
    pid, start_time = map(int, done.stdout.split())
    identity = ProcessIdentity(pid, start_time)

    process = QemuProcess.attach(identity, SLEEP, tmp_path / "qemu.log")

    assert process is not None, "it ended with its program"
    process.kill()
    assert process.wait(LIMIT)
