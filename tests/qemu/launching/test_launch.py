"""A launch, with the real binary: what it makes, and what it refuses."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import signal
import socket
import stat
import threading
import time
from pathlib import Path
from typing import Any

import paramiko
import pytest

from pycloudlib import Qemu
from pycloudlib._base.documents import from_bytes
from pycloudlib.errors import (
    CloudError,
    ImageNotFoundError,
    InvalidKeyError,
    InvalidTagNameError,
    MissingPrerequisiteError,
    PycloudlibTimeoutError,
)
from pycloudlib.key import generate_ed25519
from pycloudlib.qemu.host import accelerator, ownership, resources
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.state.rundir import short_path
from pycloudlib.qemu.vm.process import LaunchError
from pycloudlib.qemu.vm.qmp import QmpSession
from pycloudlib.qemu.vm.running import State
from tests.qemu.conftest import UNSTARTED, CloudMaker
from tests.qemu.machines import becomes, mode, run, runs, save

pytestmark = pytest.mark.qemu


def qemu_argv(instance: QemuInstance) -> list[str]:
    raw = Path(f"/proc/{instance.machine.pid}/cmdline").read_bytes()
    return raw.rstrip(b"\0").decode().split("\0")


def listening_addresses(pid: int) -> set[tuple[str, int]]:
    """Read which TCP addresses a process listens on from the kernel's tables."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        target = str(link.readlink())
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                addresses.add((address, int(port, 16)))
    return addresses


def test_launch_returns_a_machine_that_is_there(unstarted: QemuInstance) -> None:
    assert unstarted.machine.state is State.PAUSED
    assert unstarted.machine.execute("query-status")["status"] == "prelaunch"
    assert unstarted.id == (f"{unstarted.instance_path}::{unstarted.port}::{unstarted.telnet_port}")
    assert unstarted.instance_path.is_file()
    assert unstarted.instance_path.parent == unstarted.instance_dir
    assert unstarted.ip == "127.0.0.1"


