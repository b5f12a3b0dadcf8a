"""Commands whose input and outputs flow, with a real SSH connection to a server in this process."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path

import paramiko
import pytest

from pycloudlib._base.deadline import Deadline
from pycloudlib.errors import PycloudlibTimeoutError
from pycloudlib.guest.access.commands import run, stream
from pycloudlib.guest.access.sessions import Connections, close_if_unanswered, open_session
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
