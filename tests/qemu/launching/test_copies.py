"""Copies of a saved machine run at once, share what none has changed, and can be told apart."""

from __future__ import annotations

import gc
import json
import logging
import os
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from pycloudlib import Qemu
from pycloudlib.errors import CloudError, ImageInUseError
from pycloudlib.guest.data.seed import read_iso
from pycloudlib.qemu.disk.layers import chain
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.launching.beginning import Copy, Host
from pycloudlib.qemu.saved import restoring
from pycloudlib.qemu.state import savedmachine
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.state.savedmachine import SavedMachine
from pycloudlib.qemu.vm.running import MachineEndedError
from tests.qemu.conftest import CloudMaker
from tests.qemu.machines import (
    becomes,
    descriptors,
    hurry,
    mode,
    qemus,
    run,
    runs,
    save,
    touch,
)

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("own_ports")]


@pytest.fixture
def image(saved: SavedMachine) -> str:
    return str(saved.image)


def instance_dirs(cloud: Qemu) -> list[Path]:
    return sorted(rundir.path for rundir in RunDirectory.list_in(cloud.parent_dir))


def maps(pid: int | None, file: Path) -> bool:
    """Say whether a process has a file in its address space."""
    return str(file) in Path(f"/proc/{pid}/maps").read_text()


def test_copy_runs_at_once(cloud: Qemu, running: QemuInstance, image: str) -> None:
    copy = cloud.launch(image)
    assert runs(copy)
    assert copy.id != running.id
    assert copy.name != running.name
    assert {copy.port, copy.telnet_port}.isdisjoint({running.port, running.telnet_port})
    assert copy.machine.spec.mac == running.machine.spec.mac
    assert copy.machine.spec.instance_type == running.machine.spec.instance_type
    assert runs(running)


def test_copies_share_memory_and_disk(cloud: Qemu, saved: SavedMachine, image: str) -> None:
    before = (saved.memory.read_bytes(), saved.image.read_bytes())
    made = [cloud.launch(image) for _ in range(3)]
    for copy in made:
        assert maps(copy.machine.pid, saved.memory)
        assert chain(copy.instance_path)[:2] == [copy.instance_path, saved.image]
    assert (saved.memory.read_bytes(), saved.image.read_bytes()) == before
    assert saved.find_obstacle(saved.host) is None


def test_copys_files_are_their_owners_alone(cloud: Qemu, image: str) -> None:
    copy = cloud.launch(image, user_data="#!/bin/sh\n")
    assert mode(copy.instance_dir) == 0o700
    loose = {file.name for file in copy.instance_dir.iterdir() if mode(file) & 0o077}
    assert loose <= {"id_ed25519.pub"}


def test_copy_has_the_seed_and_host_keys_of_the_saved_machine(
    cloud: Qemu, running: QemuInstance, image: str
) -> None:
    copy = cloud.launch(image)
    for name in ("seed.iso", "known_hosts"):
        assert (copy.instance_dir / name).read_bytes() == (running.instance_dir / name).read_bytes()


def test_copy_that_is_somebody_of_its_own_has_another_seed(
    cloud: Qemu, running: QemuInstance, image: str
) -> None:
    copy = cloud.launch(image, fresh_identity=True)
    assert runs(copy)
    ours, theirs = (instance.instance_dir / "seed.iso" for instance in (copy, running))
    assert ours.stat().st_size == theirs.stat().st_size
    meta_data = yaml.safe_load(read_iso(ours).meta_data)
    assert meta_data["local-hostname"] == copy.name
    assert meta_data["instance-id"] != yaml.safe_load(read_iso(theirs).meta_data)["instance-id"]
    known = [(i.instance_dir / "known_hosts").read_text() for i in (copy, running)]
    assert known[0] != known[1]
    fix_up = json.loads((copy.instance_dir / "fix-up.json").read_text())
    assert fix_up["identity"]["hostname"] == copy.name
    assert fix_up["identity"]["instance_id"] == meta_data["instance-id"]


def test_source_may_be_deleted_first(cloud: Qemu, running: QemuInstance, image: str) -> None:
    first = cloud.launch(image)
    assert running.delete() == []
    assert runs(first)
    assert runs(cloud.launch(image))


def test_image_stays_while_copies_live(cloud: Qemu, saved: SavedMachine, image: str) -> None:
    copy = cloud.launch(image)
    with pytest.raises(ImageInUseError, match=copy.name):
        cloud.delete_image(image)
    assert saved.memory.exists()
    assert saved.image.exists()
    assert copy.delete() == []
    cloud.delete_image(image)
    assert not saved.image.exists()
    assert not saved.directory.exists()


def test_image_may_be_deleted_while_its_source_lives(
    cloud: Qemu, running: QemuInstance, saved: SavedMachine, image: str
) -> None:
    cloud.delete_image(image)
    assert not saved.directory.exists()
    assert runs(running)
    assert runs(cloud.launch(str(save(running).image)))


