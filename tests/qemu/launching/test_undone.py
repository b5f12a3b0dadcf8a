"""What is made is known to somebody at any moment: what fails or is interrupted leaves nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pycloudlib import Qemu
from pycloudlib.errors import CloudError
from pycloudlib.qemu.host import ownership
from pycloudlib.qemu.host.accelerator import find_features
from pycloudlib.qemu.host.ownership import Orphans, Ownership, claim
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.launching import beginning
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.vm import process
from pycloudlib.qemu.vm.helper import FixUps
from pycloudlib.qemu.vm.qmp import LoopThread
from tests.qemu.machines import SMALL, descriptors, qemus

pytestmark = pytest.mark.qemu


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("moment", ["made", "owned", "named"])
def test_directory_whose_making_is_interrupted_is_removed(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes after it is made, and before the launch has said who removes it."""
    write, register = Ownership.write, ownership.register

    def write_interrupted(self: Ownership, owned: Path) -> None:
        if moment == "made":
            interrupt()
        write(self, owned)
        if moment == "owned":
            interrupt()

    def register_interrupted(owned: Path) -> None:
        register(owned)
        if moment == "named":
            interrupt()

    monkeypatch.setattr(Ownership, "write", write_interrupted)
    monkeypatch.setattr(ownership, "register", register_interrupted)

    def make() -> None:
        with contextlib.ExitStack() as stack:
            beginning.create_run_directory(tmp_path / "cloud" / "vm", stack, Orphans.REAP)
            stack.pop_all()

    with pytest.raises(KeyboardInterrupt):
        make()
    assert list(tmp_path.iterdir()) == []


def test_machine_that_has_just_started_is_known_or_ended(
    cloud: Qemu, tiny_image: Path, working_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes where it is handed on from who has started it to who launches it."""
    pop_all = contextlib.ExitStack.pop_all

    def pop_interrupted(self: contextlib.ExitStack) -> Any:
        popped = pop_all(self)
        if sys._getframe(1).f_code.co_name == "start_machine":
            raise KeyboardInterrupt
        return popped

    monkeypatch.setattr(contextlib.ExitStack, "pop_all", pop_interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        cloud.launch(str(tiny_image), SMALL, launch_args=["-S"])
    known = [cloud.get_instance(vm.id).machine.pid for vm in cloud.created_instances]
    left = set(qemus(working_dir)) - set(known)
    for pid in left:
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.mark.parametrize("what", ["thread", "pidfd", "identity"])
def test_qemu_that_cannot_be_watched_is_ended(
    what: str,
    cloud: Qemu,
    tiny_image: Path,
    working_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where the host has no more threads, or this program too many open files."""
    born: list[int] = []

    class Popen(process.subprocess.Popen):  # type: ignore[name-defined, misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            born.append(self.pid)

    def fail(*_arguments: object) -> None:
        if born:
            raise OSError(24, "Too many open files")
        pytest.fail("no QEMU was born")

    def no_thread() -> None:
        raise RuntimeError("can't start new thread")

    find_features(Path(cloud.qemu_binary))  # which is asked of QEMU once
    with monkeypatch.context() as patch:
        patch.setattr(process.subprocess, "Popen", Popen)  # type: ignore[attr-defined]
        if what == "thread":
            patch.setattr(LoopThread, "get", no_thread)
        elif what == "pidfd":
            real = os.pidfd_open
            patch.setattr(
                process.os,  # type: ignore[attr-defined]
                "pidfd_open",
                lambda pid: fail() if pid in born else real(pid),
            )
        else:
            find = process.ProcessIdentity.find  # type: ignore[attr-defined]
            patch.setattr(
                process.ProcessIdentity,  # type: ignore[attr-defined]
                "find",
                lambda pid: fail() if pid in born else find(pid),
            )
        with pytest.raises((OSError, RuntimeError, CloudError)):
            cloud.launch(str(tiny_image), SMALL, launch_args=["-S"])
    assert born
    assert qemus(working_dir) == []
    assert list(cloud.parent_dir.glob("t-*")) == []


def test_guardians_that_were_killed_leave_no_descriptor(cloud: Qemu, tiny_image: Path) -> None:
    ownership.environment(Orphans.REAP)
    before = descriptors()
    for _ in range(3):
        pid = ownership.find_guardian().pid
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ownership.environment(Orphans.REAP)
    assert descriptors() == before


def test_program_that_ends_leaves_what_another_has_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one takes it over in the moment between the look and the note of the end."""
    claim(tmp_path, Orphans.REAP_AFTER_CRASH)
    mine = Ownership.find(tmp_path)
    assert mine is not None
    process_one = process.ProcessIdentity(1, 1, mine.process.world)  # type: ignore[attr-defined]
    find = Ownership.find
    taking: list[threading.Thread] = []

    def take_over() -> None:
        with ownership.changing_record(tmp_path):
            Ownership(process_one, Orphans.REAP).write(tmp_path)

    def find_late(owned: Path) -> Ownership | None:
        found = find(owned)
        if not taking and owned == tmp_path:
            taking.append(threading.Thread(target=take_over))
            taking[0].start()
            taking[0].join(0.1)
        return found

    monkeypatch.setattr(Ownership, "find", find_late)
    ownership.leave_all()
    taking[0].join()
    assert find(tmp_path) == Ownership(process_one, Orphans.REAP)


def test_image_that_is_written_is_the_callers_though_the_clean_up_fails(
    cloud: Qemu,
    running: QemuInstance,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = savedmachine.delete

    def fail(image: Path) -> None:
        raise PermissionError(13, "Permission denied", str(image))

    target = tmp_path / "kept.img"
    monkeypatch.setattr(FixUps, "start_helper", lambda *_: False)
    with monkeypatch.context() as patch:
        patch.setattr(savedmachine, "delete", fail)
        assert cloud.snapshot(running, memory=True, path=target) == str(target)
    assert target.is_file()
    assert "stays until clean()" in caplog.text
    assert len(cloud.created_images) == 1, "clean() is to try again"
    real(target)
    with monkeypatch.context() as patch:
        patch.setattr(savedmachine, "delete", fail)
        (copy,) = running.fork(1)
    assert copy.delete() == []
