"""Machines of other containers and hosts in the same `working_dir`: told of, and let alone."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pycloudlib import Qemu
from pycloudlib.cli.machines import find_machine, list_machines
from pycloudlib.errors import CloudError
from pycloudlib.qemu.host.ownership import Ownership
from pycloudlib.qemu.host.processes import World
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.vm.running import MachineElsewhereError
from tests.qemu.conftest import CloudMaker
from tests.qemu.machines import SMALL, alive, becomes, qemus
from tests.worlds import WITHOUT_PROC, run_inside, unsharing

pytestmark = pytest.mark.qemu

PROGRAM = f"""
import io, sys
from pycloudlib import Qemu
config, image = sys.argv[1:]
cloud = Qemu("inner", timestamp_suffix=False, config_file=io.StringIO(config))
vm = cloud.launch(image, "{SMALL}", launch_args=["-S"])
print(vm.id, flush=True)
sys.stdin.read()
"""

LOOK = """
import io, json, sys
from pathlib import Path
from pycloudlib import Qemu
from pycloudlib.cli.machines import list_machines
config, instance_id = sys.argv[1:]
cloud = Qemu("look", timestamp_suffix=False, config_file=io.StringIO(config))
pruned = cloud.prune(stopped=True)
(machine,) = list_machines(cloud.working_dir, everywhere=True)
vm = cloud.get_instance(instance_id)
told = []
for refused in (vm.machine.power_on, vm.machine.kill, vm.shutdown, vm.wait_for_stop):
    try:
        refused()
    except Exception as error:
        told.append(f"{type(error).__name__}: {error}")
