"""Who changes a machine keeps all others from it; what was cut off in the middle is set right."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pycloudlib import Qemu
from pycloudlib.cli.machines import list_machines
from pycloudlib.errors import CloudError
from pycloudlib.qemu.disk import diskimage, layers
from pycloudlib.qemu.host.ownership import Orphans, Ownership, claim
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.saved import capture, restoring
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.vm import hotplug
from pycloudlib.qemu.vm.machine import Machine
from pycloudlib.qemu.vm.process import QemuProcess
from pycloudlib.qemu.vm.running import State
from tests.qemu.conftest import CloudMaker
from tests.qemu.machines import SMALL, becomes, hurry, qemus, runs, save

pytestmark = pytest.mark.qemu


@pytest.fixture(autouse=True)
def ended(working_dir: Path) -> Iterator[None]:
    """End what a program that was killed has left, also where a test fails."""
    yield
    for pid in qemus(working_dir):
        os.kill(pid, signal.SIGKILL)


def is_locked(rundir: RunDirectory) -> bool:
    """Say whether another process would have to wait for a machine's lock."""
    with rundir.try_lock() as ours:
        return not ours


def when(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, act: Callable[[], None]
) -> None:
    """Do something at the moment at which a function is called, once."""
    real = getattr(owner, name)

    def called(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(owner, name, real)
        act()
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, called)


