"""Running machines are saved and go on; whatever goes wrong, exactly one QEMU is the machine."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pycloudlib import Qemu
from pycloudlib.deadline import Deadline
from pycloudlib.errors import CloudError, InstanceNotFoundError
from pycloudlib.qemu import checkpoint, handover, layers, memory, recovery, savedmachine
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.layers import chain
from pycloudlib.qemu.machine import MachineEndedError, State
from pycloudlib.qemu.memory import Memory, find_shared_memory
from pycloudlib.qemu.process import QemuProcess
from pycloudlib.qemu.qmp import QmpSession
from pycloudlib.qemu.running import RunningQemu
from tests.qemu.conftest import CloudMaker
from tests.qemu.saved import (
    SMALL,
    accepts,
    alive,
    becomes,
    descriptors,
    hurry,
    mode,
    qemus,
    run,
    runs,
    save,
)

pytestmark = pytest.mark.qemu


def names_in(directory: Path) -> set[str]:
    """List an instance's files, but for locks."""
    return {file.name for file in directory.iterdir() if file.suffix != ".lock"}


def test_saved_machine_goes_on_as_the_same_one(running: QemuInstance) -> None:
    before, pid = (running.id, running.port, running.telnet_port), running.machine.pid
    save(running)
    assert (running.id, running.port, running.telnet_port) == before
    assert running.machine.pid != pid
    assert not alive(pid)
    assert runs(running)


def test_its_own_directory_has_what_it_had(running: QemuInstance) -> None:
    before = names_in(running.instance_dir)
    save(running)
    save(running)
    assert names_in(running.instance_dir) == before


def test_saved_files_are_their_owners_alone(running: QemuInstance) -> None:
    before = os.umask(0)
    try:
        saved = save(running)
    finally:
        os.umask(before)
    assert mode(saved.directory) == 0o700
    secret = {"memory", "state", "saved.json", "seed.iso", "known_hosts"}
    assert secret <= {file.name for file in saved.directory.iterdir()}
    assert {file.name for file in saved.directory.iterdir() if mode(file) & 0o077} <= {
        "id_ed25519.pub"
    }
    assert mode(saved.image) == 0o600


def test_memory_is_sparse_and_of_the_machines_size(running: QemuInstance) -> None:
    facts = save(running).memory.stat()
    assert facts.st_size == running.machine.spec.memory_kib << 10
    assert facts.st_blocks * 512 < facts.st_size / 2


def test_saved_machine_is_found_again_as_it_was(running: QemuInstance) -> None:
    saved = save(running)
    assert savedmachine.find(saved.image) == saved
    assert saved.spec == running.machine.spec
    assert saved.find_obstacle(saved.host) is None


def test_image_of_a_disk_alone_is_no_saved_machine(tiny_image: Path) -> None:
    assert savedmachine.find(tiny_image) is None


def test_machine_is_saved_again_and_again(running: QemuInstance) -> None:
    """Often enough for its layers to be merged; nothing is left of all the hand-overs."""
    save(running)
    running.machine.execute("query-name")
    before = (descriptors(), threading.active_count())
    for _ in range(layers.MAXIMUM_DEPTH + 4):
        saved = save(running)
        assert len(chain(running.instance_path)) <= layers.MAXIMUM_DEPTH + 3
        assert running.machine.state is State.RUNNING
    assert runs(running)
    assert saved.image.stat().st_ino == chain(running.instance_path)[1].stat().st_ino
    running.machine.execute("query-name")
    gc.collect()
    assert becomes(lambda: descriptors() <= before[0] + 2)
    assert becomes(lambda: threading.active_count() <= before[1])


def test_another_handle_goes_on_working(cloud: Qemu, running: QemuInstance) -> None:
    other = cloud.get_instance(running.id)
    assert other.machine.execute("query-status")["status"] == "running"
    ended: list[bool] = []
    waiting = threading.Thread(
        target=lambda: ended.append(other.machine.wait_for_end(Deadline.after(600))), daemon=True
    )
    waiting.start()
    save(running)
    save(running)
    assert becomes(lambda: other.machine.pid == running.machine.pid)
    assert runs(other)
    assert waiting.is_alive()
    running.machine.kill()
    waiting.join(60)
    assert ended == [True]
    assert other.machine.state is State.OFF


def test_another_handle_can_save_it(cloud: Qemu, running: QemuInstance) -> None:
    other = cloud.get_instance(running.id)
    save(other)
    assert becomes(lambda: running.machine.pid == other.machine.pid)
    save(running)
    assert becomes(lambda: running.machine.pid == other.machine.pid)
    assert runs(running)
    assert runs(other)