status = vm.get_status()
told += map(str, vm.delete())
print(json.dumps([pruned, machine.state, machine.place, status, told]))
"""


def config_of(working_dir: Path) -> str:
    return f'[qemu]\nworking_dir = "{working_dir}"\naccelerator = "tcg"\n'


@contextmanager
def machine_inside(
    enter: list[str], working_dir: Path, image: Path
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Launch a machine in another PID namespace, whose program stays; give its id."""
    with subprocess.Popen(
        [*enter, sys.executable, "-c", PROGRAM, config_of(working_dir), str(image)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.mark.parametrize("proc", [True, False])
def test_machine_of_a_container_is_seen_from_its_host(
    proc: bool, cloud: Qemu, tiny_image: Path, working_dir: Path
) -> None:
    enter = unsharing() if proc else unsharing(WITHOUT_PROC)
    with machine_inside(enter, working_dir, tiny_image) as (process, instance_id):
        (pid,) = qemus(working_dir)
        assert cloud.prune(stopped=True) == []
        (found,) = list_machines(working_dir, everywhere=True)
        assert (found.state, found.pid, found.place) == ("running", pid, "")
        vm = cloud.get_instance(instance_id)
        assert vm.machine.pid == pid
        assert vm.machine.execute("query-name")["name"] == vm.name
        assert alive(pid)
        process.kill()
        process.wait()
        assert becomes(lambda: qemus(working_dir) == [])
    # A process that ends has no command line a moment before its pidfd reports the end.
    assert becomes(lambda: vm.get_status() == "off")
    gone = cloud.prune()
    assert (str(vm.instance_dir) in gone) is World.own().shows_all
    assert vm.delete() == []
    cloud.prune()


@pytest.mark.parametrize("proc", [True, False])
def test_machine_ends_with_its_program_inside_a_container(
    proc: bool, cloud: Qemu, tiny_image: Path, working_dir: Path
) -> None:
    """Nothing but the guardian ends it: the namespace's first process goes on."""
    enter = unsharing() if proc else unsharing(WITHOUT_PROC)
    program = (
        "import os, subprocess, sys, time\n"
        "with subprocess.Popen([sys.executable, '-c', *sys.argv[1:]], stdout=-1) as child:\n"
        "    child.stdout.readline()\n"
        "    child.kill()\n"
        "print('killed', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [*enter, sys.executable, "-c", program, PROGRAM, config_of(working_dir), str(tiny_image)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "killed\n"
        assert becomes(lambda: qemus(working_dir) == [])
        assert process.poll() is None
        process.kill()
    cloud.prune()
    for machine in list_machines(working_dir, everywhere=True):
        assert cloud.get_instance(machine.id).delete() == []
    cloud.prune()


def test_machine_of_the_host_is_let_alone_in_a_container(
    unstarted: QemuInstance, working_dir: Path
) -> None:
    pid = unstarted.machine.pid
    answer = run_inside(LOOK, config_of(working_dir), unstarted.id)
    pruned, listed, place, status, told = json.loads(answer)
    assert pruned == []
    assert (listed, status) == ("elsewhere", "elsewhere")
    assert f"process {pid} in another PID namespace" in place
    assert len(told) == 5
    assert all("runs elsewhere" in error and place in error for error in told)
    assert alive(pid)
    assert unstarted.machine.execute("query-name")["name"] == unstarted.name


def test_machine_that_is_off_there_can_be_deleted_by_name(
    unstarted: QemuInstance, working_dir: Path
) -> None:
    """On one kernel, QEMU's lock on its disk tells whether it runs; `prune` keeps to its owner."""
    unstarted.machine.kill()
    answer = run_inside(LOOK, config_of(working_dir), unstarted.id)
    pruned, listed, place, *_ = json.loads(answer)
    assert (pruned, listed, place) == ([], "off", "")
    assert not unstarted.instance_dir.exists()


def of_other_host(file: Path) -> None:
    """Let a note be one of a program on another host."""
    noted: dict[str, Any] = json.loads(file.read_bytes())
    world = World.parse(noted["world"])
    other = dataclasses.replace(world, boot="0" * 32, host="f" * 16)
    file.write_text(json.dumps({**noted, "world": str(other), "host": "ci-3"}))


def test_machine_of_another_host_is_let_alone(
    cloud: Qemu, unstarted: QemuInstance, make_cloud: CloudMaker
) -> None:
    """Nothing of this kernel tells of it: it is off here, and may run there."""
    unstarted.machine.kill()
    process, owner = unstarted.instance_dir / "process.json", unstarted.instance_dir / ".owner"
    kept = process.read_bytes(), owner.read_bytes()
    of_other_host(process)
    of_other_host(owner)
    other = make_cloud("other")
    assert other.prune(stopped=True) == []
    found = find_machine(cloud.working_dir, f"t/{unstarted.name}")
    assert found.state == "elsewhere"
    assert found.pid is None
    assert "on ci-3" in found.place
    vm = other.get_instance(unstarted.id)
    with pytest.raises(MachineElsewhereError, match="on ci-3"):
        vm.machine.power_on()
    (error,) = vm.delete()
    assert isinstance(error, CloudError)
    assert vm.instance_dir.is_dir()
    process.write_bytes(kept[0])
    owner.write_bytes(kept[1])


def test_machine_of_an_earlier_boot_is_removed(cloud: Qemu, unstarted: QemuInstance) -> None:
    unstarted.machine.kill()
    for name in ("process.json", ".owner"):
        file = unstarted.instance_dir / name
        noted = json.loads(file.read_bytes())
        world = dataclasses.replace(World.parse(noted["world"]), boot="0" * 32)
        file.write_text(json.dumps({**noted, "world": str(world)}))
    assert unstarted.get_status() == "off"
    assert cloud.prune() == [str(unstarted.instance_dir)]


def test_program_whose_host_was_renamed_leaves_its_machines(
    tiny_image: Path, cloud: Qemu, working_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a laptop in another network: it is the same program at its end."""
    from pycloudlib.qemu.host import ownership  # noqa: PLC0415 - what runs at the end of a program

    vm = cloud.launch(str(tiny_image), SMALL, launch_args=["-S"])
    own = World.own()
    renamed = dataclasses.replace(own, host="f" * 16, name="renamed")
    monkeypatch.setattr(World, "own", lambda: renamed)
    ownership.leave_all()
    found = Ownership.find(vm.instance_dir)
    assert found is not None
    assert found.left


def test_disk_that_another_mount_names_is_the_same(
    unstarted: QemuInstance, cloud: Qemu, tmp_path: Path
) -> None:
    """As a home directory that has another path in a container."""
    link = tmp_path / "mounted"
    link.symlink_to(cloud.working_dir)
    config = f'[qemu]\nworking_dir = "{link}"\naccelerator = "tcg"\n'
    other = Qemu("other", timestamp_suffix=False, config_file=io.StringIO(config))
    (found,) = list_machines(other.working_dir, everywhere=True)
    assert (found.state, found.pid) == ("running", unstarted.machine.pid)
