"""Waiting until a machine is ready: what passes, and what decides that it never will be."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import paramiko
import pytest

from pycloudlib import readiness
from pycloudlib.errors import PycloudlibTimeoutError
from pycloudlib.guest import ssh
from pycloudlib.guest.cloudinit import WAIT_COMMAND
from pycloudlib.result import Result
from tests.unit.test_base_classes import Instance

BOOT_ID = "boot id"
WAIT = "wait"
FINISHED = 'finished\n{"v1": {"datasource": "x"}}'
LIMIT = 0.5
"""Minutes: no wait that ends by itself takes so long."""


def refused(text: str = "Authentication failed.") -> Exception:
    return paramiko.AuthenticationException(f"me@host port 1: key /k refused: {text}")


def raising(error: Exception) -> Callable[[], Result]:
    def answer() -> Result:
        raise error

    return answer


class Scripted(Instance):
    """A machine that answers to each command what it was told to, the last answer for ever.

    Attributes:
        asked: What it was asked.
        settled: What it says of whether cloud-init has ended.
    """

    def __init__(self, **answers: Sequence[Callable[[], Result] | str]) -> None:
        super().__init__()
        defaults: dict[str, list[Callable[[], Result] | str]] = {
            BOOT_ID: ["boot-1"],
            WAIT: [FINISHED],
        }
        given = {name.replace("_", " "): list(answer) for name, answer in answers.items()}
        self.answers = defaults | given
        self.asked: list[str] = []
        self.settled: Callable[[], object] = lambda: None

    def _ssh(  # type: ignore[override]
        self, command: Sequence[str], stdin: Any = None, **kwargs: Any
    ) -> Result:
        kind = WAIT if tuple(command) == WAIT_COMMAND else BOOT_ID
        self.asked.append(kind)
        answers = self.answers[kind]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return Result(answer) if isinstance(answer, str) else answer()

    def _has_settled(self) -> object:
        return self.settled()


@pytest.fixture(autouse=True)
def banner(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let an SSH server show itself at the machines' port, which does nothing else."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    endpoint = ssh.Endpoint("127.0.0.1", port, "me", None)
    monkeypatch.setattr(Instance, "_endpoint", lambda _: endpoint)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connection.sendall(b"SSH-2.0-test\r\n")
                connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10)


@pytest.mark.parametrize(
    "answer",
    [
        raising(refused()),
        raising(refused("Bad authentication type; allowed types: ['password']")),
        raising(refused("saw EOF; the server says: Your account has expired")),
        "",
        'Please login as the user "debian" rather than the user "root".',
    ],
    ids=["refused", "passwords alone", "expired", "no shell", "root"],
)
def test_refusal_after_the_end_of_cloud_init_is_final(answer: Any) -> None:
    machine = Scripted(boot_id=[answer])
    positions = iter(range(1000))
    machine.settled = lambda: next(positions)  # the console tells of each attempt
    with pytest.raises(PycloudlibTimeoutError, match="will not change, since its cloud-init has"):
        machine.wait(LIMIT)
    assert WAIT not in machine.asked


def test_refusal_names_what_it_was_and_what_to_do() -> None:
    machine = Scripted(boot_id=[raising(refused())])
    machine.settled = lambda: 0
    with pytest.raises(PycloudlibTimeoutError, match=r"key /k refused.*username=") as caught:
        machine.wait(LIMIT)
    assert isinstance(caught.value.__cause__, paramiko.AuthenticationException)


@pytest.mark.parametrize(
    "error",
    [
        refused(
            "saw EOF; the server says: System is going down. Unprivileged users are not "
            "permitted to log in anymore. For technical details, see pam_nologin(8)."
        ),
        refused("Authentication failed: transport shut down or saw EOF"),
        refused("Authentication timeout."),
        paramiko.SSHException("no existing session"),
        TimeoutError("no SSH banner within 2 s"),
    ],
    ids=["nologin", "cut off", "slow", "another", "no network"],
)
def test_what_may_pass_is_waited_out(error: Exception) -> None:
    machine = Scripted(boot_id=[raising(error)] * 4 + ["boot-1"])
    machine.settled = lambda: 0
    machine.wait(LIMIT)
    assert machine.asked[-1] == WAIT


def test_refusal_before_the_end_of_cloud_init_is_waited_out() -> None:
    machine = Scripted(boot_id=[raising(refused())] * 3 + ["", "", "boot-1"])
    machine.wait(LIMIT)
    assert machine.asked[-1] == WAIT


def test_refusal_before_another_boot_is_waited_out() -> None:
    machine = Scripted(boot_id=[raising(refused())] * 4 + ["boot-1"])
    # It has ended when first refused; then the guest boots anew.
    ends = iter([0, None, 0, None, 0])
    machine.settled = lambda: next(ends)
    machine.wait(LIMIT)
    assert machine.asked[-1] == WAIT


def test_server_that_is_not_there_is_waited_for_as_long_as_something_happens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(readiness, "_SERVER_GRACE", 0.5)
    closed = raising(ConnectionError("the connection was closed before SSH's banner"))
    machine = Scripted(boot_id=[closed] * 8 + ["boot-1"])
    positions = iter(range(1000))
    machine.settled = lambda: next(positions)
    machine.wait(LIMIT)

    machine = Scripted(boot_id=[closed])
    machine.settled = lambda: 5
    with pytest.raises(PycloudlibTimeoutError, match=r"will not change.*closed before SSH"):
        machine.wait(LIMIT)