def test_everything_is_private_to_its_owner(cloud: Qemu, unstarted: QemuInstance) -> None:
    assert stat.S_IMODE(cloud.parent_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE(unstarted.instance_dir.stat().st_mode) == 0o700
    for path in unstarted.instance_dir.iterdir():
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & 0o077 == 0, f"{path.name} has mode {mode:o}"


def test_only_two_loopback_ports_listen(unstarted: QemuInstance) -> None:
    pid = unstarted.machine.pid
    assert pid is not None
    loopback = "0100007F"  # 127.0.0.1, as the kernel writes it
    expected = {(loopback, int(unstarted.port)), (loopback, int(unstarted.telnet_port))}
    assert listening_addresses(pid) == expected
    for port in (unstarted.port, unstarted.telnet_port):
        assert isinstance(port, str)
        assert 18000 <= int(port) <= 18100


def test_qemu_runs_in_its_sandbox_and_every_drive_has_a_format(unstarted: QemuInstance) -> None:
    argv = qemu_argv(unstarted)
    assert "-sandbox" in argv
    drives = [value for option, value in itertools.pairwise(argv) if option == "-drive"]
    assert len(drives) == 2
    assert all("format=" in drive for drive in drives)


def test_launch_args_are_appended(cloud: Qemu, tiny_image: Path) -> None:
    instance = cloud.launch(str(tiny_image), launch_args=["-S", "-device", "pvpanic"])
    assert qemu_argv(instance)[-3:] == ["-S", "-device", "pvpanic"]


def test_the_disk_is_an_overlay_of_ten_gib_and_the_image_is_not_written_to(
    cloud: Qemu, tiny_image: Path
) -> None:
    before = tiny_image.read_bytes()
    instance = cloud.launch(str(tiny_image), launch_args=UNSTARTED)
    blocks = {b["device"]: b for b in instance.machine.execute("query-block")}
    image = blocks["root"]["inserted"]["image"]
    assert image["virtual-size"] == 10 << 30
    assert image["full-backing-filename"] == str(tiny_image)
    assert tiny_image.read_bytes() == before


def test_an_image_below_image_dir_is_found_by_its_relative_path(
    make_cloud: CloudMaker, tiny_image: Path
) -> None:
    cloud = make_cloud(more=f'image_dir = "{tiny_image.parent}"\naccelerator = "tcg"\n')
    instance = cloud.launch(tiny_image.name, launch_args=UNSTARTED)
    assert instance.machine.state is State.PAUSED


def test_the_longest_tag_and_a_long_image_name_work(
    make_cloud: CloudMaker, tiny_image: Path
) -> None:
    long_image = tiny_image.with_name("i" * 200 + ".img")
    tiny_image.rename(long_image)
    instance = make_cloud("t" * 63).launch(str(long_image), launch_args=UNSTARTED)
    assert len(str(instance.instance_dir / "qmp-socket")) > 107
    assert instance.machine.execute("query-name")["name"] == instance.name
    assert len(instance.name) <= 63


def test_the_qmp_socket_is_there_for_others(unstarted: QemuInstance) -> None:
    with (
        socket.socket(socket.AF_UNIX) as client,
        short_path(unstarted.instance_dir / "qmp-socket") as address,
    ):
        client.settimeout(10)
        client.connect(address)
        greeting = json.loads(client.makefile().readline())
    assert "QMP" in greeting


def test_the_console_log_begins_with_the_firmware(cloud: Qemu, tiny_image: Path) -> None:
    instance = cloud.launch(str(tiny_image))
    # The firmware names the disk it boots from last; then the log has its first line, too.
    assert becomes(lambda: "Booting from Hard Disk" in instance.console_log())
    assert "SeaBIOS" in instance.console_log().splitlines()[0]


def test_unknown_keywords_are_accepted_and_logged(
    cloud: Qemu, tiny_image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        cloud.launch(str(tiny_image), launch_args=UNSTARTED, wait=False, frobnicate=1)
    assert "frobnicate" in caplog.text


def test_without_a_seed_there_is_no_seed_drive(cloud: Qemu, tiny_image: Path) -> None:
    instance = cloud.launch(str(tiny_image), no_seed_iso=True, launch_args=UNSTARTED)
    assert not (instance.instance_dir / "seed.iso").exists()
    assert [b["device"] for b in instance.machine.execute("query-block")] == ["root"]


@pytest.mark.parametrize("field", ["user_data", "meta_data", "vendor_data", "network_config"])
def test_a_seed_document_of_a_wrong_type_is_a_type_error_that_names_it(
    cloud: Qemu, tiny_image: Path, field: str
) -> None:
    arguments: dict[str, object] = {field: 42}
    with pytest.raises(TypeError, match=field):
        cloud.launch(str(tiny_image), **arguments)  # type: ignore[arg-type]
    assert not cloud.parent_dir.exists() or not list(cloud.parent_dir.glob("t-*"))


@pytest.mark.parametrize("instance_type", ["c0m512", "c1m0", "m512", "c1", "c1m512 ", "large"])
def test_a_bad_instance_type_is_a_value_error(
    cloud: Qemu, tiny_image: Path, instance_type: str
) -> None:
    with pytest.raises(ValueError, match=f"{instance_type!r}.*c<cpus>m<MiB"):
        cloud.launch(str(tiny_image), instance_type)


@pytest.mark.parametrize("image_id", ["nowhere.img", "/nowhere.img", "", "."])
def test_an_unknown_image_is_an_image_not_found_error(cloud: Qemu, image_id: str) -> None:
    with pytest.raises(ImageNotFoundError):
        cloud.launch(image_id)


def test_a_key_without_its_private_half_is_told_of_before_anything_starts(
    cloud: Qemu, tiny_image: Path, tmp_path: Path
) -> None:
    private, public = generate_ed25519("later")
    (tmp_path / "later.pub").write_text(public)
    cloud.use_key(tmp_path / "later.pub")

    with pytest.raises(InvalidKeyError, match=f"no private key '{tmp_path}/later'"):
        cloud.launch(str(tiny_image), launch_args=UNSTARTED)
    (tmp_path / "later").write_text(private)

    assert cloud.launch(str(tiny_image), launch_args=UNSTARTED).key_pair is cloud.key_pair


def test_key_of_the_user_s_own_is_not_copied_once_another_was_made(
    cloud: Qemu, tiny_image: Path, tmp_path: Path
) -> None:
    """Looking at `key_pair` makes one that goes with the cloud; `use_key` comes after that."""
    made = cloud.key_pair.private_key_path
    private, public = generate_ed25519("own")
    (tmp_path / "own").write_text(private)
    (tmp_path / "own.pub").write_text(public)
    first = cloud.launch(str(tiny_image), launch_args=UNSTARTED)
    cloud.use_key(tmp_path / "own.pub")

    second = cloud.launch(str(tiny_image), launch_args=UNSTARTED)

    assert second.key_pair.private_key_path == str(tmp_path / "own")
    assert not list(second.instance_dir.glob("own*"))
    copied = Path(str(first.key_pair.private_key_path))
    assert copied.parent == first.instance_dir
    assert copied.read_bytes() == Path(str(made)).read_bytes()
    assert cloud.clean() == []
    assert not Path(str(made)).exists()
    assert cloud.key_pair.private_key_path == str(tmp_path / "own"), "it is still in use"


def test_host_s_programs_get_what_they_need_of_the_environment_alone(
    cloud: Qemu, tiny_image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what a CI service gives its jobs: anybody who gets hold of QEMU had that, too."""
    secrets = ("CI_JOB_TOKEN", "AWS_SECRET_ACCESS_KEY", "https_proxy", "ODD")
    for name in secrets:
        monkeypatch.setenv(name, "a secret")
    monkeypatch.setenv("QEMU_MODULE_DIR", str(tmp_path))
    monkeypatch.setenv("LC_TIME", "C.UTF-8")
    # Another one begins when it is needed.
    earlier = ownership.find_guardian().pid
    os.kill(earlier, signal.SIGKILL)
    os.waitpid(earlier, 0)
    accelerator.find_features.cache_clear()
    # Each says what it has got, and is what it is called after.
    said = tmp_path / "said"
    said.mkdir()
    for name in ("qemu-img", "qemu-system-x86_64"):
        program = tmp_path / name
        real = shutil.which(name)
        program.write_text(f'#!/bin/sh\nenv >{said}/{name}.$$\nexec {real} "$@"\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    cloud.qemu_binary = str(tmp_path / "qemu-system-x86_64")

    machine = run(cloud, tiny_image)
    image = cloud.snapshot(machine, memory=True)
    cloud.export_image(image, tmp_path / "exported.img", compress=False)

    watcher = ownership.find_guardian()
    environ = Path(f"/proc/{watcher.pid}/environ").read_bytes()
    os.kill(watcher.pid, signal.SIGKILL)
    os.waitpid(watcher.pid, 0)
    got = [file.read_text() for file in said.iterdir()]
    got.append(from_bytes(environ))
    assert len(got) >= 6, "two looks at QEMU, two QEMUs, the disk's overlay, its export"
    for text in got:
        assert "a secret" not in text
        assert not [name for name in secrets if f"{name}=" in text]
        for name in ("QEMU_MODULE_DIR", "LC_TIME", "PATH", "HOME"):
            assert f"{name}=" in text


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_what_it_makes_is_its_user_s_alone_whatever_the_umask_is(
    umask: int, tiny_image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "user"
    monkeypatch.setenv("HOME", str(home))
    for variable in ("XDG_STATE_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    config = io.StringIO(f'[qemu]\naccelerator = "tcg"\nartifacts_dir = "{home}/artifacts/all"\n')
    before = os.umask(umask)
    try:
        with Qemu("t", timestamp_suffix=False, config_file=config) as cloud:
            vm = run(cloud, tiny_image)
            saved = save(vm)
            copy = cloud.launch(str(saved.image))
            cloud.export_image(str(saved.image), home / "exported.img", compress=False)
            with pytest.raises(PycloudlibTimeoutError):
                vm.wait(ready_timeout=0.02)
            assert runs(cloud.launch(str(home / "exported.img")))
            assert runs(copy)
            made = [path for path in home.rglob("*") if not path.is_symlink()]
            loose = [path for path in made if mode(path) & 0o022]
            secret = [path for path in made if path.name in ("id_ed25519", "memory", "disk.qcow2")]
            assert loose == []
            assert secret
            assert all(mode(path) & 0o077 == 0 for path in secret)
            assert mode(home / "artifacts") & 0o077 == 0
    finally:
        os.umask(before)


@pytest.mark.parametrize("length", [51, 63])
def test_a_long_tag_is_no_hindrance(make_cloud: CloudMaker, tiny_image: Path, length: int) -> None:
    cloud = make_cloud("x" * length, timestamp_suffix=True)

    machine = cloud.launch(str(tiny_image), launch_args=UNSTARTED)

    assert len(machine.name) <= 63
    assert machine.machine.execute("query-status")["status"] == "prelaunch"
    assert cloud.get_instance(machine.id).name == machine.name


def test_launch_args_as_one_text_are_a_type_error(cloud: Qemu, tiny_image: Path) -> None:
    with pytest.raises(TypeError, match="launch_args"):
        cloud.launch(str(tiny_image), launch_args="-S")


def test_a_kernel_command_line_needs_a_kernel(cloud: Qemu, tiny_image: Path) -> None:
    with pytest.raises(ValueError, match="kernel_path"):
        cloud.launch(str(tiny_image), kernel_cmdline="quiet")
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        cloud.launch(str(tiny_image), kernel_path="/nowhere")


def test_an_option_that_qemu_refuses_is_told_in_its_own_words_and_leaves_nothing(
    cloud: Qemu, tiny_image: Path
) -> None:
    with pytest.raises(LaunchError, match="-frobnicate: invalid option") as raised:
        cloud.launch(str(tiny_image), launch_args=["-frobnicate"])
    assert raised.value.end.exit_status == 1
    assert "-frobnicate" in raised.value.argv
    assert isinstance(raised.value, CloudError)
    assert not list(cloud.parent_dir.glob("t-*"))
    assert cloud.created_instances == []


def test_a_full_range_of_ports_is_a_clear_error_and_leaves_nothing(
    cloud: Qemu, tiny_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(resources, "PORTS", range(port, port + 1))
        with pytest.raises(CloudError, match=f"No two free ports in {port}-{port}"):
            cloud.launch(str(tiny_image), launch_args=UNSTARTED)
    assert not list(cloud.parent_dir.glob("t-*"))


def test_a_port_taken_in_the_last_moment_is_given_up_for_another(
    cloud: Qemu, tiny_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that knows nothing of leases listens between our look and QEMU's start."""
    thieves: list[socket.socket] = []
    original = resources.PortRegistry.acquire

    def acquire(registry: resources.PortRegistry, owner: Path) -> resources.PortLease:
        lease = original(registry, owner)
        if len(thieves) < 2:  # the SSH port of the first try, the telnet port of the second
            thieves.append(resources.listen((lease.ssh, lease.telnet)[len(thieves)]))
        return lease

    monkeypatch.setattr(resources.PortRegistry, "acquire", acquire)
    try:
        instance = cloud.launch(str(tiny_image), launch_args=UNSTARTED)
    finally:
        for thief in thieves:
            thief.close()
    assert len(thieves) == 2
    assert instance.machine.state is State.PAUSED


def test_an_interrupt_in_the_middle_of_a_launch_leaves_nothing(
    cloud: Qemu, tiny_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[bool] = []
    execute = QmpSession.execute

    def interrupted(session: QmpSession, command: str, *more: Any, **options: Any) -> Any:
        answer = execute(session, command, *more, **options)
        if command == "query-status":
            started.append(answer["running"])
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(QmpSession, "execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cloud.launch(str(tiny_image), launch_args=UNSTARTED)
    assert started
    assert cloud.created_instances == []
    assert not list(cloud.parent_dir.glob("t-*"))
    assert all(str(cloud.parent_dir) not in argv for argv in all_command_lines())


def all_command_lines() -> list[str]:
    lines = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(process.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return lines


def test_a_missing_qemu_binary_is_named_with_its_package(make_cloud: CloudMaker) -> None:
    with pytest.raises(MissingPrerequisiteError, match="qemu-nowhere"):
        make_cloud(more='qemu_binary = "qemu-nowhere"\n')


def test_a_missing_tool_names_its_package(
    make_cloud: CloudMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(MissingPrerequisiteError, match="qemu-system-x86'"):
        make_cloud()


def test_a_bad_tag_is_told_with_the_rules_it_breaks() -> None:
    with pytest.raises(InvalidTagNameError, match="begin or end"):
        Qemu("-Bad", timestamp_suffix=False)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_a_qemu_that_dies_is_noticed_by_whatever_waits(
    unstarted: QemuInstance, number: signal.Signals
) -> None:
    pid = unstarted.machine.pid
    assert pid is not None
    killer = threading.Timer(0.5, os.kill, (pid, number))
    started = time.monotonic()
    killer.start()
    with pytest.raises(PycloudlibTimeoutError, match=number.name):
        unstarted.wait(ready_timeout=5)
    assert time.monotonic() - started < 60
    assert unstarted.machine.end is not None
    assert unstarted.machine.end.exit_status == -number


def test_execute_on_a_dead_machine_raises_at_once_with_the_cause(unstarted: QemuInstance) -> None:
    pid = unstarted.machine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(paramiko.SSHException, match="SIGKILL"):
        unstarted.execute("true")


def test_phases_of_the_boot_are_counted_from_its_power_on(unstarted: QemuInstance) -> None:
    """Also when the wait begins before anything was printed."""
    with (
        unstarted.guest.following_boot(None) as watch,
        watch,
        unstarted.machine.rundir.console_log.open("a") as log,
    ):
        log.write("SeaBIOS (version 1.16)\n")
    (start,) = unstarted.boot_timeline
    assert 0 < start.seconds <= time.monotonic() - unstarted.machine.powered_on
