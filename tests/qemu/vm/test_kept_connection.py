"""The SSH connection that the command line keeps: it ends with what it leads to."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import paramiko
import pytest

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.files import write_private
from pycloudlib.guest import helper
from pycloudlib.guest.access.ssh import Endpoint
from pycloudlib.guest.helper import FixUp
from pycloudlib.key import generate_ed25519
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.vm.helper import FixUps
from pycloudlib.result import Result
from tests.qemu.machines import alive, becomes
from tests.unit.sshserver import ListeningServer

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("ssh") is None, reason="there is no ssh here"),
]


class _Pinned:
    def __init__(self, line: str) -> None:
        self._line = line

    def pinned(self) -> tuple[str, ...]:
        return (self._line,)

    def accepts(self, key_line: str, connection: object) -> bool:
        return False


@pytest.fixture
def keeper(running: QemuInstance, tmp_path: Path) -> Iterator[int]:
    """Keep a connection, to another server since the machine has none; give its process."""
    login, key = tmp_path / "login", tmp_path / "key"
    login.touch()
    key.write_text(generate_ed25519("test")[0])
    key.chmod(0o600)
    kept = dataclasses.replace(running.guest.keeper, login=str(login), behind=())

    def refuse() -> paramiko.SSHClient:
        raise AssertionError("the connection could not be kept")

    with ListeningServer(tmp_path) as server:
        endpoint = Endpoint("127.0.0.1", server.port, "me", str(key))
        kept.connect(endpoint, _Pinned(server.host_key), refuse, refuse, may_start=True).close()
        master = kept.find()
        assert master is not None
        pid = master.ask_pid(Deadline.after(10))
        master.close()
        try:
            yield pid
        finally:
            kept.end()


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(QemuInstance.delete, id="delete"),
        pytest.param(lambda machine: machine.guest.power_off(), id="power off"),
        pytest.param(lambda machine: machine.guest.forget(), id="reboot"),
    ],
)
def test_connection_that_is_kept_ends_with_the_guest(
    running: QemuInstance, keeper: int, act: Callable[[QemuInstance], object]
) -> None:
    assert alive(keeper)
    running.machine.execute("stop")  # so that it is not waited for

    act(running)

    assert becomes(lambda: not alive(keeper))


def test_connection_that_is_kept_ends_with_a_rollback(
    running: QemuInstance, saved: SavedMachine, keeper: int
) -> None:
    running.rollback(str(saved.image))

    assert becomes(lambda: not alive(keeper))


def test_copy_without_a_helper_is_fixed_up_before_its_connection_is_kept(
    running: QemuInstance,
) -> None:
    rundir = running.machine.rundir
    write_private(rundir.fix_up, FixUp().to_json())
    ran = list[str]()

    def execute(command: str, **_options: object) -> Result:
        ran.append(command)
        return Result(str(time.time()), "", 0)

    FixUps(running.guest.helper, execute, lambda: None).fix_up_before_use()

    assert ran == ["date +%s.%N", helper.once_command()]
    assert not rundir.fix_up.exists()
    assert rundir.fixed_up.exists()


def test_copy_that_cannot_be_fixed_up_is_used_all_the_same(
    running: QemuInstance, caplog: pytest.LogCaptureFixture
) -> None:
    write_private(running.machine.rundir.fix_up, "damaged")

    running.fix_up_before_use()

    assert "will be fixed up by wait(): " in caplog.text