def test_another_handle_can_merge_its_layers(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "MAXIMUM_DEPTH", 2)
    for _ in range(4):
        save(hurry(cloud.get_instance(running.id)))
    assert len(chain(running.instance_path)) <= 5
    assert runs(running)


def test_waiting_for_its_end_outlasts_a_save(running: QemuInstance) -> None:
    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(running.machine.wait_for_end, Deadline.after(600))
        save(running)
        assert not ended.done()
        running.machine.kill()
        assert ended.result(60)


def test_two_threads_can_save_it_at_once(running: QemuInstance) -> None:
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda name: save(running, name), ["first", "second"])
    assert runs(running)
    for saved in (first, second):
        assert saved.find_obstacle(saved.host) is None


def test_machine_that_is_off_is_not_saved(cloud: Qemu, running: QemuInstance) -> None:
    running.machine.kill()
    before = names_in(running.instance_dir)
    with pytest.raises(MachineEndedError, match="not running"):
        cloud.snapshot(running, memory=True)
    assert running.machine.state is State.OFF
    assert names_in(running.instance_dir) == before
    assert list(cloud.parent_dir.glob("snapshots/*")) == []


def test_deleted_machine_is_not_saved(cloud: Qemu, running: QemuInstance) -> None:
    assert running.delete() == []
    with pytest.raises(InstanceNotFoundError, match=running.name):
        cloud.snapshot(running, memory=True)


def test_paused_machine_is_not_saved_and_stays_paused(running: QemuInstance) -> None:
    running.machine.execute("stop")
    assert becomes(lambda: running.machine.state is State.PAUSED)
    with pytest.raises(CloudError, match="is paused"):
        save(running)
    assert running.machine.execute("query-status")["status"] == "paused"
    running.machine.execute("cont")
    assert becomes(lambda: running.machine.state is State.RUNNING)


def test_saved_machine_is_switched_off_and_on_as_before(running: QemuInstance) -> None:
    save(running)
    running.machine.kill()
    running.start(wait=False)
    assert runs(running)
    save(running)
    assert runs(running)


def test_memory_of_a_machine_that_boots_can_be_saved_at_once(running: QemuInstance) -> None:
    pid = running.machine.pid
    assert pid is not None
    found = find_shared_memory(pid)
    assert found is not None
    assert found.stat().st_size == running.machine.spec.memory_kib << 10


