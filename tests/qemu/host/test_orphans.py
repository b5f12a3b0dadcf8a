"""Programs that die take their machines along, those that end leave them; prune finds the rest."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pycloudlib import Qemu
from pycloudlib.qemu.host.ownership import Orphans, Ownership, create_owned_directory
from pycloudlib.qemu.host.processes import ProcessIdentity
from tests.qemu.conftest import CloudMaker
from tests.qemu.machines import SMALL, alive, becomes, qemus

pytestmark = pytest.mark.qemu

# What a program may leave: machines, a copy, a snapshot of each kind, a key.
PROGRAM = f"""
import io, os, signal, sys, time
from pycloudlib import Qemu
config, image, orphans, end = sys.argv[1:]
cloud = Qemu("left", timestamp_suffix=False, config_file=io.StringIO(config), orphans=orphans)
vm = cloud.launch(image, "{SMALL}")
vm.banner_timeout = 0.2
print(vm.id, vm.machine.pid, flush=True)
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if end == "term":
    os.kill(os.getpid(), signal.SIGTERM)
if end == "exception":
    raise RuntimeError("as programs do")
if end == "_exit":
    os._exit(0)
if end == "stay":
    time.sleep(600)
"""

WORKER = f"""
import io, multiprocessing, sys
from pycloudlib import Qemu

def work(config, image):
    cloud = Qemu("left", timestamp_suffix=False, config_file=io.StringIO(config))
    vm = cloud.launch(image, "{SMALL}")
    print(vm.id, vm.machine.pid, flush=True)

if __name__ == "__main__":
    worker = multiprocessing.get_context("fork").Process(target=work, args=sys.argv[1:3])
    worker.start()
    worker.join()
