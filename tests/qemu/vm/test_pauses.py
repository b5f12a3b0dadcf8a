"""Machines that are paused: told early where nobody is about to resume them."""

from __future__ import annotations

import os
import signal
import socket
import time

import paramiko
import pytest

from pycloudlib._base.files import write_private
from pycloudlib.diagnosis import Cause
from pycloudlib.errors import PycloudlibTimeoutError
from pycloudlib.guest.helper import FixUp
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.vm import helper
from pycloudlib.qemu.vm.running import MachinePausedError, State
from tests.qemu.conftest import CloudMaker

pytestmark = pytest.mark.qemu

# Minutes: whatever takes so long hangs.
HANGS = 1.0


def told(caught: pytest.ExceptionInfo[MachinePausedError]) -> tuple[str, Cause]:
    diagnosis = caught.value.diagnosis
    assert diagnosis is not None
    return caught.value.status, diagnosis.cause


def test_machine_that_is_not_started_is_not_waited_for(unstarted: QemuInstance) -> None:
    unstarted.machine.pause_patience = 0.3
    with pytest.raises(MachinePausedError, match="status is 'prelaunch'") as caught:
        unstarted.wait(ready_timeout=HANGS)
    assert told(caught) == ("prelaunch", Cause.STANDS_STILL)


@pytest.mark.parametrize("ours", [True, False])
def test_machine_that_is_stopped_is_not_waited_for(
    running: QemuInstance, make_cloud: CloudMaker, ours: bool
) -> None:
    running.machine.execute("stop")
    instance = running if ours else make_cloud().get_instance(running.id)
    instance.machine.pause_patience = 0.3
    with pytest.raises(MachinePausedError) as caught:
        instance.wait(ready_timeout=HANGS)
    assert told(caught) == ("paused", Cause.STANDS_STILL)
    with pytest.raises(MachinePausedError):
        instance.wait_for_stop()


def test_machine_whose_memory_went_elsewhere_is_not_waited_for(
    running: QemuInstance,
) -> None:
    deadline = time.monotonic() + 60 * HANGS
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        running.machine.execute("migrate", {"uri": f"tcp:127.0.0.1:{port}"})
        with listener.accept()[0] as stream:
            while stream.recv(1 << 20):
                pass
    while running.machine.execute("query-status")["status"] != "postmigrate":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.machine.pause_patience = 0.3
    with pytest.raises(MachinePausedError) as caught:
        running.wait(ready_timeout=HANGS)
    assert told(caught) == ("postmigrate", Cause.STANDS_STILL)


def test_pause_of_a_moment_ends_no_wait(running: QemuInstance) -> None:
    """It counts how long the machine is paused at a time."""
    machine = running.machine
    machine.pause_patience = 30.0
    machine.execute("stop")
    machine.check_pause()
    machine.execute("cont")
    machine.pause_patience = 1e-9
    machine.check_pause()
    assert machine.state is State.RUNNING


def test_pause_under_the_power_lock_ends_no_wait(running: QemuInstance) -> None:
    """As saves and copies pause it, for as long as they need."""
    machine = running.machine
    machine.pause_patience = 1e-9
    machine.execute("stop")
    with machine.rundir.power_lock():
        machine.check_pause()
    machine.pause_patience = 30.0
    machine.check_pause()
    machine.pause_patience = 1e-9
    with pytest.raises(MachinePausedError):
        machine.check_pause()


def test_command_that_runs_is_not_ended_by_a_pause(running: QemuInstance) -> None:
    running.machine.pause_patience = 1e-9
    running.machine.execute("stop")
    running.check_answers()


def test_no_helper_is_started_on_a_port_that_is_in_use(
    running: QemuInstance, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What has it would be taken for the helper."""
    link = running.guest.helper
    look = link.chardev
    monkeypatch.setattr(link, "chardev", lambda limit: {**look(limit), "frontend-open": True})
    monkeypatch.setattr(helper, "RESTORE_LIMIT", 0.1)
    monkeypatch.setattr(helper, "RECOVER_LIMIT", 0.1)
    assert not running.guest.fixes.start_helper(running.username)
    assert "something else has its port" in caplog.text
    assert not link.expected


def test_qemu_that_stands_still_holds_up_no_limit(running: QemuInstance) -> None:
    """Neither of a command nor of a wait, by whichever way the guest is asked."""
    machine = running.machine
    write_private(machine.rundir.helper_mark, running.username)
    write_private(machine.rundir.fix_up, FixUp().to_json())
    pid = machine.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        with pytest.raises((PycloudlibTimeoutError, paramiko.SSHException)):
            running.execute("true", timeout=0.3)
        with pytest.raises(PycloudlibTimeoutError):
            running.wait(ready_timeout=0.3 / 60)
        assert time.monotonic() - begun < 25, "QEMU is given half a minute for each answer"
    finally:
        os.kill(pid, signal.SIGCONT)
    machine.rundir.helper_mark.unlink(missing_ok=True)