def test_copy_is_saved_and_copied_in_turn(cloud: Qemu, image: str) -> None:
    copy = cloud.launch(image)
    again = save(copy)
    assert runs(copy)
    third = cloud.launch(str(again.image))
    assert runs(third)
    assert copy.delete() == []
    with pytest.raises(ImageInUseError):
        cloud.delete_image(image)
    assert runs(cloud.launch(str(save(third).image)))


def test_copy_is_switched_off_and_on_as_any_machine(cloud: Qemu, image: str) -> None:
    copy = cloud.launch(image)
    copy.machine.kill()
    copy.start(wait=False)
    assert runs(copy)


def test_copy_is_found_by_its_id(cloud: Qemu, image: str) -> None:
    copy = cloud.launch(image)
    assert runs(cloud.get_instance(copy.id))


def test_another_process_starts_copies(
    cloud: Qemu, working_dir: Path, image: str, running: QemuInstance
) -> None:
    program = """
        import io, sys
        from pycloudlib import Qemu
        cloud = Qemu("t", timestamp_suffix=False, config_file=io.StringIO(sys.argv[1]))
        print(cloud.launch(sys.argv[2]).id)
    """
    config = f'[qemu]\nworking_dir = "{working_dir}"\naccelerator = "tcg"\n'
    told = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), config, image],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    copy = cloud.get_instance(told.stdout.strip())
    try:
        assert runs(copy)
        with pytest.raises(ImageInUseError, match=copy.name):
            cloud.delete_image(image)
        again = save(copy)
        assert runs(copy)
        assert runs(cloud.launch(str(again.image)))
    finally:
        assert copy.delete() == []


def test_many_threads_start_copies(cloud: Qemu, image: str) -> None:
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda _: cloud.launch(image), range(6)))
    assert len({copy.id for copy in made}) == 6
    assert all(runs(copy) for copy in made)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("instance_type", "c2m64"),
        ("instance_type", "c1m65"),
        ("kernel_cmdline", "quiet"),
        ("kernel_path", "/boot/vmlinuz"),
        ("launch_args", ["-device", "pvpanic"]),
        ("vendor_data", "#cloud-config\n"),
        ("meta_data", {"a": 1}),
        ("network_config", {"version": 2}),
        ("no_seed_iso", True),
    ],
)
def test_option_that_would_change_the_machine_is_named(
    cloud: Qemu, image: str, name: str, value: Any
) -> None:
    before = instance_dirs(cloud)
    with pytest.raises(ValueError, match=f"cannot be changed by {name}:"):
        cloud.launch(image, **{name: value})
    assert instance_dirs(cloud) == before


def test_all_options_that_would_change_it_are_named(cloud: Qemu, image: str) -> None:
    with pytest.raises(ValueError, match="instance_type, meta_data, no_seed_iso"):
        cloud.launch(image, "c2m64", meta_data={"a": 1}, no_seed_iso=True)


@pytest.mark.parametrize(
    "options",
    [{"instance_type": "c1m64"}, {"instance_type": None}, {"launch_args": []}],
    ids=["same size", "no size", "no arguments"],
)
def test_option_that_changes_nothing_is_taken(
    cloud: Qemu, image: str, options: dict[str, Any]
) -> None:
    assert runs(cloud.launch(image, **options))


def test_user_data_of_a_wrong_kind_is_refused_before_anything_is_made(
    cloud: Qemu, image: str
) -> None:
    before = instance_dirs(cloud)
    with pytest.raises(ValueError, match="disk_setup"):
        cloud.launch(image, user_data="#cloud-config\ndisk_setup: {}\n")
    assert instance_dirs(cloud) == before


def test_user_data_is_kept_for_the_first_wait(cloud: Qemu, image: str) -> None:
    copy = cloud.launch(image, user_data="#!/bin/sh\necho hello\n")
    assert runs(copy)
    assert "base64" in (copy.instance_dir / "first-run").read_text()


@pytest.mark.parametrize("fresh_identity", [False, True])
def test_later_boots_find_the_user_data_of_a_copy_on_its_seed(
    cloud: Qemu, running: QemuInstance, image: str, fresh_identity: bool
) -> None:
    user_data = "#!/bin/sh\r\necho grüße\r\n"
    copy = cloud.launch(image, user_data=user_data, fresh_identity=fresh_identity)
    ours, theirs = (read_iso(i.instance_dir / "seed.iso") for i in (copy, running))
    assert ours.user_data == user_data.encode()
    assert (ours.meta_data == theirs.meta_data) is not fresh_identity
    sizes = {(i.instance_dir / "seed.iso").stat().st_size for i in (copy, running)}
    assert len(sizes) == 1
    assert runs(copy)


