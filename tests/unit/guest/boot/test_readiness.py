"""Waiting until a machine is ready, over refusals, shutdowns and boots of the guest's own."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import paramiko
import pytest

from pycloudlib.errors import PycloudlibTimeoutError
from pycloudlib.guest.access import ssh
from pycloudlib.guest.boot.cloudinit import BRIEF_WAIT_COMMAND, GOING_DOWN_COMMAND, WAIT_COMMAND
from pycloudlib.result import Result
from tests.unit.public.test_base_classes import Instance

BOOT_ID = "boot id"
WAIT = "wait"
BRIEF_WAIT = "brief wait"
GOING_DOWN = "going down"
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
        seen: What it says that was seen to be warned of.
    """

    def __init__(self, **answers: Sequence[Callable[[], Result] | str]) -> None:
        super().__init__()
        defaults: dict[str, list[Callable[[], Result] | str]] = {
            BOOT_ID: ["boot-1"],
            WAIT: [FINISHED],
            BRIEF_WAIT: [FINISHED],
            GOING_DOWN: [raising(paramiko.SSHException("the connection ended"))],
        }
        given = {name.replace("_", " "): list(answer) for name, answer in answers.items()}
        self.answers = defaults | given
        self.asked: list[str] = []
        self.settled: Callable[[], object] = lambda: None
        self.seen: list[str] = []

    def _ssh(  # type: ignore[override]
        self, command: Sequence[str], stdin: Any = None, **kwargs: Any
    ) -> Result:
        kinds = {
            WAIT_COMMAND: WAIT,
            BRIEF_WAIT_COMMAND: BRIEF_WAIT,
            GOING_DOWN_COMMAND: GOING_DOWN,
        }
        kind = kinds.get(tuple(command), BOOT_ID)
        self.asked.append(kind)
        answers = self.answers[kind]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return Result(answer) if isinstance(answer, str) else answer()

    _server_grace = 0.5

    def _has_settled(self) -> object:
        return self.settled()

    def _seen_warnings(self) -> Sequence[str]:
        return self.seen


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


def going_down(mode: str, seconds: int = 0) -> str:
    return f"{FINISHED}\n== shutdown\n{mode} {seconds}\n"


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


def test_server_that_is_not_there_is_waited_for_as_long_as_something_happens() -> None:
    closed = raising(ConnectionError("the connection was closed before SSH's banner"))
    machine = Scripted(boot_id=[closed] * 8 + ["boot-1"])
    positions = iter(range(1000))
    machine.settled = lambda: next(positions)
    machine.wait(LIMIT)

    machine = Scripted(boot_id=[closed])
    machine.settled = lambda: 5
    with pytest.raises(PycloudlibTimeoutError, match=r"will not change.*closed before SSH"):
        machine.wait(LIMIT)


@pytest.mark.parametrize("mode", ["reboot", "kexec", "soft-reboot", "shutdown"])
def test_reboot_under_way_is_followed(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    machine = Scripted(wait=[going_down(mode), FINISHED])
    with caplog.at_level(logging.INFO):
        machine.wait(LIMIT)
    assert machine.asked == [BOOT_ID, WAIT, GOING_DOWN, BOOT_ID, WAIT]
    assert f"goes down by itself ({mode})" in caplog.text


def test_reboot_that_is_announced_is_followed_within_the_limit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine = Scripted(wait=[going_down("reboot", 10), FINISHED])
    machine.wait(LIMIT)
    assert machine.asked == [BOOT_ID, WAIT, GOING_DOWN, BOOT_ID, WAIT]

    machine = Scripted(wait=[going_down("reboot", 3600), FINISHED])
    with caplog.at_level(logging.WARNING):
        machine.wait(LIMIT)
    assert machine.asked == [BOOT_ID, WAIT]
    assert "announced to go down (reboot) in 3600 s" in caplog.text


def test_reboot_that_is_called_off_is_waited_for_no_more() -> None:
    machine = Scripted(wait=[going_down("reboot", 10), FINISHED], going_down=[""])
    machine.wait(LIMIT)
    assert machine.asked == [BOOT_ID, WAIT, GOING_DOWN, BOOT_ID, WAIT]


def test_power_off_that_is_announced_leaves_the_machine_ready(
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine = Scripted(wait=[going_down("poweroff", 10)])
    with caplog.at_level(logging.WARNING):
        machine.wait(LIMIT)
    assert machine.asked == [BOOT_ID, WAIT]
    assert "announced to go down (poweroff) in 10 s" in caplog.text


def test_power_off_under_way_ends_the_wait_with_what_happened() -> None:
    class Off(Scripted):
        def _check_alive(self) -> None:
            if GOING_DOWN in self.asked:
                raise PycloudlibTimeoutError("it has powered itself off")

    machine = Off(wait=[going_down("poweroff")])
    with pytest.raises(PycloudlibTimeoutError, match="powered itself off"):
        machine.wait(LIMIT)


def test_guest_that_never_goes_down_is_told() -> None:
    machine = Scripted(
        wait=[going_down("reboot")], going_down=[raising(PycloudlibTimeoutError("too long"))]
    )
    with pytest.raises(PycloudlibTimeoutError, match="minimal did not go down within 30 s"):
        machine.wait(LIMIT)


def test_boot_that_was_followed_before_is_asked_about_briefly() -> None:
    class Copy(Scripted):
        def _was_followed(self) -> bool:
            return True

    machine = Copy()
    machine.wait(LIMIT)
    assert machine.asked == [BOOT_ID, BRIEF_WAIT]


def test_warnings_are_logged_once_each(caplog: pytest.LogCaptureFixture) -> None:
    stage = {"recoverable_errors": {"WARNING": ["of the status"]}}
    status = json.dumps({"v1": {"init": stage, "modules-final": stage}})
    log = "2026-11-30 03:20:49,289 - util.py[WARNING]: of the log\nand more\n"
    both = "2026-11-30 03:20:49,289 - util.py[WARNING]: of the status\n"
    machine = Scripted(wait=[f"finished\n{status}\n== log\n{log}{both}"])
    machine.seen = ["WARNING: of the console", "WARNING: of the log", "WARNING: of the status"]
    with caplog.at_level(logging.WARNING):
        machine.wait(LIMIT)
    assert [record.getMessage() for record in caplog.records] == [
        "cloud-init on minimal: WARNING: of the status",
        "cloud-init on minimal: WARNING: of the log\nand more",
        "cloud-init on minimal: WARNING: of the console",
    ]
