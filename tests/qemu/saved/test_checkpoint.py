"""Running machines are saved and go on, in the same QEMU, whatever goes wrong."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pycloudlib import Qemu
from pycloudlib._base.deadline import Deadline
from pycloudlib.errors import CloudError, InstanceNotFoundError
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.disk.layers import chain
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.parts.part import SHARED, Memory
from pycloudlib.qemu.saved import capture, checkpoint, devicestate, guestmemory
from pycloudlib.qemu.saved.memoryfile import MemoryFile
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.vm import livedisk
from pycloudlib.qemu.vm.qmp import QmpError, QmpSession
from pycloudlib.qemu.vm.running import MachineEndedError, State
from tests.qemu.conftest import CloudMaker
from tests.qemu.machines import (
    SMALL,
    accepts,
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
    """List an instance's files, but for locks, and for what all of its saves begin with."""
    files = {file.name for file in directory.iterdir() if file.suffix != ".lock"}
    return files - {"base-state"}


def test_saved_machine_goes_on_as_the_same_one(running: QemuInstance) -> None:
    before, pid = (running.id, running.port, running.telnet_port), running.machine.pid
    save(running)
    assert (running.id, running.port, running.telnet_port) == before
    assert running.machine.pid == pid
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
    """Often enough for its layers to be merged; nothing is left of all the saves."""
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


# Each is called once in a save in place, in this order. From the second one on a mark in the
# machine's directory says that it is being saved; from the fourth on its disk is another one.
BEFORE_THE_DISK = (
    (capture.InPlace, "prepare"),
    (checkpoint, "check_space"),
    (livedisk, "switching"),
    (checkpoint, "paused"),
    (capture.Reading, "read_memory"),
)
AFTER_THE_DISK = (
    (layers.FrozenDisk, "exchange"),
    (devicestate, "save_devices"),
    (checkpoint, "measure_pause"),
    (capture.InPlace, "finish"),
    (savedmachine, "write_facts"),
    (layers.LayerStore, "complete"),
)


def named(value: object) -> str:
    """Name an owner or a function in a test's id."""
    return getattr(value, "__name__", str(value)).rpartition(".")[2]


class _BrokenError(Exception):
    """What goes wrong in a test."""


def goes_wrong(*_arguments: object, **_options: object) -> None:
    raise _BrokenError


@pytest.mark.parametrize(("owner", "name"), BEFORE_THE_DISK, ids=named)
def test_what_goes_wrong_before_the_disk_is_exchanged_changes_nothing(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    before = Before(cloud, running)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, goes_wrong)
        with pytest.raises(_BrokenError):
            save(running)
    before.check()
    save(running)
    assert runs(running)


@pytest.mark.parametrize(("owner", "name"), AFTER_THE_DISK, ids=named)
def test_what_goes_wrong_afterwards_leaves_the_machine_on_a_disk_that_is_there(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    pid = running.machine.pid
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, goes_wrong)
        with pytest.raises(_BrokenError):
            save(running)
    assert running.machine.pid == pid
    assert runs(running)
    assert list(cloud.parent_dir.glob("snapshots/*")) == []
    assert writes_to(pid, running.instance_path)
    assert all(file.exists() for file in chain(running.instance_path))
    save(running)
    assert runs(running)


