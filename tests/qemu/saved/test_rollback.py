"""A machine goes back to where it was saved: as the same one, on a disk of that moment."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pycloudlib import Qemu
from pycloudlib._base.deadline import Deadline
from pycloudlib.errors import CloudError, ImageNotFoundError, InstanceNotFoundError
from pycloudlib.guest.helper import FixUp, NewKey
from pycloudlib.qemu.disk.layers import chain
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.saved import devicestate, restoring
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.vm.process import QemuProcess
from pycloudlib.qemu.vm.running import RunningQemu, State
from tests.qemu.conftest import CloudMaker
from tests.qemu.machines import (
    alive,
    becomes,
    descriptors,
    hurry,
    qemus,
    run,
    runs,
    save,
    touch,
)

pytestmark = pytest.mark.qemu


def files(instance: QemuInstance) -> set[str]:
    """List an instance's files, but for locks and for what a machine has while it is on."""
    left_out = ("fix-up.json", "base-state")
    return {
        file.name
        for file in instance.instance_dir.iterdir()
        if file.suffix != ".lock" and file.name not in left_out
    }


def test_it_is_the_same_machine_on_the_disk_of_then(
    cloud: Qemu, running: QemuInstance, saved: SavedMachine
) -> None:
    later = save(running)
    before, pid, had = running.id, running.machine.pid, files(running)
    running.rollback(str(saved.image))
    assert running.id == before
    assert running.machine.pid != pid
    assert not alive(pid)
    assert runs(running)
    assert chain(running.instance_path)[1] == saved.image
    assert files(running) == had
    assert later.image.exists()


def test_it_goes_back_as_often_as_wanted(running: QemuInstance, saved: SavedMachine) -> None:
    running.rollback(str(saved.image))
    gc.collect()
    before = (descriptors(), threading.active_count(), files(running))
    for _ in range(5):
        running.rollback(str(saved.image))
        assert running.machine.state is State.RUNNING
    assert runs(running)
    gc.collect()
    assert becomes(lambda: descriptors() <= before[0] + 2)
    assert becomes(lambda: threading.active_count() <= before[1])
    assert files(running) == before[2]


def test_it_goes_back_and_forth(running: QemuInstance) -> None:
    first, second = save(running), save(running)
    for saved in (first, second, first):
        running.rollback(str(saved.image))
        assert runs(running)
        assert chain(running.instance_path)[1] == saved.image


def test_layers_that_nobody_needs_any_more_go(cloud: Qemu, running: QemuInstance) -> None:
    saved = save(running)
    later = save(running)
    cloud.delete_image(str(later.image))
    running.rollback(str(saved.image))
    assert all(file.exists() for file in chain(running.instance_path))
    assert list(cloud.parent_dir.glob("layers/*.qcow2")) == []


def test_its_image_stays_while_it_is_built_on_it(
    cloud: Qemu, running: QemuInstance, saved: SavedMachine
) -> None:
    running.rollback(str(saved.image))
    with pytest.raises(CloudError, match=running.name):
        cloud.delete_image(str(saved.image))
    assert saved.directory.exists()


def test_it_can_be_saved_afterwards(cloud: Qemu, running: QemuInstance) -> None:
    running.rollback(str(save(running).image))
    again = save(running)
    assert runs(running)
    running.rollback(str(again.image))
    assert runs(running)
    assert runs(cloud.launch(str(again.image)))


def test_machine_that_is_off_goes_on_from_there(running: QemuInstance, saved: SavedMachine) -> None:
    running.machine.kill()
    running.rollback(str(saved.image))
    assert runs(running)


def test_copy_goes_back_to_what_it_was_launched_from(cloud: Qemu, saved: SavedMachine) -> None:
    copy = cloud.launch(str(saved.image))
    before = copy.id
    copy.rollback(str(saved.image))
    assert copy.id == before
    assert runs(copy)


def test_copy_is_put_right_again_as_it_was(cloud: Qemu, saved: SavedMachine) -> None:
    copy = cloud.launch(str(saved.image), fresh_identity=True)
    rundir = copy.machine.rundir
    first = rundir.fix_up.read_text()
    copy.rollback(str(saved.image))
    assert rundir.fix_up.read_text() == first
    rundir.fix_up.replace(rundir.fixed_up)
    copy.rollback(str(saved.image))
    assert rundir.fix_up.read_text() == first
    assert not rundir.fixed_up.exists()


def test_copy_goes_back_to_where_it_was_put_right_already(cloud: Qemu, saved: SavedMachine) -> None:
    """Saved when it was somebody of its own: its new key is in the memory that is gone back to."""
    copy = cloud.launch(str(saved.image))
    rundir = copy.machine.rundir
    rundir.fixed_up.write_text(FixUp(None, NewKey("ubuntu", "old", "new")).to_json())
    rundir.fix_up.unlink()
    own = save(copy)
    copy.rollback(str(own.image))
    assert runs(copy)
    assert json.loads(rundir.fix_up.read_text())["identity"] is None


def test_another_handle_follows(cloud: Qemu, running: QemuInstance, saved: SavedMachine) -> None:
    other = cloud.get_instance(running.id)
    assert other.machine.pid == running.machine.pid
    running.rollback(str(saved.image))
    assert becomes(lambda: other.machine.pid == running.machine.pid)
    assert runs(other)
    other.rollback(str(saved.image))
    assert becomes(lambda: running.machine.pid == other.machine.pid)
    assert runs(running)