"""


@pytest.fixture
def config(working_dir: Path) -> Iterator[str]:
    """Give a configuration; whatever programs leave is removed at the end."""
    yield f'[qemu]\nworking_dir = "{working_dir}"\naccelerator = "tcg"\n'
    for pid in qemus(working_dir):
        os.kill(pid, signal.SIGKILL)


@contextmanager
def program(text: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program; the processes that it starts are ours to look for by its session."""
    with subprocess.Popen(
        [sys.executable, "-c", text, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def run(text: str, *arguments: str) -> tuple[str, int]:
    """Run a program to its end; give the id and the pid of its machine."""
    with program(text, *arguments) as process:
        output, _ = process.communicate(timeout=120)
    instance_id, pid = output.split()
    return instance_id, int(pid)


def directory_of(instance_id: str) -> Path:
    return Path(instance_id.partition("::")[0]).parent


def stays(instance_id: str, cloud: Qemu, *, stopped: bool = False) -> bool:
    """Say whether a machine is none of those that are removed; keys of dead programs may be."""
    directory = directory_of(instance_id)
    return str(directory) not in cloud.prune(stopped=stopped) and directory.is_dir()


def guardians(owner: int) -> list[int]:
    """List the processes that watch a program, by their command line."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"-IS" in words and str(owner).encode() in words and alive(int(directory.name)):
            found.append(int(directory.name))
    return found


@pytest.mark.parametrize("end", ["kill", "term", "_exit"])
def test_machine_ends_with_a_program_that_dies(end: str, config: str, tiny_image: Path) -> None:
    _, pid = run(PROGRAM, config, str(tiny_image), "reap-after-crash", end)
    assert becomes(lambda: not alive(pid))


@pytest.mark.parametrize("end", ["normal", "exception"])
def test_machine_outlives_a_program_that_ends(
    end: str, config: str, tiny_image: Path, cloud: Qemu
) -> None:
    instance_id, pid = run(PROGRAM, config, str(tiny_image), "reap-after-crash", end)
    time.sleep(0.7)  # longer than whoever watches takes
    assert alive(pid)
    assert stays(instance_id, cloud, stopped=True)
    vm = cloud.get_instance(instance_id)
    assert vm.machine.pid == pid
    assert vm.delete() == []
    cloud.prune()


def test_machine_outlives_a_worker_that_ends(config: str, tiny_image: Path, cloud: Qemu) -> None:
    instance_id, pid = run(WORKER, config, str(tiny_image))
    time.sleep(0.7)
    assert alive(pid)
    assert stays(instance_id, cloud)
    assert cloud.get_instance(instance_id).delete() == []
    cloud.prune()


def test_machine_that_is_to_be_kept_outlives_any_end(
    config: str, tiny_image: Path, cloud: Qemu
) -> None:
    instance_id, pid = run(PROGRAM, config, str(tiny_image), "keep", "kill")
    time.sleep(0.7)
    assert alive(pid)
    assert stays(instance_id, cloud, stopped=True)
    assert cloud.get_instance(instance_id).delete() == []
    cloud.prune()


def test_machine_that_is_to_be_reaped_ends_with_a_normal_end_too(
    config: str, tiny_image: Path, cloud: Qemu
) -> None:
    instance_id, pid = run(PROGRAM, config, str(tiny_image), "reap", "normal")
    assert becomes(lambda: not alive(pid))
    directory = directory_of(instance_id)
    assert directory.is_dir()
    assert str(directory) in cloud.prune()
    assert not directory.exists()


def test_watcher_ends_with_its_program(config: str, tiny_image: Path) -> None:
    with program(PROGRAM, config, str(tiny_image), "reap-after-crash", "stay") as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline().split()[1])
        (watcher,) = guardians(process.pid)
        process.kill()
        process.wait()
        assert becomes(lambda: not alive(pid))
        assert becomes(lambda: not alive(watcher))


def test_watcher_that_was_killed_is_replaced_with_the_next_machine(
    config: str, tiny_image: Path
) -> None:
    text = PROGRAM.replace(
        "if end",
        "from pycloudlib.qemu.host import ownership as guardian\n"
        "watcher = guardian.find_guardian().pid\n"
        "os.kill(watcher, signal.SIGKILL)\n"
        "os.waitpid(watcher, os.WNOHANG | os.WUNTRACED)\n"
        "time.sleep(0.2)\n"
        "second = cloud.launch(image)\n"
        "if end",
        1,
    )
    _, pid = run(text, config, str(tiny_image), "reap-after-crash", "kill")
    assert becomes(lambda: not alive(pid)), "it knows those of before"


def test_one_that_others_switched_on_is_theirs(
    config: str, tiny_image: Path, make_cloud: CloudMaker
) -> None:
    cloud = make_cloud("left")
    with program(PROGRAM, config, str(tiny_image), "reap-after-crash", "stay") as process:
        assert process.stdout is not None
        vm = cloud.get_instance(process.stdout.readline().split()[0])
        vm.machine.kill()
        vm.machine.power_on()
        process.kill()
        process.wait()
        time.sleep(0.7)
        assert alive(vm.machine.pid)
        assert stays(vm.id, cloud)
    assert vm.delete() == []


def test_what_a_killed_program_left_is_removed(
    config: str, tiny_image: Path, cloud: Qemu, working_dir: Path
) -> None:
    text = PROGRAM.replace(
        "if end",
        "first = cloud.snapshot(vm, memory=True)\n"
        "copy = cloud.launch(first)\n"
        "second = cloud.snapshot(copy, memory=True)\n"
        "if end",
        1,
    )
    instance_id, _ = run(text, config, str(tiny_image), "reap-after-crash", "kill")
    parent_dir = directory_of(instance_id).parent
    assert len(list((parent_dir / "snapshots").glob("*.img"))) == 2
    assert becomes(lambda: qemus(working_dir) == [])
    removed = cloud.prune()
    assert str(parent_dir) in removed
    assert not parent_dir.exists()
    assert cloud.prune() == []


def test_what_is_alive_or_foreign_stays(cloud: Qemu, tiny_image: Path, working_dir: Path) -> None:
    vm = cloud.launch(str(tiny_image), SMALL, launch_args=["-S"])
    off = cloud.launch(str(tiny_image), SMALL, launch_args=["-S"])
    off.machine.kill()
    foreign = cloud.parent_dir / "mine"
    foreign.mkdir()
    (foreign / "file").write_text("of the user")
    other = working_dir / "elsewhere"
    other.mkdir()
    assert cloud.prune(stopped=True) == []
    assert alive(vm.machine.pid)
    assert off.instance_dir.is_dir()
    assert (foreign / "file").exists()
    assert other.is_dir()
    (foreign / "file").unlink()
    foreign.rmdir()
    other.rmdir()


def test_machine_that_was_left_off_is_removed_when_asked_for(
    config: str, tiny_image: Path, cloud: Qemu
) -> None:
    text = PROGRAM.replace("if end", "vm.machine.kill()\nif end", 1)
    instance_id, _ = run(text, config, str(tiny_image), "reap-after-crash", "normal")
    directory = directory_of(instance_id)
    assert stays(instance_id, cloud)
    assert str(directory) in cloud.prune(stopped=True)
    assert not directory.exists()


def test_qemu_that_nobody_watches_any_more_is_ended(
    config: str, tiny_image: Path, cloud: Qemu
) -> None:
    """As when the kernel, short of memory, has killed both the program and its watcher."""
    with program(PROGRAM, config, str(tiny_image), "reap-after-crash", "stay") as process:
        assert process.stdout is not None
        instance_id, pid = process.stdout.readline().split()
        (watcher,) = guardians(process.pid)
        os.kill(watcher, signal.SIGKILL)
        process.kill()
        process.wait()
    time.sleep(0.5)
    assert alive(int(pid))
    assert str(directory_of(instance_id)) in cloud.prune()
    assert not alive(int(pid))


def test_directory_that_was_being_made_is_removed(cloud: Qemu, working_dir: Path) -> None:
    parent_dir = working_dir / "pycl-qemu-gone"
    dead = subprocess.run(["true"], check=True)
    assert dead.returncode == 0
    staged = parent_dir / ".vm-1.4194304-77.new"
    staged.mkdir(parents=True)
    me = ProcessIdentity.find(os.getpid())
    assert me is not None
    mine = parent_dir / f".vm-2.{me.pid}-{me.start_time}.new"
    mine.mkdir()
    assert cloud.prune() == [str(staged)]
    assert mine.is_dir()
    mine.rmdir()
    assert cloud.prune() == [str(parent_dir)]


def test_owned_directory_is_new(tmp_path: Path) -> None:
    made = create_owned_directory(tmp_path / "parent" / "vm", Orphans.KEEP)
    found = Ownership.find(made)
    assert found is not None
    assert found.process.pid == os.getpid()
    assert not found.is_orphaned
    with pytest.raises(FileExistsError):
        create_owned_directory(made, Orphans.KEEP)
    assert [file.name for file in made.parent.iterdir()] == ["vm"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"pid": "x", "start": 1}'])
def test_damaged_note_belongs_to_nobody(text: str, tmp_path: Path) -> None:
    (tmp_path / ".owner").write_text(text)
    assert Ownership.find(tmp_path) is None


@pytest.mark.parametrize("value", ["yes", "", "REAP"])
def test_wrong_choice_is_told(value: str) -> None:
    with pytest.raises(ValueError, match="expected one of reap-after-crash, keep, reap"):
        Qemu("t", orphans=value)
    section = io.StringIO(f'[qemu]\norphans = "{value or 1}"\n')
    with pytest.raises(ValueError, match="orphans"):
        Qemu("t", config_file=section)


BUSY = f"""
import io, sys
from pycloudlib import Qemu
config, image = sys.argv[1:]
print("begun", flush=True)
while True:
    with Qemu("busy", config_file=io.StringIO(config)) as cloud:
        vm = cloud.launch(image, "{SMALL}")
        vm.banner_timeout = 0.2
        saved = cloud.snapshot(vm, memory=True)
        copy = cloud.launch(saved)
        copy.rollback(saved)
        copy.delete()
        cold = cloud.launch(image, "{SMALL}", launch_args=["-S"])
        cloud.snapshot(cold, clean=False)
"""


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.thorough)])
def test_killed_at_any_moment_it_leaves_nothing_that_is_not_found(
    kills: int, config: str, tiny_image: Path, cloud: Qemu, working_dir: Path
) -> None:
    moments = random.Random(kills)
    for _ in range(kills):
        with program(BUSY, config, str(tiny_image)) as process:
            assert process.stdout is not None
            process.stdout.readline()
            watched = process.pid
            time.sleep(moments.uniform(0, 2.5))
            process.kill()
            process.wait()
        assert becomes(lambda: qemus(working_dir) == []), "QEMU goes with its program"
        assert becomes(lambda pid=watched: guardians(pid) == [])  # type: ignore[misc]
        pruned = cloud.prune()
        assert sorted(working_dir.rglob("*")) == [], pruned