@pytest.mark.parametrize("user_data", ["", " \n", b"", "#cloud-config\n"])
def test_user_data_of_nothing_asks_for_nothing(
    cloud: Qemu, image: str, user_data: str | bytes
) -> None:
    assert not (cloud.launch(image, user_data=user_data).instance_dir / "first-run").exists()


# What cannot go on here boots from its disk.


def truncate(saved: SavedMachine) -> None:
    os.truncate(saved.memory, 1 << 20)


def touch_memory(saved: SavedMachine) -> None:
    touch(saved.memory)


def touch_state(saved: SavedMachine) -> None:
    touch(saved.state)


def remove_memory(saved: SavedMachine) -> None:
    saved.memory.unlink()


def remove_state(saved: SavedMachine) -> None:
    saved.state.unlink()


def damage_facts(saved: SavedMachine) -> None:
    (saved.directory / "saved.json").write_text("{")


def change_format(saved: SavedMachine) -> None:
    file = saved.directory / "saved.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 0}))


def damage_state_unseen(saved: SavedMachine) -> None:
    facts = saved.state.stat()
    with saved.state.open("r+b") as file:
        file.seek(2000)
        file.write(b"\xff" * 4000)
    os.utime(saved.state, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def empty_state_unseen(saved: SavedMachine) -> None:
    facts = saved.state.stat()
    saved.state.write_bytes(bytes(facts.st_size))
    os.utime(saved.state, ns=(facts.st_atime_ns, facts.st_mtime_ns))


DAMAGES: list[Callable[[SavedMachine], None]] = [
    truncate,
    touch_memory,
    touch_state,
    remove_memory,
    remove_state,
    damage_facts,
    change_format,
    damage_state_unseen,
    empty_state_unseen,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_one_boots_from_its_disk_with_a_warning(
    cloud: Qemu,
    saved: SavedMachine,
    image: str,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[SavedMachine], None],
) -> None:
    damage(saved)
    before = set(instance_dirs(cloud))
    instance = cloud.launch(image)
    assert runs(instance)
    assert not maps(instance.machine.pid, saved.memory)
    assert [r.levelno for r in caplog.records if "disk" in r.message] == [logging.WARNING]
    assert set(instance_dirs(cloud)) - before == {instance.instance_dir}


def test_one_of_another_qemu_boots_from_its_disk(
    cloud: Qemu,
    saved: SavedMachine,
    image: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(savedmachine, "host_fingerprint", lambda _binary, _accelerator: "another")
    instance = cloud.launch(image)
    assert runs(instance)
    assert "another QEMU" in caplog.text
    assert instance.machine.spec.instance_type == saved.spec.instance_type


def test_one_that_boots_keeps_its_seed_key_and_host_keys(
    cloud: Qemu, running: QemuInstance, saved: SavedMachine, image: str
) -> None:
    """Its disk has booted already, so cloud-init leaves its host keys as they are."""
    touch_state(saved)
    instance = cloud.launch(image)
    for name in ("seed.iso", "known_hosts"):
        kept, first = (i.instance_dir / name for i in (instance, running))
        assert kept.exists(), name
        assert kept.read_bytes() == first.read_bytes()
    assert instance.key_pair.public_key_content == running.key_pair.public_key_content


def test_one_that_boots_can_be_somebody_of_its_own(
    cloud: Qemu, running: QemuInstance, saved: SavedMachine, image: str
) -> None:
    touch_state(saved)
    instance = cloud.launch(image, fresh_identity=True)
    ours, theirs = (
        yaml.safe_load(read_iso(i.instance_dir / "seed.iso").meta_data) for i in (instance, running)
    )
    assert ours["instance-id"] != theirs["instance-id"]
    assert ours["local-hostname"] == instance.name


@pytest.mark.parametrize("fresh_identity", [False, True])
def test_user_data_of_one_that_boots_is_taken_once(
    cloud: Qemu, saved: SavedMachine, image: str, fresh_identity: bool
) -> None:
    """By cloud-init, if the boot is a first one to it; otherwise as in a copy that goes on."""
    touch_state(saved)
    instance = cloud.launch(image, user_data="#!/bin/sh\n", fresh_identity=fresh_identity)
    by_cloud_init = read_iso(instance.instance_dir / "seed.iso").user_data == b"#!/bin/sh\n"
    assert by_cloud_init == fresh_identity
    assert (instance.instance_dir / "first-run").exists() != by_cloud_init


def test_key_to_log_in_goes_with_a_copy_that_is_kept(
    make_cloud: CloudMaker, tiny_image: Path, tmp_path: Path
) -> None:
    cloud = make_cloud("first")
    copy = hurry(cloud.launch(str(save(run(cloud, tiny_image)).image)))
    kept = cloud.snapshot(copy, memory=True, path=tmp_path / "kept.img")
    assert cloud.clean() == []
    key = make_cloud("second").launch(kept).key_pair.private_key_path
    assert key is not None
    assert Path(key).exists()


# Copies of a running machine, without an image of one's own.


def test_fork_gives_running_copies(cloud: Qemu, running: QemuInstance) -> None:
    pid = running.machine.pid
    made = running.fork(3)
    assert len({copy.id for copy in made}) == 3
    assert all(runs(copy) for copy in made)
    assert runs(running)
    assert running.machine.pid == pid
    assert set(made) <= set(cloud.created_instances)


def test_forks_of_a_fork_outlive_it(running: QemuInstance) -> None:
    (first,) = running.fork()
    (second,) = hurry(first).fork()
    assert first.delete() == []
    assert running.delete() == []
    assert runs(second)


@pytest.mark.parametrize("count", [0, -1, True, 1.5, "3", None])
def test_odd_number_of_forks_is_refused(running: QemuInstance, count: Any) -> None:
    pid = running.machine.pid
    with pytest.raises(ValueError, match="positive number"):
        running.fork(count)
    assert running.machine.pid == pid


def test_machine_that_is_off_is_not_forked(running: QemuInstance) -> None:
    running.machine.kill()
    with pytest.raises(MachineEndedError):
        running.fork()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_fork_that_fails_leaves_no_copy(
    cloud: Qemu, running: QemuInstance, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    write = Copy.write_files
    lock = threading.Lock()
    calls = [0]

    def fail_once(*arguments: Any) -> None:
        with lock:
            number, calls[0] = calls[0], calls[0] + 1
        if number == failing:
            raise CloudError("no more")
        write(*arguments)

    monkeypatch.setattr(Copy, "write_files", fail_once)
    with pytest.raises(CloudError, match="no more"):
        running.fork(3)
    assert instance_dirs(cloud) == [running.instance_dir]
    assert cloud.created_instances == [running]
    assert runs(running)


def test_copy_that_fails_leaves_nothing(
    cloud: Qemu, running: QemuInstance, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(restoring, "wait_for_state", fail)
    with pytest.raises(KeyboardInterrupt):
        cloud.launch(image)
    assert instance_dirs(cloud) == [running.instance_dir]
    assert qemus(cloud.parent_dir) == [running.machine.pid]
    assert cloud.created_instances == [running]


def test_many_copies_leak_nothing(cloud: Qemu, image: str) -> None:
    def copy_and_delete() -> None:
        assert cloud.launch(image).delete() == []

    copy_and_delete()
    gc.collect()
    before = (descriptors(), threading.active_count(), set(cloud.parent_dir.iterdir()))
    leased = leases(cloud)
    for _ in range(20):
        copy_and_delete()
    gc.collect()
    assert becomes(lambda: descriptors() <= before[0] + 2)
    assert becomes(lambda: threading.active_count() <= before[1])
    assert set(cloud.parent_dir.iterdir()) == before[2]
    assert leases(cloud) == leased


def leases(cloud: Qemu) -> list[str]:
    """List the ports that are leased to the machines of a cloud."""
    return sorted(
        file.name
        for file in (cloud.settings.state_dir / "ports").iterdir()
        if file.is_file() and os.fsencode(cloud.parent_dir) in file.read_bytes()
    )


def test_clouds_clean_what_they_copied(
    make_cloud: CloudMaker, tiny_image: Path, tmp_path: Path
) -> None:
    first, second = make_cloud("first"), make_cloud("second")
    saved = save(run(first, tiny_image))
    copy = second.launch(str(saved.image))
    errors = first.clean()
    assert [type(error) for error in errors] == [ImageInUseError]
    assert runs(copy)
    assert second.clean() == []
    assert first.clean() == []


def test_a_port_that_is_taken_is_no_obstacle(
    cloud: Qemu, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program takes the port that was leased, before QEMU does."""
    taken: list[socket.socket] = []
    describe = Copy.describe

    def describe_late(copy: Copy, host: Host, rundir: RunDirectory, lease: Any) -> Any:
        if not taken:
            taken.append(socket.socket())
            taken[0].bind(("127.0.0.1", lease.ssh))
            taken[0].listen()
        return describe(copy, host, rundir, lease)

    monkeypatch.setattr(Copy, "describe", describe_late)
    try:
        assert runs(cloud.launch(image))
    finally:
        taken[0].close()


def test_copy_of_a_machine_without_a_seed_has_none(cloud: Qemu, tiny_image: Path) -> None:
    source = hurry(cloud.launch(str(tiny_image), "c1m64", no_seed_iso=True))
    saved = save(source)
    copy = cloud.launch(str(saved.image), fresh_identity=True)
    assert runs(copy)
    assert copy.machine.spec.seed is None
    touch_state(saved)
    assert runs(cloud.launch(str(saved.image)))