def test_machine_that_is_switched_on_during_a_snapshot_writes_to_its_own_disk(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program's `start` comes just when the machine is off: it waits for the snapshot."""
    other = hurry(cloud.get_instance(running.id))
    started = threading.Thread(target=other.start, kwargs={"wait": False})
    waits: list[bool] = []

    def start() -> None:
        started.start()
        waits.append(is_locked(running.machine.rundir))

    when(monkeypatch, layers, "link_file", start)
    running.machine.kill()
    image = Path(cloud.snapshot(running, clean=False))
    started.join()
    assert waits == [True]
    assert other.machine.state is State.RUNNING
    pid = other.machine.pid
    opened = [link.resolve() for link in Path(f"/proc/{pid}/fd").iterdir()]
    assert running.instance_path in opened
    writable = [
        Path(f"/proc/{pid}/fd/{info.name}").resolve()
        for info in Path(f"/proc/{pid}/fdinfo").iterdir()
        if int(info.read_text().split("flags:")[1].split()[0], 8) & os.O_ACCMODE
    ]
    assert not any(file.exists() and file.samefile(image) for file in writable)


def test_machine_that_was_switched_on_before_a_snapshot_is_not_frozen(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = hurry(cloud.get_instance(running.id))
    when(monkeypatch, Machine, "staying_off", lambda: other.start(wait=False))
    running.machine.kill()
    with pytest.raises(CloudError, match="another program has switched it on"):
        cloud.snapshot(running, clean=False)
    assert other.machine.state is State.RUNNING
    assert layers.chain(running.instance_path)[1:] == layers.chain(running.instance_path)[-1:]


def test_saving_locks_before_the_disk_is_frozen(
    running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[bool] = []
    rundir = running.machine.rundir
    when(monkeypatch, layers, "link_file", lambda: held.append(is_locked(rundir)))
    save(running)
    assert held == [True]
    assert not is_locked(rundir)


def test_going_back_locks_before_the_disk_is_exchanged(
    running: QemuInstance, saved: SavedMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[bool] = []
    rundir = running.machine.rundir
    when(monkeypatch, diskimage, "create_overlay", lambda: held.append(is_locked(rundir)))
    restoring.roll_back(running.machine, saved)
    assert held == [True]


def test_plugging_locks(running: QemuInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []
    rundir = running.machine.rundir
    when(monkeypatch, hotplug, "find_free_number", lambda: held.append(is_locked(rundir)))
    plugged = hotplug.plug_interface(running.machine)
    assert held == [True]
    assert hotplug.list_plugged(running.machine) == [plugged.name]


def test_interface_that_is_plugged_in_meanwhile_is_not_lost(
    running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes before the save has the lock."""
    when(monkeypatch, capture, "choose", lambda: pytest.fail("it was to be saved"))
    save_lock = running.machine.changing
    plugged: list[str] = []

    def changing() -> Any:
        if not plugged:
            plugged.append("")
            plugged[0] = hotplug.plug_interface(running.machine).name
        return save_lock()

    monkeypatch.setattr(running.machine, "changing", changing)
    with pytest.raises(CloudError, match="network interfaces are plugged in"):
        save(running)
    assert hotplug.list_plugged(running.machine) == plugged


def test_two_starts_at_once_are_one(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = hurry(cloud.get_instance(running.id))
    running.machine.kill()
    when(monkeypatch, Machine, "power_on_again", lambda: other.start(wait=False))
    running.start(wait=False)
    assert running.machine.pid == other.machine.pid
    assert runs(running)


def test_machine_that_was_taken_over_meanwhile_is_not_pruned(
    cloud: Qemu, make_cloud: CloudMaker, running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its program is dead when it is looked at, and another one has it when it is to be ended."""
    owner = Ownership.find(running.instance_dir)
    assert owner is not None
    dead = Ownership(type(owner.process)(2**22 + 1, 1, owner.process.world), owner.orphans)
    dead.write(running.instance_dir)
    when(
        monkeypatch,
        RunDirectory,
        "lock",
        lambda: claim(running.instance_dir, Orphans.REAP_AFTER_CRASH),
    )
    assert make_cloud("other").prune() == []
    assert runs(running)


def test_prune_waits_for_who_changes_a_machine(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.machine.kill()
    owner = Ownership.find(running.instance_dir)
    assert owner is not None
    Ownership(type(owner.process)(2**22 + 1, 1, owner.process.world), owner.orphans).write(
        running.instance_dir
    )
    pruned: list[list[str]] = []
    pruning = threading.Thread(target=lambda: pruned.append(cloud.prune()))
    with running.machine.changing():
        when(monkeypatch, RunDirectory, "remove", lambda: pytest.fail("it is being changed"))
        pruning.start()
        claim(running.instance_dir, Orphans.REAP_AFTER_CRASH)
    pruning.join()
    assert pruned == [[]]
    assert running.instance_dir.is_dir()


CUT_OFF = f"""
import io, os, signal, sys
from pycloudlib import Qemu
from pycloudlib.qemu.disk import layers
from pycloudlib.qemu.saved import capture, checkpoint, devicestate
from pycloudlib.qemu.state import rundir, savedmachine
from pycloudlib.qemu.vm import livedisk
config, image, moment = sys.argv[1:]

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

cloud = Qemu("cut", timestamp_suffix=False, config_file=io.StringIO(config), orphans="keep")
vm = cloud.launch(image, "{SMALL}")
print(vm.id, flush=True)
owner, name = {{
    "before the memory is copied": (capture.InPlace, "prepare"),
    "with a machine like it": (capture, "write_state"),
    "before the disk has its names": (layers.LayerStore, "freezing"),
    "before the overlay is opened": (livedisk, "switching"),
    "before the guest stands still": (checkpoint, "paused"),
    "standing still": (capture.Reading, "read_memory"),
    "before the disk is exchanged": (layers.FrozenDisk, "exchange"),
    "before the state": (devicestate, "save_devices"),
    "before it is let be": (rundir.RunDirectory, "forget_saving"),
    "before the state is written": (capture.InPlace, "finish"),
    "before it is told of": (savedmachine, "write_facts"),
    "before it is complete": (layers.LayerStore, "complete"),
}}[moment]
setattr(owner, name, die)
checkpoint.save(vm.machine, "saved.img", ask_helper=None)
"""

MOMENTS = (
    "before the memory is copied",
    "with a machine like it",
    "before the disk has its names",
    "before the overlay is opened",
    "before the guest stands still",
    "standing still",
    "before the disk is exchanged",
    "before the state",
    "before it is let be",
    "before the state is written",
    "before it is told of",
    "before it is complete",
)


def cut_off(working_dir: Path, image: Path, moment: str) -> str:
    """Save a machine and be killed at a moment of that; give the machine's id."""
    config = f'[qemu]\nworking_dir = "{working_dir}"\naccelerator = "tcg"\n'
    done = subprocess.run(
        [sys.executable, "-c", CUT_OFF, config, str(image), moment],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stdout.strip()


def check_whole(cloud: Qemu, instance_id: str, working_dir: Path) -> None:
    vm = hurry(cloud.get_instance(instance_id))
    assert vm.machine.state is State.RUNNING
    # The guardian ends what else the program had.
    assert becomes(lambda: len(qemus(working_dir)) == 1)
    assert runs(vm)
    rundir = vm.machine.rundir
    assert not rundir.is_being_saved
    assert list(rundir.path.glob(".*.qcow2")) == []
    (pid,) = qemus(working_dir)
    assert vm.machine.pid == pid
    # It writes to its own disk, under its own name.
    opened = [link.stat() for link in Path(f"/proc/{pid}/fd").iterdir() if link.exists()]
    assert any(os.path.samestat(facts, vm.instance_path.stat()) for facts in opened)
    cloud.prune()
    assert list(cloud.parent_dir.glob("snapshots/*")) == []
    assert list(cloud.parent_dir.glob("*-twin-*")) == []
    # Its layer is free of the locks of a machine that writes to it.
    copy = hurry(cloud.launch(str(save(vm).image)))
    assert runs(copy)
    assert runs(vm)
    assert copy.delete() == []
    assert vm.delete() == []
    cloud.clean()
    cloud.prune()


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(moment, marks=[] if number in (1, 4, 6, 7) else pytest.mark.thorough)
        for number, moment in enumerate(MOMENTS)
    ],
)
def test_machine_goes_on_whose_saver_was_killed(
    moment: str, make_cloud: CloudMaker, tiny_image: Path, working_dir: Path
) -> None:
    instance_id = cut_off(working_dir, tiny_image, moment)
    check_whole(make_cloud("cut"), instance_id, working_dir)


def settle_by_list(cloud: Qemu, instance_id: str) -> None:
    (found,) = list_machines(cloud.working_dir, everywhere=True)
    assert found.state == "running"


def settle_by_prune(cloud: Qemu, instance_id: str) -> None:
    assert str(RunDirectory.find(instance_id)[0].path) not in cloud.prune()


def settle_by_start(cloud: Qemu, instance_id: str) -> None:
    vm = cloud.get_instance(instance_id)
    vm.start(wait=False)


@pytest.mark.parametrize(
    "settle",
    [settle_by_list, settle_by_prune, pytest.param(settle_by_start, marks=pytest.mark.thorough)],
)
def test_whoever_comes_next_sets_it_right(
    settle: Callable[[Qemu, str], None],
    make_cloud: CloudMaker,
    tiny_image: Path,
    working_dir: Path,
) -> None:
    instance_id = cut_off(working_dir, tiny_image, "before the disk is exchanged")
    cloud = make_cloud("cut")
    settle(cloud, instance_id)
    assert not RunDirectory.find(instance_id)[0].is_being_saved
    check_whole(cloud, instance_id, working_dir)


def test_save_that_is_under_way_is_let_be(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = cloud.get_instance(running.id)
    seen: list[str] = []

    def look() -> None:
        (found,) = list_machines(cloud.working_dir, everywhere=True)
        told = other.machine.execute("query-status")["status"]
        seen.extend([found.state, other.machine.state.value, told])

    when(monkeypatch, capture.Reading, "read_memory", look)
    save(running)
    assert seen == ["running", "running", "paused"]
    assert runs(running)


def test_machine_whose_saver_was_killed_is_deleted(
    make_cloud: CloudMaker, tiny_image: Path, working_dir: Path
) -> None:
    instance_id = cut_off(working_dir, tiny_image, "before the disk is exchanged")
    cloud = make_cloud("cut")
    assert cloud.get_instance(instance_id).delete() == []
    assert becomes(lambda: qemus(working_dir) == [])
    cloud.prune()


def test_directory_that_is_removed_has_its_owner_to_the_last(
    running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever removes it may be killed at any moment: what is left is found then."""
    rundir = running.machine.rundir
    running.machine.kill()
    left: list[set[str]] = []
    real = Path.unlink

    def look(path: Path, missing_ok: bool = False) -> None:
        if path.parent == rundir.path:
            left.append({file.name for file in rundir.path.iterdir()})
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", look)
    assert running.delete() == []
    assert len(left) > 3
    assert all(".owner" in names for names in left)
    assert left[-1] == {".owner"}


def test_link_to_a_directory_is_not_followed(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("of the user")
    link = tmp_path / "vm"
    link.symlink_to(mine)
    with pytest.raises(NotADirectoryError):
        RunDirectory(link).remove()
    assert (mine / "file").exists()


def test_child_that_is_forked_during_a_start_takes_no_port(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread forks a worker that lives long, while the console's port is listened on."""
    ours, childs = os.pipe()
    children: list[int] = []

    def fork() -> None:
        child = os.fork()
        if not child:
            os.close(childs)
            os.read(ours, 1)
            os._exit(0)
        children.append(child)

    when(monkeypatch, QemuProcess, "start", fork)
    try:
        running.machine.kill()
        running.start(wait=False)
        running.machine.kill()
        running.start(wait=False)
        assert running.machine.state is State.RUNNING
    finally:
        os.close(ours)
        os.close(childs)
        for child in children:
            os.waitpid(child, 0)
    assert len(children) == 1


def test_cloud_that_has_just_cleaned_up_is_passed_over(
    cloud: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = layers.cloud_directory(cloud.working_dir, "gone")
    monkeypatch.setattr(layers, "cloud_directories", lambda _working_dir: iter([gone]))
    assert list_machines(cloud.working_dir, everywhere=True) == []
    assert cloud.prune() == []