def test_machine_in_other_memory_is_moved_first(
    running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.machine.kill()
    monkeypatch.setattr("pycloudlib.qemu.machine.choose_memory", lambda _accelerator: Memory())
    running.start(wait=False)
    pid = running.machine.pid
    assert pid is not None
    assert find_shared_memory(pid) is None
    saved = save(running)
    assert runs(running)
    # What the boot sector is loaded to by the firmware: so the memory is really this machine's.
    with saved.memory.open("rb") as file:
        file.seek(0x7C00)
        assert file.read(4) == b"\xfa\xf4\xeb\xfd"


def test_snapshot_is_kept_beyond_the_cloud(
    make_cloud: CloudMaker, tiny_image: Path, tmp_path: Path
) -> None:
    target = tmp_path / "kept.img"
    cloud = make_cloud("first")
    assert cloud.snapshot(run(cloud, tiny_image), memory=True, path=target) == str(target)
    assert cloud.created_images == []
    assert cloud.clean() == []
    tiny_image.unlink()
    assert mode(savedmachine.directory_of(target)) == 0o700
    copy = make_cloud("second").launch(str(target))
    assert runs(copy)
    assert chain(copy.instance_path) == [copy.instance_path, target]
    key = copy.key_pair.private_key_path
    assert key is not None
    assert Path(key).exists()


@pytest.mark.parametrize("taken", ["kept.img", "kept.img.live"])
def test_snapshot_refuses_a_path_that_is_taken(
    cloud: Qemu, running: QemuInstance, tmp_path: Path, taken: str
) -> None:
    (tmp_path / taken).mkdir()
    with pytest.raises(FileExistsError, match=taken):
        cloud.snapshot(running, memory=True, path=tmp_path / "kept.img")
    assert list((tmp_path / taken).iterdir()) == []
    assert len(list(tmp_path.glob("kept*"))) == 1
    assert list(cloud.parent_dir.glob("snapshots/*")) == []
    assert runs(running)


def test_path_is_for_saved_machines(cloud: Qemu, running: QemuInstance, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="memory=True"):
        cloud.snapshot(running, path=tmp_path / "kept.img")
    assert runs(running)


# What can go wrong. The machine runs on where it was, on its disk, and nothing is left over.


class Before:
    """A machine before something goes wrong."""

    def __init__(self, cloud: Qemu, instance: QemuInstance) -> None:
        self._cloud = cloud
        self._instance = instance
        self._facts = self._look()

    def _look(self) -> tuple[object, ...]:
        return (
            self._instance.machine.pid,
            self._instance.instance_path.stat().st_ino,
            chain(self._instance.instance_path),
            names_in(self._instance.instance_dir),
            list(self._cloud.parent_dir.glob("snapshots/*")),
            list(self._cloud.parent_dir.glob("layers/*.qcow2")),
        )

    def check(self) -> None:
        assert self._look() == self._facts
        assert runs(self._instance)


def test_successor_that_refuses_leaves_the_machine_where_it_was(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Before(cloud, running)

    def refuse(_qemu: RunningQemu | QmpSession, *, with_memory: bool) -> None:
        raise CloudError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(handover, "_set_capabilities", refuse)
        with pytest.raises(CloudError, match="refused"):
            save(running)
    before.check()
    save(running)
    assert runs(running)


def test_successor_that_disagrees_leaves_the_machine_where_it_was(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told that the state holds the memory, and it does not."""
    before = Before(cloud, running)
    agree = handover._set_capabilities

    def disagree(qemu: RunningQemu | QmpSession, *, with_memory: bool) -> None:
        agree(qemu, with_memory=isinstance(qemu, RunningQemu) or with_memory)

    with monkeypatch.context() as patch:
        patch.setattr(handover, "_set_capabilities", disagree)
        with pytest.raises(CloudError):
            save(running)
    before.check()
    save(running)
    assert runs(running)


def test_successor_that_dies_leaves_the_machine_where_it_was(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Before(cloud, running)
    receive = handover.receive

    def die(qemu: RunningQemu, memory: Memory, descriptor: int) -> None:
        receive(qemu, memory, descriptor)
        os.kill(qemu.process.identity.pid, signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(handover, "receive", die)
        with pytest.raises(CloudError, match="SIGKILL"):
            save(running)
    before.check()
    save(running)
    assert runs(running)


def test_successor_that_dies_when_the_state_has_gone_leaves_the_machine_where_it_was(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Before(cloud, running)
    wait = handover.wait_for_state

    def die(qemu: RunningQemu, deadline: Deadline) -> None:
        wait(qemu, deadline)
        os.kill(qemu.process.identity.pid, signal.SIGKILL)
        raise CloudError("died")

    with monkeypatch.context() as patch:
        patch.setattr(handover, "wait_for_state", die)
        with pytest.raises(CloudError, match="died"):
            save(running)
    before.check()
    save(running)
    assert runs(running)


# A matter of milliseconds, so one try shows little.
@pytest.mark.parametrize("tries", [5, pytest.param(50, marks=pytest.mark.thorough)])
def test_machine_can_be_saved_whenever_a_successor_died(
    tries: int, cloud: Qemu, tiny_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the guest stands still, when its disk has been given up already."""
    receive = handover.receive

    def die(qemu: RunningQemu, memory: Memory, descriptor: int) -> None:
        receive(qemu, memory, descriptor)
        os.kill(qemu.process.identity.pid, signal.SIGKILL)

    for _ in range(tries):
        running = run(cloud, tiny_image)
        with monkeypatch.context() as patch:
            patch.setattr(handover, "receive", die)
            with pytest.raises(CloudError):
                save(running)
        save(running)
        assert runs(running)
        assert running.delete() == []


def test_state_that_cannot_be_kept_leaves_the_machine_where_it_was(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Before(cloud, running)

    def fail(_pump: object) -> None:
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(handover._Pump, "result", fail)
        with pytest.raises(OSError, match="no room"):
            save(running)
    before.check()


def test_memory_that_cannot_be_kept_leaves_no_image(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_memory: int, _target: Path, *, release: bool = False) -> None:
        raise CloudError("No room")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "keep", full)
        with pytest.raises(CloudError, match="No room"):
            save(running)
    assert runs(running)
    assert list(cloud.parent_dir.glob("snapshots/*")) == []
    assert all(file.exists() for file in chain(running.instance_path))
    save(running)
    assert runs(running)


def test_lost_ssh_port_leaves_the_machine_on_a_disk_that_is_there(
    running: QemuInstance, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By then the new QEMU is the machine, and writes to the new overlay."""
    monkeypatch.setattr(recovery, "ssh_rule", lambda _spec: "tcp:127.0.0.1:nowhere-:22")
    save(running)
    assert "has lost its SSH port" in caplog.text
    pid = running.machine.pid
    assert qemus(running.instance_dir) == [pid]
    assert writes_to(pid, running.instance_path)
    assert all(file.exists() for file in chain(running.instance_path))


def writes_to(pid: int | None, file: Path) -> bool:
    """Say whether a process writes to just this file, and not to one that had its name before."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            flags = Path(f"/proc/{pid}/fdinfo/{link.name}").read_text().split()[3]
            if link.stat().st_ino == file.stat().st_ino and int(flags, 8) & os.O_RDWR:
                return True
        except OSError:
            continue
    return False


def test_new_qemu_writes_to_the_new_disk(running: QemuInstance) -> None:
    save(running)
    assert writes_to(running.machine.pid, running.instance_path)


@pytest.mark.parametrize("moment", ["birth", "born", "ready", "moving", "moved"])
def test_ctrl_c_at_any_moment_of_a_hand_over_leaves_one_qemu(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The signal really comes, while a QEMU is born or takes the state in another thread."""
    start, receive, wait = QemuProcess.start, handover.receive, handover.wait_for_state

    def interrupt(now: str) -> None:
        if now == moment:
            os.kill(os.getpid(), signal.SIGINT)

    def start_interrupted(argv: Sequence[str], **options: Any) -> QemuProcess:
        interrupt("birth")
        process = start(argv, **options)
        interrupt("born")
        return process

    def receive_interrupted(qemu: RunningQemu, memory: Memory, descriptor: int) -> None:
        receive(qemu, memory, descriptor)
        interrupt("ready")

    def wait_interrupted(qemu: RunningQemu, deadline: Deadline) -> None:
        interrupt("moving")
        wait(qemu, deadline)
        interrupt("moved")

    with monkeypatch.context() as patch:
        patch.setattr(QemuProcess, "start", start_interrupted)
        patch.setattr(handover, "receive", receive_interrupted)
        patch.setattr(handover, "wait_for_state", wait_interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(running)
    time.sleep(0.2)  # one that was just born has no command line yet
    left, pid = qemus(running.instance_dir), running.machine.pid
    for other in set(left) - {pid}:
        os.kill(other, signal.SIGKILL)
    assert left == [pid]
    assert writes_to(pid, running.instance_path)
    assert all(file.exists() for file in chain(running.instance_path))
    assert list(cloud.parent_dir.glob("snapshots/*")) == []
    save(running)
    assert runs(running)


def test_freezing_that_fails_gives_the_disk_back(running: QemuInstance) -> None:
    store = layers.LayerStore(running.instance_dir.parent)
    disk = running.instance_path
    before = disk.stat().st_ino

    def fail() -> None:
        with store.freezing(disk, "broken.img", in_use=True) as image:
            assert image.stat().st_ino == before
            assert disk.stat().st_ino != before
            assert chain(disk)[1].stat().st_ino == before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert disk.stat().st_ino == before
    assert list(store.snapshots.iterdir()) == []
    assert list(store.layers.glob("*.qcow2")) == []
    assert runs(running)


def test_users_of_a_saved_image_are_named(cloud: Qemu, running: QemuInstance) -> None:
    saved = save(running)
    assert layers.find_users(saved.image, cloud.working_dir) == []
    copy = cloud.launch(str(saved.image))
    assert layers.find_users(saved.image, cloud.working_dir) == [copy.name]
    assert layers.too_deep(copy.instance_path) is None


def test_disk_is_too_deep_by_the_number_of_its_layers(
    running: QemuInstance, tiny_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(running)
    save(running)
    monkeypatch.setattr(layers, "MAXIMUM_DEPTH", 2)
    assert layers.too_deep(running.instance_path) == tiny_image
    monkeypatch.setattr(layers, "MAXIMUM_DEPTH", 3)
    assert layers.too_deep(running.instance_path) is None


def test_ports_are_free_when_a_saved_machine_is_deleted(running: QemuInstance) -> None:
    save(running)
    assert running.delete() == []
    assert not accepts(running.port)
    assert not accepts(running.telnet_port)
    assert qemus(running.instance_dir) == []


def test_size_is_the_one_asked_for(running: QemuInstance) -> None:
    assert str(save(running).spec.instance_type) == SMALL
    assert memory.SHARED.shared