class Before:
    """A machine before a rollback that is refused."""

    def __init__(self, instance: QemuInstance) -> None:
        self._instance = instance
        self._facts = self._look()

    def _look(self) -> tuple[object, ...]:
        return (
            self._instance.machine.pid,
            self._instance.instance_path.stat().st_ino,
            chain(self._instance.instance_path),
            sorted(file.name for file in self._instance.instance_dir.iterdir()),
        )

    def check(self) -> None:
        assert self._look() == self._facts
        assert runs(self._instance)


def test_image_of_another_machine_is_refused(
    cloud: Qemu, running: QemuInstance, tiny_image: Path
) -> None:
    other = save(run(cloud, tiny_image))
    before = Before(running)
    with pytest.raises(CloudError, match="that is another machine"):
        running.rollback(str(other.image))
    before.check()


def test_image_of_a_disk_is_refused(running: QemuInstance, tiny_image: Path) -> None:
    before = Before(running)
    with pytest.raises(CloudError, match="not a saved machine"):
        running.rollback(str(tiny_image))
    before.check()


def test_image_that_is_not_there_is_refused(
    cloud: Qemu, running: QemuInstance, saved: SavedMachine
) -> None:
    cloud.delete_image(str(saved.image))
    before = Before(running)
    with pytest.raises(ImageNotFoundError):
        running.rollback(str(saved.image))
    before.check()


def test_damaged_one_is_refused(running: QemuInstance, saved: SavedMachine) -> None:
    touch(saved.memory)
    before = Before(running)
    with pytest.raises(CloudError, match="memory was changed since"):
        running.rollback(str(saved.image))
    before.check()


def test_one_of_another_qemu_is_refused(
    running: QemuInstance, saved: SavedMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pycloudlib.qemu.state.savedmachine.host_fingerprint", lambda *_: "another")
    before = Before(running)
    with pytest.raises(CloudError, match="another QEMU"):
        running.rollback(str(saved.image))
    before.check()


def test_deleted_machine_does_not_come_back(running: QemuInstance, saved: SavedMachine) -> None:
    assert running.delete() == []
    with pytest.raises(InstanceNotFoundError):
        running.rollback(str(saved.image))
    assert not running.instance_dir.exists()


def test_other_places_and_names_are_no_other_machine(
    running: QemuInstance, saved: SavedMachine
) -> None:
    moved = dataclasses.replace(running.machine.spec, name="x", ssh_port=1, telnet_port=2)
    restoring.check_is_of(saved, moved)
    with pytest.raises(CloudError, match="its mac is"):
        restoring.check_is_of(saved, dataclasses.replace(moved, mac="52:54:00:00:00:00"))


def test_failure_leaves_the_machine_off_and_its_disk_as_it_was(
    running: QemuInstance, saved: SavedMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, had = running.instance_path.stat().st_ino, files(running)

    def fail(_qemu: RunningQemu, _deadline: Deadline) -> None:
        raise CloudError("it does not fit")

    with monkeypatch.context() as patch:
        patch.setattr(restoring, "wait_for_state", fail)
        with pytest.raises(CloudError, match="does not fit"):
            running.rollback(str(saved.image))
    assert running.machine.state is State.OFF
    assert qemus(running.instance_dir) == []
    assert running.instance_path.stat().st_ino == before
    assert files(running) == had
    running.start(wait=False)
    assert runs(running)


@pytest.mark.parametrize("moment", ["birth", "born", "moved"])
def test_ctrl_c_in_the_middle_comes_when_it_is_done(
    running: QemuInstance,
    saved: SavedMachine,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    """The signal really comes, while QEMU is born or takes the state in another thread."""
    start, wait = QemuProcess.start, devicestate.wait_for_state
    had = files(running)

    def interrupt(now: str) -> None:
        if now == moment:
            os.kill(os.getpid(), signal.SIGINT)

    def start_interrupted(argv: Sequence[str], **options: Any) -> QemuProcess:
        interrupt("birth")
        process = start(argv, **options)
        interrupt("born")
        return process

    def wait_interrupted(qemu: RunningQemu, deadline: Deadline) -> None:
        wait(qemu, deadline)
        interrupt("moved")

    with monkeypatch.context() as patch:
        patch.setattr(QemuProcess, "start", start_interrupted)
        patch.setattr(restoring, "wait_for_state", wait_interrupted)
        with pytest.raises(KeyboardInterrupt):
            running.rollback(str(saved.image))
    assert qemus(running.instance_dir) == [running.machine.pid]
    assert files(running) - had <= {"fix-up.json"}
    assert chain(running.instance_path)[1] == saved.image
    assert runs(running)


def test_ctrl_c_before_it_ends_the_machine_changes_nothing(
    running: QemuInstance, saved: SavedMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Before(running)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running.machine, "kill", interrupt)
        with pytest.raises(KeyboardInterrupt):
            running.rollback(str(saved.image))
    before.check()


def test_it_goes_back_to_what_was_kept_elsewhere(
    make_cloud: CloudMaker, tiny_image: Path, tmp_path: Path
) -> None:
    cloud = make_cloud()
    running = run(cloud, tiny_image)
    kept = cloud.snapshot(running, memory=True, path=tmp_path / "kept.img")
    hurry(running).rollback(kept)
    assert runs(running)
    assert chain(running.instance_path) == [running.instance_path, Path(kept)]