def test_overlay_that_cannot_be_taken_is_let_go(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU refuses it, while the guest stands still."""
    before = Before(cloud, running)

    def list_nodes() -> set[str]:
        with running.machine.session() as session:
            return set(livedisk.list_nodes(session))

    opened = list_nodes()
    with monkeypatch.context() as patch:
        patch.setattr(livedisk, "find_active", lambda *_arguments: "no-such-node")
        with pytest.raises(QmpError, match="no-such-node"):
            save(running)
    before.check()
    assert list_nodes() == opened
    assert running.machine.execute("query-fdsets") == []
    save(running)
    assert runs(running)


def list_descriptors(instance: QemuInstance) -> list[str]:
    """List what a machine's QEMU has open, but for what is there once for each layer."""
    opened = []
    for link in Path(f"/proc/{instance.machine.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            opened.append(str(link.readlink()))
    return [name for name in opened if "eventfd" not in name and ".qcow2" not in name]


def test_qemu_keeps_nothing_that_it_was_lent_for_a_moment(running: QemuInstance) -> None:
    """Nor the descriptors that it does not close while the machine stands still."""
    save(running)
    before = sorted(list_descriptors(running))
    save(running)
    save(running)
    assert sorted(list_descriptors(running)) == before
    # One for each overlay of three, to open it anew by.
    fdsets = running.machine.execute("query-fdsets")
    assert [len(fdset["fds"]) for fdset in fdsets] == [1, 1, 1]


class Faulty:
    """Lets the n-th of what QEMU is told go wrong: before QEMU hears it, or its answer is lost."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, *, late: bool) -> None:
        self.failed: str | None = None
        self._left = number
        self._late = late
        for name in ("execute", "lend"):
            monkeypatch.setattr(QmpSession, name, self._wrap(getattr(QmpSession, name)))

    def _wrap(self, real: Any) -> Any:
        def call(session: QmpSession, what: Any, *more: Any, **options: Any) -> Any:
            self._left -= 1
            fails = self._left == 0
            if fails:
                self.failed = what if isinstance(what, str) else "add-fd"
            if fails and not self._late:
                raise QmpError(f"{self.failed} failed")
            answer = real(session, what, *more, **options)
            if fails:
                raise QmpError(f"{self.failed} failed")
            return answer

        return call


def list_errors(running: QemuInstance) -> list[str]:
    """Save a machine; list what went wrong."""
    try:
        save(running)
    except QmpError as error:
        return [str(error)]
    return []


@pytest.mark.parametrize(
    "late",
    [pytest.param(False, id="refused", marks=pytest.mark.thorough), pytest.param(True, id="lost")],
)
def test_machine_goes_on_whatever_qemu_fails_at(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """It runs on, on a disk that has its name, and nothing is left; the first error is raised."""
    save(running)
    failed: list[str | None] = []
    while True:
        with monkeypatch.context() as patch:
            fault = Faulty(patch, len(failed) + 1, late=late)
            errors = list_errors(running)
        if errors:
            assert errors == [f"{fault.failed} failed"]
            assert len(list(cloud.parent_dir.glob("snapshots/*.img"))) == 1
        if fault.failed is None:
            break
        failed.append(fault.failed)
        assert running.machine.execute("query-status")["status"] == "running"
        assert writes_to(running.machine.pid, running.instance_path), fault.failed
        assert not running.machine.rundir.is_being_saved
        assert list(running.instance_dir.glob(".*.qcow2")) == []
        for image in cloud.created_images[1:]:
            cloud.delete_image(image)
    assert {"stop", "blockdev-snapshot", "cont", "add-fd"} <= set(failed)
    saved = save(running)
    assert runs(hurry(cloud.launch(str(saved.image))))


@pytest.mark.parametrize("taken", [False, True])
def test_machine_that_could_not_be_settled_is_settled_by_whoever_comes_next(
    running: QemuInstance, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """QEMU answers nothing any more from some moment on, and later it does."""
    real = QmpSession.execute
    silent: list[str] = []

    def execute(session: QmpSession, command: str, *more: Any, **options: Any) -> Any:
        if command == "blockdev-snapshot" and taken:
            real(session, command, *more, **options)
        if command == "blockdev-snapshot" or silent:
            silent.append(command)
            raise QmpError("no answer")
        return real(session, command, *more, **options)

    before = running.instance_path.stat().st_ino
    with monkeypatch.context() as patch:
        patch.setattr(QmpSession, "execute", execute)
        with pytest.raises(QmpError, match="no answer"):
            save(running)
    assert "cont" in silent
    assert becomes(lambda: running.machine.state is State.RUNNING)
    assert not running.machine.rundir.is_being_saved
    assert (running.instance_path.stat().st_ino != before) == taken
    assert writes_to(running.machine.pid, running.instance_path)
    assert all(file.exists() for file in chain(running.instance_path))
    assert names_in(running.instance_dir).isdisjoint({"saving"})
    save(running)


def test_disk_of_a_machine_that_ended_before_it_was_settled_is_the_one_it_wrote_to(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went on in the overlay that has not its disk's name yet, and layers are collected."""
    with monkeypatch.context() as patch:
        patch.setattr(layers.FrozenDisk, "exchange", goes_wrong)
        patch.setattr("pycloudlib.qemu.vm.livedisk.recover", lambda *_arguments: None)
        with pytest.raises(_BrokenError):
            save(running)
        (fresh,) = running.instance_dir.glob(".*.qcow2")
        written_to = fresh.stat().st_ino
        assert writes_to(running.machine.pid, fresh)
        with pytest.raises(CloudError, match="a save that was cut off"):
            save(running)
        layers.LayerStore(cloud.parent_dir).collect()
        running.machine.kill()
    running.start(wait=False)
    assert running.instance_path.stat().st_ino == written_to
    assert runs(running)


def test_machine_that_is_paused_before_its_moment_stays_paused(
    running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.check_space

    def pause(directory: Path) -> None:
        running.machine.execute("stop")
        real(directory)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "check_space", pause)
        with pytest.raises(CloudError, match="was paused meanwhile"):
            save(running)
    assert running.machine.execute("query-status")["status"] == "paused"
    running.machine.execute("cont")
    assert becomes(lambda: running.machine.state is State.RUNNING)
    save(running)


def test_ctrl_c_again_and_again_ends_no_memory_that_is_being_read(
    running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What threads of ours read and write must stay open until they have ended."""
    closed, ended = threading.Event(), threading.Event()
    real_exit, real_update = MemoryFile.__exit__, MemoryFile.update_runs

    def leave(file: MemoryFile, *error: object) -> None:
        closed.set()
        # Else Python itself would be ended by what is read there.
        assert ended.wait(20)
        real_exit(file, *error)

    def update(file: MemoryFile, *arguments: Any) -> int:
        for _ in range(5):
            os.kill(os.getpid(), signal.SIGINT)
            if closed.wait(0.05):
                break
        too_early.append(closed.is_set())
        ended.set()
        return real_update(file, *arguments)

    too_early: list[bool] = []
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFile, "__exit__", leave)
        patch.setattr(MemoryFile, "update_runs", update)
        with pytest.raises(KeyboardInterrupt):
            save(running)
    assert too_early
    assert not any(too_early)
    assert runs(running)


def test_others_may_ask_qemu_while_memory_is_copied(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a program that hears no events of it, where QEMU serves one at a time."""
    saver, other = (cloud.get_instance(running.id) for _ in range(2))
    real = capture.InPlace.prepare

    def prepare(reading: capture.InPlace) -> None:
        answers.append(other.machine.execute("query-status", timeout=5)["status"])
        real(reading)

    answers: list[str] = []
    monkeypatch.setattr(capture.InPlace, "prepare", prepare)
    save(saver)
    assert answers == ["running"]


def test_machine_that_another_program_paused_is_not_let_go_on(
    cloud: Qemu, running: QemuInstance
) -> None:
    """By one that hears no events of it."""
    running.machine.execute("stop")
    with pytest.raises(CloudError, match="paused"):
        save(cloud.get_instance(running.id))
    assert running.machine.execute("query-status")["status"] == "paused"


def test_machine_with_an_added_device_is_not_saved(cloud: Qemu, running: QemuInstance) -> None:
    """Its copies would not take its state."""
    save(running)
    running.machine.execute("device_add", {"driver": "virtio-rng-pci", "id": "more"})
    with pytest.raises(CloudError, match=r"added to it \(more\)"):
        save(running)
    assert runs(running)
    copy = hurry(cloud.launch(cloud.created_images[0]))
    save(copy)


def test_machine_whose_qemu_was_replaced_by_another_version_is_not_saved(
    running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = QmpSession.execute
    own = running.machine.execute("query-version")

    def execute(session: QmpSession, command: str, *more: Any, **options: Any) -> Any:
        if command != "query-version":
            return real(session, command, *more, **options)
        asked.append(command)
        newer = {**own["qemu"], "minor": own["qemu"]["minor"] + len(asked) - 1}
        return {**own, "qemu": newer}

    asked: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(QmpSession, "execute", execute)
        with pytest.raises(CloudError, match=r"which is .* here by now"):
            save(running)
    assert runs(running)
    save(running)


def test_guest_goes_on_when_it_stood_still_for_too_long(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(_reading: object) -> None:
        assert becomes(lambda: running.machine.state is State.PAUSED)
        assert becomes(lambda: running.machine.state is State.RUNNING)

    with monkeypatch.context() as patch:
        patch.setattr(capture.Reading, "read_memory", hang)
        with pytest.raises(CloudError, match="continues unsaved"):
            save(running, pause_limit=0.2)
    assert runs(running)
    assert list(cloud.parent_dir.glob("snapshots/*")) == []
    save(running)


def test_machine_that_ends_while_it_is_saved_is_told_of(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(_reading: object) -> None:
        running.machine.kill()

    with monkeypatch.context() as patch:
        patch.setattr(capture.Reading, "read_memory", die)
        with pytest.raises((MachineEndedError, QmpError)):
            save(running)
    assert running.machine.state is State.OFF
    assert list(cloud.parent_dir.glob("snapshots/*")) == []
    running.start(wait=False)
    assert runs(running)
    save(running)


@pytest.mark.parametrize("missing", ["command", "known blocks"])
@pytest.mark.parametrize("kind", ["shared", "anonymous", "kept"])
def test_machine_that_cannot_be_saved_in_place_is_saved_another_way(
    cloud: Qemu,
    running: QemuInstance,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    missing: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine = of_kind(cloud, running, kind, monkeypatch)
    pid = machine.machine.pid
    execute, list_blocks = QmpSession.execute, devicestate.list_blocks

    def hide(session: QmpSession, command: str, *more: Any, **options: Any) -> Any:
        answer = execute(session, command, *more, **options)
        if command == "query-commands":
            return [known for known in answer if known["name"] != "xen-save-devices-state"]
        return answer

    if missing == "command":
        monkeypatch.setattr(QmpSession, "execute", hide)
    else:
        monkeypatch.setattr(
            devicestate, "list_blocks", lambda session: {**list_blocks(session), "more": 1 << 20}
        )
    caplog.set_level("INFO")
    for _ in range(2):
        saved = save(machine)
    told = "not know xen-save-devices-state" if missing == "command" else "beside its own"
    assert told in caplog.text
    assert ("by a migration" if kind == "shared" else "from a twin") in caplog.text
    assert machine.machine.pid == pid
    assert runs(machine)
    assert boot_sector_of(saved) == BOOT_SECTOR
    copy = hurry(cloud.launch(str(saved.image)))
    assert runs(copy)


def of_kind(
    cloud: Qemu, running: QemuInstance, kind: str, monkeypatch: pytest.MonkeyPatch
) -> QemuInstance:
    """Give a machine whose memory is of a kind."""
    if kind == "kept":
        return hurry(cloud.launch(str(save(running).image)))
    if kind == "anonymous":
        running.machine.kill()
        with monkeypatch.context() as patch:
            patch.setattr("pycloudlib.qemu.vm.machine.choose_memory", lambda _accelerator: Memory())
            running.start(wait=False)
    return running


BOOT_SECTOR = b"\xfa\xf4\xeb\xfd"


def boot_sector_of(saved: SavedMachine) -> bytes:
    """Read, in kept memory, where the firmware loads it to: so it is really this machine's."""
    with saved.memory.open("rb") as file:
        file.seek(0x7C00)
        return file.read(4)


@pytest.mark.parametrize("kind", ["shared", "anonymous", "kept"])
def test_memory_of_each_kind_is_read_in_place(
    cloud: Qemu,
    running: QemuInstance,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine = of_kind(cloud, running, kind, monkeypatch)
    pid = machine.machine.pid
    caplog.set_level("INFO")
    for _ in range(2):
        saved = save(machine)
    way = "from its shared memory" if kind == "shared" else "from QEMU's process"
    assert caplog.text.count(f"read {way};") >= 2
    assert machine.machine.pid == pid
    assert boot_sector_of(saved) == BOOT_SECTOR
    assert runs(hurry(cloud.launch(str(saved.image))))


@pytest.mark.parametrize(
    ("kind", "refused"),
    [
        ("anonymous", "open_process_memory"),
        ("kept", "open_process_memory"),
        # As of a QEMU with capabilities of its own, in which no other process may look.
        ("kept", "find_mapping"),
        ("shared", "find_mapping"),
    ],
)
def test_qemu_writes_its_memory_where_its_process_must_not_be_read(
    cloud: Qemu,
    running: QemuInstance,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    refused: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Both ways give the same content."""
    machine = of_kind(cloud, running, kind, monkeypatch)
    first = save(machine)

    def refuse(*_arguments: object) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch:
        patch.setattr(guestmemory, refused, refuse)
        caplog.set_level("INFO")
        second = save(machine)
    assert caplog.text.count("read by QEMU, range by range") == 1
    assert caplog.text.count("QEMU writes its guest's memory itself") == 1
    assert boot_sector_of(second) == BOOT_SECTOR
    assert first.memory.read_bytes() == second.memory.read_bytes()
    assert runs(hurry(cloud.launch(str(second.image))))


def test_machine_on_kept_memory_is_saved_when_that_is_deleted(
    cloud: Qemu, running: QemuInstance
) -> None:
    (copy,) = running.fork(1)
    assert list(cloud.parent_dir.glob("snapshots/*.live")) == []
    saved = save(hurry(copy))
    assert boot_sector_of(saved) == BOOT_SECTOR
    assert runs(hurry(cloud.launch(str(saved.image))))


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


def test_machine_writes_to_the_new_disk(running: QemuInstance) -> None:
    for _ in range(3):
        saved = save(running)
        pid = running.machine.pid
        assert writes_to(pid, running.instance_path)
        assert not writes_to(pid, saved.image)


@pytest.mark.parametrize(("owner", "name"), BEFORE_THE_DISK[1:] + AFTER_THE_DISK[:-1], ids=named)
def test_ctrl_c_at_any_moment_leaves_the_machine_running(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    """The signal really comes, in the main thread."""
    real = getattr(owner, name)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(running)
    pid = running.machine.pid
    assert becomes(lambda: qemus(cloud.working_dir) == [pid])
    assert writes_to(pid, running.instance_path)
    assert all(file.exists() for file in chain(running.instance_path))
    assert list(cloud.parent_dir.glob("snapshots/*")) == []
    save(running)
    assert runs(running)


def test_freezing_that_fails_gives_the_disk_back(running: QemuInstance) -> None:
    """That of a machine that is off."""
    running.machine.kill()
    store = layers.LayerStore(running.instance_dir.parent)
    disk = running.instance_path
    before, names = disk.stat().st_ino, names_in(running.instance_dir)

    def fail(*, late: bool) -> None:
        with (
            contextlib.ExitStack() as undo,
            store.freezing({disk: store.reserve("broken.img", undo)}) as (frozen,),
        ):
            assert frozen.image.stat().st_ino == before
            if late:
                frozen.exchange()
                assert disk.stat().st_ino != before
                assert chain(disk)[1].stat().st_ino == before
            raise KeyboardInterrupt

    for late in (False, True):
        with pytest.raises(KeyboardInterrupt):
            fail(late=late)
        assert disk.stat().st_ino == before
        assert list(store.snapshots.iterdir()) == []
        assert list(store.layers.glob("*.qcow2")) == []
        assert names_in(running.instance_dir) == names


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
    assert SHARED.shared
