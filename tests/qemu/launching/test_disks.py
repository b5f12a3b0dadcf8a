"""Further disks: from their first moment on, saved, copied and rolled back with their machine."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from pycloudlib import Qemu
from pycloudlib.errors import CloudError, ImageInUseError
from pycloudlib.qemu.cloud import Disk
from pycloudlib.qemu.disk import diskimage, layers
from pycloudlib.qemu.disk.diskimage import read_layer
from pycloudlib.qemu.disk.layers import chain
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.vm import livedisk
from pycloudlib.qemu.vm.qmp import QmpSession
from pycloudlib.qemu.vm.running import MachineEndedError, State
from tests.qemu import reader
from tests.qemu.conftest import UNSTARTED, CloudMaker
from tests.qemu.machines import SMALL, becomes, hurry, qemus, runs, save
from tests.qemu.worker import copy_worker, reboot, start_worker, works

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("own_ports")]


def list_disks(instance: QemuInstance) -> dict[str, int]:
    """List the serials and lengths of the further disks that QEMU has."""
    return {
        block["qdev"].removeprefix("disk-"): block["inserted"]["image"]["virtual-size"]
        for block in instance.machine.execute("query-block")
        if block.get("qdev", "").startswith("disk-")
    }


def file_of(instance: QemuInstance, serial: str) -> Path:
    return instance.instance_path.with_name(f"{instance.name}+{serial}.qcow2")


def write(instance: QemuInstance, serial: str, value: int) -> None:
    """Write 4 KiB of a value to a disk, as its machine."""
    for command in (f"write -P {value} 8192 4096", "flush"):
        line = f'qemu-io -d disk-{serial} "{command}"'
        said = instance.machine.execute("human-monitor-command", {"command-line": line})
        assert "rror" not in said, said


def holds(file: Path, value: int, kind: str = "qcow2") -> bool:
    """Whether a disk has 4 KiB of a value there; a machine may write to it."""
    argv: list[str | Path] = [
        "qemu-io",
        "-U",
        "-r",
        "-f",
        kind,
        "-c",
        f"read -P {value} 8192 4096",
        file,
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert "4096" in done.stdout, done
    return "failed" not in done.stdout


def make_image(path: Path, value: int) -> Path:
    """Make a raw disk with an empty partition table, and a value."""
    table = bytes(510) + b"\x55\xaa"
    path.write_bytes((table.ljust(8192, b"\0") + bytes([value]) * 4096).ljust(3 << 20, b"\0"))
    return path


@pytest.fixture
def cloud(make_cloud: CloudMaker) -> Qemu:
    return make_cloud()


@pytest.fixture
def machine(cloud: Qemu, tiny_image: Path) -> QemuInstance:
    """Give a machine that runs and has two further disks."""
    return hurry(cloud.launch(str(tiny_image), SMALL, disks=[2, Disk(1, serial="scratch")]))


def test_machine_has_the_disks_that_it_was_launched_with(machine: QemuInstance) -> None:
    assert list_disks(machine) == {"disk1": 2 << 30, "scratch": 1 << 30}
    for serial in ("disk1", "scratch"):
        assert file_of(machine, serial).stat().st_mode & 0o777 == 0o600
        write(machine, serial, 7)
        assert holds(file_of(machine, serial), 7)


def test_disks_stay_over_power_cycles_and_go_with_the_machine(
    cloud: Qemu, machine: QemuInstance
) -> None:
    write(machine, "scratch", 7)
    machine.machine.kill()
    machine.start(wait=False)
    assert list_disks(machine) == {"disk1": 2 << 30, "scratch": 1 << 30}
    assert holds(file_of(machine, "scratch"), 7)
    assert machine.delete() == []
    assert not machine.instance_dir.exists()


def test_many_disks_fit(cloud: Qemu, tiny_image: Path) -> None:
    unstarted = cloud.launch(str(tiny_image), SMALL, disks=[1] * 12, launch_args=list(UNSTARTED))
    assert len(list_disks(unstarted)) == 12


def test_image_of_a_disk_is_not_written_to(cloud: Qemu, tiny_image: Path, tmp_path: Path) -> None:
    image = make_image(tmp_path / "data.img", 3)
    before = image.read_bytes()
    machine = hurry(cloud.launch(str(tiny_image), SMALL, disks=[Disk(path=image)]))
    assert list_disks(machine) == {"disk1": 3 << 20}
    write(machine, "disk1", 9)
    assert image.read_bytes() == before
    with pytest.raises(ImageInUseError, match=machine.name):
        cloud.delete_image(str(image))
    machine.machine.kill()
    with pytest.raises(ImageInUseError, match=machine.name):
        cloud.delete_image(str(image))
    assert machine.delete() == []
    cloud.delete_image(str(image))
    assert not image.exists()


def test_image_is_written_to_when_that_is_asked_for(
    cloud: Qemu, tiny_image: Path, tmp_path: Path
) -> None:
    image = make_image(tmp_path / "data.img", 3)
    machine = hurry(cloud.launch(str(tiny_image), SMALL, disks=[Disk(path=image, write=True)]))
    write(machine, "disk1", 9)
    assert holds(image, 9, "raw")
    with pytest.raises(CloudError, match=r"its disk disk1 is the image .*write=True"):
        cloud.snapshot(machine, memory=True)
    with pytest.raises(CloudError, match="disk1"):
        machine.fork()
    assert runs(machine)
    with pytest.raises(ImageInUseError, match=machine.name):
        cloud.launch(str(tiny_image), SMALL, disks=[Disk(path=image, write=True)])
    assert machine.delete() == []
    assert image.exists()


def test_image_that_machines_are_made_of_is_not_written_to(
    cloud: Qemu, tiny_image: Path, machine: QemuInstance
) -> None:
    with pytest.raises(ValueError, match="machines are made of"):
        cloud.launch(str(tiny_image), SMALL, disks=[Disk(path=tiny_image, write=True)])
    with pytest.raises(ImageInUseError, match=machine.name):
        machine.add_disk(Disk(path=tiny_image, write=True))
    saved = save(machine)
    with pytest.raises(ValueError, match="machines are made of"):
        machine.add_disk(Disk(path=saved.image, write=True))


# Saving, copying and rolling back.


@pytest.fixture
def worker(cloud: Qemu, tmp_path: Path) -> QemuInstance:
    """Give a machine that reads and writes its second disk, and finds out when that differs."""
    return start_worker(cloud, tmp_path / "worker.img", disks=[1, Disk(1, serial="other")])


def test_copy_has_the_disk_of_the_saved_moment(cloud: Qemu, worker: QemuInstance) -> None:
    write(worker, "other", 5)
    image = cloud.snapshot(worker, memory=True)
    write(worker, "other", 6)
    assert works(worker)
    one, another = (copy_worker(cloud, image) for _ in range(2))
    for copy in (one, another):
        assert copy.machine.spec.disks == worker.machine.spec.disks
        assert holds(file_of(copy, "other"), 5)
    write(one, "other", 8)
    assert holds(file_of(another, "other"), 5)
    assert holds(file_of(worker, "other"), 6)
    for machine in (worker, one, another):
        reboot(machine)
        assert works(machine)
    with pytest.raises(ImageInUseError):
        cloud.delete_image(image)
    for machine in (worker, one, another):
        assert machine.delete() == []
    cloud.delete_image(image)
    assert list(cloud.parent_dir.glob("snapshots/*")) == []
    layers.LayerStore(cloud.parent_dir).collect()
    assert list(cloud.parent_dir.glob("layers/*")) == []


def test_machine_goes_back_with_its_disks(cloud: Qemu, worker: QemuInstance) -> None:
    write(worker, "other", 5)
    image = cloud.snapshot(worker, memory=True)
    for value in (6, 7):
        write(worker, "other", value)
        assert works(worker)
        worker.rollback(image)
        assert works(worker)
        assert holds(file_of(worker, "other"), 5)


def test_rollback_brings_removed_disks_back_and_takes_added_ones(
    cloud: Qemu, worker: QemuInstance
) -> None:
    write(worker, "other", 5)
    image = cloud.snapshot(worker, memory=True)
    worker.remove_disk("other")
    worker.add_disk(Disk(2, serial="late"))
    assert list_disks(worker).keys() == {"disk1", "late"}
    worker.rollback(image)
    assert works(worker)
    assert list_disks(worker).keys() == {"disk1", "other"}
    assert holds(file_of(worker, "other"), 5)
    assert not file_of(worker, "late").exists()
    cloud.get_instance(worker.id)
    save(worker)


def test_rollback_that_fails_leaves_the_disks(
    cloud: Qemu, worker: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = cloud.snapshot(worker, memory=True)
    worker.add_disk(Disk(2, serial="late"))
    write(worker, "late", 4)
    before = {file: file.stat().st_ino for file in worker.instance_dir.glob("*.qcow2")}
    saved = cloud.find_saved(image)
    saved.state.write_bytes(b"no state")
    monkeypatch.setattr(savedmachine.SavedMachine, "find_obstacle", lambda *_arguments: None)
    with pytest.raises((CloudError, MachineEndedError)):
        worker.rollback(image)
    assert {file: file.stat().st_ino for file in worker.instance_dir.glob("*.qcow2")} == before
    assert list(worker.instance_dir.glob(".*.qcow2")) == []
    worker.start(wait=False)
    assert list_disks(worker).keys() == {"disk1", "other", "late"}
    assert holds(file_of(worker, "late"), 4)


def test_all_disks_are_exchanged_by_one_command_in_the_pause(
    worker: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    execute = QmpSession.execute

    def listen(
        self: QmpSession, command: str, arguments: Any = None, *, timeout: float = 30
    ) -> Any:
        told.append((command, arguments))
        return execute(self, command, arguments, timeout=timeout)

    monkeypatch.setattr(QmpSession, "execute", listen)
    save(worker)
    commands = [command for command, _ in told]
    pause = told[commands.index("stop") : commands.index("cont")]
    (taken,) = (arguments for command, arguments in pause if command == "transaction")
    assert len(taken["actions"]) == 3
    assert "blockdev-snapshot" not in commands
    assert works(worker)


@pytest.mark.parametrize("exchanged", [0, 1, 2])
@pytest.mark.parametrize("ends", [False, True], ids=["runs", "ends"])
def test_save_that_is_cut_off_leaves_each_disk_where_it_is_written(
    cloud: Qemu,
    worker: QemuInstance,
    monkeypatch: pytest.MonkeyPatch,
    exchanged: int,
    ends: bool,
) -> None:
    """By whoever comes next: the disks are in the fresh overlays, some under their names."""
    real = layers.FrozenDisk.exchange
    done: list[layers.FrozenDisk] = []

    def exchange(frozen: layers.FrozenDisk) -> None:
        if len(done) == exchanged:
            raise KeyboardInterrupt
        done.append(frozen)
        real(frozen)

    write(worker, "other", 5)
    with monkeypatch.context() as patch:
        patch.setattr(layers.FrozenDisk, "exchange", exchange)
        patch.setattr(livedisk, "recover", lambda *_arguments: None)
        with pytest.raises(KeyboardInterrupt):
            save(worker)
        write(worker, "other", 6)
        layers.LayerStore(cloud.parent_dir).collect()
        if ends:
            worker.machine.kill()
    if ends:
        worker.start(wait=False)
    assert works(worker)
    assert holds(file_of(worker, "other"), 6)
    assert list(worker.instance_dir.glob(".*.qcow2")) == []
    opened = {link.resolve() for link in Path(f"/proc/{worker.machine.pid}/fd").iterdir()}
    assert {file_of(worker, "disk1"), file_of(worker, "other")} <= opened
    save(worker)
    assert works(worker)


def test_transaction_that_is_refused_leaves_all_disks(
    worker: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file: file.stat().st_ino for file in worker.instance_dir.iterdir()}
    execute = QmpSession.execute

    def refuse(
        self: QmpSession, command: str, arguments: Any = None, *, timeout: float = 30
    ) -> Any:
        if command == "transaction":
            arguments["actions"][2]["data"]["overlay"] = "no-such-node"
        return execute(self, command, arguments, timeout=timeout)

    with monkeypatch.context() as patch:
        patch.setattr(QmpSession, "execute", refuse)
        with pytest.raises(CloudError, match="no-such-node"):
            save(worker)
    assert works(worker)
    now = {file: file.stat().st_ino for file in worker.instance_dir.iterdir()}
    assert {file: now[file] for file in before if file.suffix == ".qcow2"} == {
        file: inode for file, inode in before.items() if file.suffix == ".qcow2"
    }
    save(worker)


def test_layers_of_each_disk_are_merged(
    cloud: Qemu, worker: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "MAXIMUM_DEPTH", 2)
    write(worker, "other", 5)
    for _ in range(4):
        cloud.delete_image(str(save(worker).image))
    for serial in ("disk1", "other"):
        files = chain(file_of(worker, serial))
        assert len(files) <= 4
        # The lowest is built on nothing, and not on the disk itself.
        assert diskimage.read_backing_file(files[-1]) is None
    assert holds(file_of(worker, "other"), 5)
    assert works(worker)


def test_saved_machine_whose_disk_was_changed_is_not_restored(
    cloud: Qemu, worker: QemuInstance
) -> None:
    saved = save(worker)
    (disk, _) = saved.further_disks
    worker.delete()
    layers.LayerStore(cloud.parent_dir).collect()
    with disk.open("ab") as file:
        file.write(b"more")
    found = savedmachine.find(saved.image)
    assert found is not None
    assert "disk1 was changed since" in str(found.find_obstacle(found.host))


def test_exported_machine_has_its_disks(
    cloud: Qemu, worker: QemuInstance, tmp_path: Path, make_cloud: CloudMaker
) -> None:
    write(worker, "other", 5)
    cloud.snapshot(worker, memory=True, path=tmp_path / "kept.img")
    assert cloud.clean() == []
    other = make_cloud()
    copy = copy_worker(other, str(tmp_path / "kept.img"))
    assert holds(file_of(copy, "other"), 5)
    for end in ("", ".live"):
        (tmp_path / f"kept.img{end}").rename(tmp_path / f"gone.img{end}")
    with pytest.raises(FileExistsError, match=r"kept.img\+disk1"):
        other.snapshot(copy, memory=True, path=tmp_path / "kept.img")


def test_forks_have_disks_of_their_own(worker: QemuInstance) -> None:
    write(worker, "other", 5)
    for fork in worker.fork(2):
        assert works(hurry(fork))
        assert holds(file_of(fork, "other"), 5)


def test_snapshot_of_the_root_disk_says_what_it_leaves_out(
    cloud: Qemu, machine: QemuInstance, caplog: pytest.LogCaptureFixture
) -> None:
    machine.machine.kill()
    image = cloud.snapshot(machine, clean=False)
    assert re.search(r"without \S+\+disk1.qcow2, \S+\+scratch.qcow2", caplog.text)
    assert list_disks(cloud.launch(image, SMALL, launch_args=list(UNSTARTED))) == {}


def test_killed_programs_disks_are_pruned(cloud: Qemu, worker: QemuInstance) -> None:
    save(worker)
    names = {file.name for file in cloud.parent_dir.rglob("*+disk1*")}
    assert len(names) >= 2
    assert cloud.clean() == []
    assert not cloud.parent_dir.exists()


def test_first_boot_begins_with_disks_of_its_own(cloud: Qemu, tmp_path: Path) -> None:
    reader_image = tmp_path / "reader.img"
    reader.write_reader(reader_image, further_disks=2)
    image = make_image(tmp_path / "data.img", 3)
    disks = [1, Disk(path=image, serial="data")]
    first, second = (reader.launch(cloud, reader_image, text, disks=disks) for text in ("a", "b"))
    (start,) = reader.starts(cloud)
    for instance, text in ((first, "a"), (second, "b")):
        assert reader.prints(instance, text)
        assert reader.begins_there(instance, start)
        assert list_disks(instance).keys() == {"disk1", "data"}
        assert holds(file_of(instance, "data"), 3)
    write(first, "data", 7)
    assert holds(file_of(second, "data"), 3)
    for instance in (first, second):
        assert instance.delete() == []
    assert len(cloud.prune_warm_images()) == 1
    assert reader.starts(cloud) == []


def test_root_disk_is_as_long_after_a_save(cloud: Qemu, tiny_image: Path) -> None:
    machine = hurry(cloud.launch(str(tiny_image), SMALL, disk_size_gib=3))
    save(machine)
    assert read_layer(machine.instance_path).virtual_size == 3 << 30
    machine.rollback(str(save(machine).image))
    assert read_layer(machine.instance_path).virtual_size == 3 << 30


# Hot plug.


def test_disk_is_added_and_removed(cloud: Qemu, machine: QemuInstance) -> None:
    added = machine.add_disk(4)
    assert added == Disk(4, serial="disk3")
    assert added.device == "/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_disk3"
    assert list_disks(machine)["disk3"] == 4 << 30
    write(machine, "disk3", 5)
    machine.machine.execute("system_reset")
    # QEMU sends the event of a reset that is under way before its greeting to who connects then.
    assert becomes(lambda: machine.machine.last_reset > 0)
    assert "disk3" in list_disks(machine)
    # Another program has another object of it.
    cloud.get_instance(machine.id).remove_disk("scratch")
    assert list_disks(machine).keys() == {"disk1", "disk3"}
    assert not file_of(machine, "scratch").exists()
    machine.machine.kill()
    machine.start(wait=False)
    assert list_disks(machine).keys() == {"disk1", "disk3"}
    assert holds(file_of(machine, "disk3"), 5)


def test_added_disk_is_saved_and_copied(cloud: Qemu, worker: QemuInstance) -> None:
    worker.add_disk(Disk(2, serial="late"))
    write(worker, "late", 5)
    image = cloud.snapshot(worker, memory=True)
    write(worker, "late", 6)
    copy = copy_worker(cloud, image)
    assert list_disks(copy) == list_disks(worker)
    assert holds(file_of(copy, "late"), 5)
    nodes = len(worker.machine.execute("query-named-block-nodes", {"flat": True}))
    worker.remove_disk("late")
    assert len(worker.machine.execute("query-named-block-nodes", {"flat": True})) < nodes
    assert works(worker)
    assert works(copy)
    again = worker.add_disk(Disk(1, serial="late"))
    assert holds(file_of(worker, "late"), 0)
    assert again.serial == "late"
    save(worker)


def test_removed_disk_leaves_nothing_open(machine: QemuInstance) -> None:
    def look() -> tuple[int, Any]:
        nodes = machine.machine.execute("query-named-block-nodes", {"flat": True})
        return len(nodes), machine.machine.execute("query-fdsets")

    before = look()
    for _ in range(3):
        machine.add_disk(1)
        machine.remove_disk("disk3")
    assert look() == before
    names = {file.name for file in machine.instance_dir.iterdir() if "disk3" in file.name}
    assert names == set()


def test_image_can_be_added(machine: QemuInstance, tmp_path: Path) -> None:
    image = make_image(tmp_path / "data,x.img", 3)
    machine.add_disk(Disk(path=image, serial="ro"))
    write(machine, "ro", 9)
    machine.add_disk(Disk(path=image, serial="another"))
    before = image.read_bytes()
    machine.remove_disk("another")
    machine.remove_disk("ro")
    assert image.read_bytes() == before
    machine.add_disk(Disk(path=image, serial="rw", write=True))
    write(machine, "rw", 9)
    assert holds(image, 9, "raw")
    with pytest.raises(CloudError, match="rw"):
        save(machine)
    machine.remove_disk("rw")
    assert image.exists()
    save(machine)


@pytest.mark.parametrize(
    ("disk", "error", "words"),
    [
        (0, ValueError, "disk: size_gib is 0, expected 1 to 65536"),
        (True, TypeError, "not True"),
        (Disk(1, serial="disk1"), ValueError, "disk1"),
        (Disk(path="/no/such/file"), FileNotFoundError, "/no/such/file"),
    ],
)
def test_disk_that_cannot_be_is_refused(
    machine: QemuInstance, disk: Any, error: type[Exception], words: str
) -> None:
    before = sorted(machine.instance_dir.iterdir())
    with pytest.raises(error, match=words):
        machine.add_disk(disk)
    assert sorted(machine.instance_dir.iterdir()) == before
    assert runs(machine)


def test_unknown_disk_is_not_removed(machine: QemuInstance) -> None:
    with pytest.raises(CloudError, match=r"'nosuch'.*it has: disk1, scratch"):
        machine.remove_disk("nosuch")


def test_machine_that_is_off_gets_no_disk(machine: QemuInstance) -> None:
    machine.machine.kill()
    with pytest.raises(MachineEndedError):
        machine.add_disk(1)
    with pytest.raises(MachineEndedError):
        machine.remove_disk("disk1")
    assert machine.machine.state is State.OFF


def test_disk_that_qemu_refuses_leaves_nothing(
    machine: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(machine.instance_dir.iterdir())
    execute = QmpSession.execute

    def refuse(
        self: QmpSession, command: str, arguments: Any = None, *, timeout: float = 30
    ) -> Any:
        if command == "device_add":
            arguments = {**arguments, "bus": "no-such-bus"}
        return execute(self, command, arguments, timeout=timeout)

    with monkeypatch.context() as patch:
        patch.setattr(QmpSession, "execute", refuse)
        with pytest.raises(CloudError, match="no-such-bus"):
            machine.add_disk(1)
    assert sorted(machine.instance_dir.iterdir()) == before
    assert machine.machine.execute("query-fdsets") == []
    assert machine.add_disk(1).serial == "disk3"


def test_machine_saved_by_a_program_that_was_killed_is_found(
    cloud: Qemu, machine: QemuInstance
) -> None:
    """Its disks are known from its directory alone."""
    again = cloud.get_instance(machine.id)
    assert again.machine.spec.disks == machine.machine.spec.disks
    assert qemus(machine.instance_dir) == [machine.machine.pid]
    assert time.time() - machine.machine.rundir.created < 600


def test_machine_whose_description_was_damaged_can_be_powered_off(machine: QemuInstance) -> None:
    before = machine.machine.spec
    (machine.instance_dir / "machine.json").write_text("{")
    with machine.machine.changing():
        assert machine.machine.spec == before
        machine.machine.kill()
    assert machine.machine.state is State.OFF
