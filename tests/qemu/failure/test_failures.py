"""Machines that fail, without a guest's help: each error says why, at once."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import paramiko
import pytest

from pycloudlib import Qemu
from pycloudlib.diagnosis import Cause, Diagnosis
from pycloudlib.errors import BootFailedError, CloudSetupError, PycloudlibTimeoutError
from pycloudlib.instance import BaseInstance
from pycloudlib.qemu.failure import explaining
from pycloudlib.qemu.failure.examination import Facts
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.vm import running
from pycloudlib.qemu.vm.process import LaunchError
from pycloudlib.qemu.vm.running import HostDiskFullError, MachineEndedError, State
from pycloudlib.result import Result
from tests.qemu.conftest import CloudMaker
from tests.qemu.machines import SMALL, becomes, hurry, mode

pytestmark = pytest.mark.qemu


def write_boot_sector(image: Path, program: str, size: int = 1 << 20) -> Path:
    """Make a disk whose boot sector is a program, in hexadecimal digits."""
    sector = bytes.fromhex(program).ljust(510, b"\0") + b"\x55\xaa"
    image.write_bytes(sector.ljust(size, b"\0"))
    return image


def diagnosis_of(error: BaseException) -> Diagnosis:
    found = error.diagnosis  # type: ignore[attr-defined]
    assert isinstance(found, Diagnosis)
    return found


def test_qemu_that_refuses(cloud: Qemu, tiny_image: Path) -> None:
    with pytest.raises(LaunchError, match="not a valid device model name") as caught:
        cloud.launch(str(tiny_image), launch_args=["-device", "no-such-thing"])
    told = diagnosis_of(caught.value)
    assert told.cause is Cause.QEMU_FAILED
    assert told.exit_status == 1
    assert "no-such-thing" in told.stderr
    assert "Cause: QEMU failed" in str(caught.value)


def test_memory_that_the_host_has_not(cloud: Qemu, tiny_image: Path) -> None:
    with pytest.raises(LaunchError) as caught:
        cloud.launch(str(tiny_image), "c1m99999999")
    assert diagnosis_of(caught.value).cause is Cause.HOST_MEMORY


def test_kvm_that_does_not_work(make_cloud: CloudMaker, tiny_image: Path) -> None:
    """Where it does work, there is nothing to tell."""
    forced = make_cloud("kvm", more='accelerator = "kvm"\n')
    errors = []
    try:
        forced.launch(str(tiny_image), SMALL).delete()
    except CloudSetupError as error:
        errors.append(error)
    assert {diagnosis_of(error).cause for error in errors} <= {Cause.KVM_UNAVAILABLE}
    assert all("kvm_intel" in str(error) for error in errors)


def test_qemu_that_is_killed_while_it_is_waited_for(running: QemuInstance) -> None:
    pid = running.machine.pid
    assert pid is not None
    threading.Timer(1.0, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(MachineEndedError) as caught:
        running.wait()
    told = diagnosis_of(caught.value)
    assert told.cause is Cause.QEMU_KILLED
    assert told.exit_status == -signal.SIGKILL
    assert told.waiting_for == "the machine to be ready"
    assert 0.5 < told.waited < 60
    assert told.limit == "1200 s (the default with tcg; ready_timeout)"
    assert "QEMU was killed" in str(caught.value)
    assert "SIGKILL" in str(caught.value)


def test_guest_that_powers_itself_off(cloud: Qemu, tmp_path: Path) -> None:
    # ACPI's power management register of this machine, which the firmware has set up: sleep, S5.
    image = write_boot_sector(tmp_path / "off.img", OFF)
    vm = hurry(cloud.launch(str(image), SMALL))
    with pytest.raises(MachineEndedError) as caught:
        vm.wait()
    assert diagnosis_of(caught.value).cause is Cause.POWERED_OFF
    assert "SHUTDOWN guest=True" in str(caught.value)


def test_disk_without_a_boot_loader(cloud: Qemu, tmp_path: Path) -> None:
    # INT 18h: it gives the boot back to the firmware.
    image = write_boot_sector(tmp_path / "empty.img", "cd18")
    vm = hurry(cloud.launch(str(image), SMALL))
    with pytest.raises(BootFailedError, match="no bootable disk") as caught:
        vm.wait()
    told = diagnosis_of(caught.value)
    assert told.cause is Cause.NO_BOOTABLE_DISK
    assert told.waited < 60
    assert told.phase == "firmware"
    assert "No bootable device." in told.console


def test_guest_that_boots_again_and_again(cloud: Qemu, tmp_path: Path) -> None:
    # By the keyboard controller: it resets the processor.
    image = write_boot_sector(tmp_path / "again.img", "b0fe e664 ebfd")
    vm = hurry(cloud.launch(str(image), SMALL))
    assert becomes(lambda: vm.diagnose().boots >= 4)
    with pytest.raises(PycloudlibTimeoutError) as caught:
        vm.wait(ready_timeout=0.02)
    told = diagnosis_of(caught.value)
    assert told.cause is Cause.REBOOTS
    assert told.boots >= 4
    assert f"in its boot number {told.boots} since power-on" in str(caught.value)


@pytest.mark.parametrize("by", ["event", "console"])
def test_command_in_a_guest_that_boots_anew_is_not_waited_for(
    by: str, running: QemuInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was connected to it stays open, and nobody answers."""
    if by == "console":
        # Who has not started QEMU hears of no events.
        monkeypatch.setattr(type(running.machine), "last_reset", 0.0)

    def boot_anew(vm: QemuInstance, command: Sequence[str], *_more: object) -> Result:
        look = vm.guest.watchdog()
        look()
        vm.machine.execute("system_reset")

        def ends() -> bool:
            look()
            return False

        becomes(ends)
        return Result("it went on")

    monkeypatch.setattr(BaseInstance, "_ssh", boot_anew)
    assert becomes(lambda: "Booting from Hard Disk" in running.console_log())
    with contextlib.ExitStack() as following:
        if by == "console":
            following.enter_context(following.enter_context(running.guest.following_boot(None)))
        result = running.execute("sleep 1000")
    assert (result.stdout, result.return_code) == ("", -1)


def test_machine_that_stands_still(unstarted: QemuInstance) -> None:
    with pytest.raises(PycloudlibTimeoutError) as caught:
        hurry(unstarted).wait(ready_timeout=0.02)
    told = diagnosis_of(caught.value)
    assert told.cause is Cause.STANDS_STILL
    assert told.limit == "1 s (ready_timeout)"
    assert unstarted.diagnose().cause is Cause.STANDS_STILL


def test_machine_that_is_off(running: QemuInstance) -> None:
    running.machine.execute("quit")
    assert becomes(lambda: running.machine.state is State.OFF)
    with pytest.raises(paramiko.SSHException) as caught:
        running.execute("true")
    assert diagnosis_of(caught.value).cause is Cause.SWITCHED_OFF
    with pytest.raises(MachineEndedError, match="start") as restarted:
        running.restart()
    assert diagnosis_of(restarted.value).cause is Cause.SWITCHED_OFF


def test_outermost_call_explains(running: QemuInstance) -> None:
    """Waiting tries to execute something again and again; that is not told of."""
    with pytest.raises(PycloudlibTimeoutError) as caught:
        running.wait(ready_timeout=0.02)
    assert str(caught.value).count("Cause:") == 1
    assert diagnosis_of(caught.value).waiting_for == "the machine to be ready"
    assert running.diagnose().cause is Cause.STILL_BOOTING


def test_secrets_are_neither_logged_nor_kept(
    make_cloud: CloudMaker, tiny_image: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "artifacts"
    cloud = make_cloud("secret", more=f'accelerator = "tcg"\nartifacts_dir = "{directory}"\n')
    secret = "hunter2-in-the-clear"
    with caplog.at_level(logging.DEBUG):
        vm = hurry(
            cloud.launch(
                str(tiny_image),
                SMALL,
                user_data=f"#cloud-config\npassword: {secret}\n",
                meta_data={"secret": secret},
                vendor_data=f"#!/bin/sh\n# {secret}\n",
            )
        )
        with pytest.raises(PycloudlibTimeoutError) as caught:
            vm.wait(ready_timeout=0.02)
    private_key = Path(str(vm.key_pair.private_key_path)).read_text().splitlines()[2]
    kept = "".join(
        file.read_text(errors="replace") for file in directory.rglob("*") if file.is_file()
    )
    command = Path(f"/proc/{vm.machine.pid}/cmdline").read_text()
    for text in (caplog.text, str(caught.value), kept, command):
        assert secret not in text
        assert private_key not in text
    vm.delete()


def test_artifacts_are_kept(make_cloud: CloudMaker, tiny_image: Path, tmp_path: Path) -> None:
    directory = tmp_path / "artifacts"
    more = f'accelerator = "tcg"\nartifacts_dir = "{directory}"\n'
    cloud = make_cloud("kept", more=more)
    vm = hurry(cloud.launch(str(tiny_image), SMALL, launch_args=["-vga", "std"]))
    for _ in range(2):
        with pytest.raises(PycloudlibTimeoutError):
            vm.wait(ready_timeout=0.02)
    one, other = sorted(directory.iterdir())
    assert one.name.startswith(vm.name)
    files = {file.name for file in one.iterdir()}
    assert files == {
        "error.txt",
        "machine.json",
        "events.json",
        "console.log",
        "qemu.log",
        "screen.png",
    }
    assert "Cause: " in (one / "error.txt").read_text()
    assert (other / "screen.png").read_bytes().startswith(b"\x89PNG")
    assert mode(one) == 0o700
    assert {mode(file) & 0o077 for file in one.iterdir()} == {0}
    vm.delete()


def test_artifacts_are_kept_where_others_can_write(
    make_cloud: CloudMaker, tiny_image: Path, tmp_path: Path
) -> None:
    """As in a directory that was made with umask 002; the failure is the machine's own."""
    directory = tmp_path / "artifacts"
    directory.mkdir()
    directory.chmod(0o777)
    cloud = make_cloud("kept", more=f'accelerator = "tcg"\nartifacts_dir = "{directory}"\n')
    vm = hurry(cloud.launch(str(tiny_image), SMALL))
    with pytest.raises(PycloudlibTimeoutError, match="could not be reached by SSH"):
        vm.wait(ready_timeout=0.02)
    (kept,) = directory.iterdir()
    assert mode(kept) == 0o700
    assert {mode(file) for file in kept.iterdir()} == {0o600}
    vm.delete()


@pytest.mark.parametrize("obstacle", ["a file", "full", "others'", "damaged"])
def test_artifacts_that_cannot_be_kept_do_not_replace_the_failure(
    obstacle: str,
    make_cloud: CloudMaker,
    tiny_image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    directory = tmp_path / "artifacts"
    if obstacle == "a file":
        directory.touch()
    elif obstacle == "full":
        directory = Path("/proc/self/artifacts")
    elif obstacle == "others'":
        made = Path.mkdir

        def exchange(path: Path, *arguments: Any, **options: Any) -> None:
            made(path, *arguments, **options)
            if path.parent == directory:
                path.rename(tmp_path / "away")
                path.symlink_to(tmp_path / "victim")

        (tmp_path / "victim").mkdir()
        monkeypatch.setattr(Path, "mkdir", exchange)
    else:
        monkeypatch.setattr(explaining, "copy_private", lambda *_: 1 / 0)
    cloud = make_cloud("kept", more=f'accelerator = "tcg"\nartifacts_dir = "{directory}"\n')
    vm = hurry(cloud.launch(str(tiny_image), SMALL))
    with pytest.raises(PycloudlibTimeoutError, match="could not be reached by SSH") as caught:
        vm.wait(ready_timeout=0.02)
    assert diagnosis_of(caught.value).cause is Cause.STILL_BOOTING
    assert "is not wholly recorded: " in caplog.text
    if obstacle == "others'":
        assert list((tmp_path / "victim").iterdir()) == []
    vm.delete()


def test_diagnosis_that_fails_does_not_replace_the_failure(
    running: QemuInstance, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_machine: object) -> None:
        raise PermissionError("console.log")

    monkeypatch.setattr(Facts, "collect", fail)
    with pytest.raises(PycloudlibTimeoutError, match="could not be reached by SSH"):
        running.wait(ready_timeout=0.02)
    assert "is not wholly recorded: PermissionError: console.log" in caplog.text


OFF = "ba0406 b80020 ef f4 ebfd"


@pytest.mark.parametrize("obstacle", ["artifacts", "report"])
def test_failed_test_is_told_whatever_happens_to_its_artifacts(
    obstacle: str, pytester: pytest.Pytester, working_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on, and it is the test's failure that is told."""
    config = pytester.path / "config.toml"
    config.write_text(f'[qemu]\nworking_dir = "{working_dir}"\naccelerator = "tcg"\n')
    monkeypatch.setenv("PYCLOUDLIB_CONFIG", str(config))
    write_boot_sector(pytester.path / "off.img", OFF)
    if obstacle == "artifacts":
        (pytester.path / "kept").touch()
    else:
        # As by a directory that cannot be looked into any more.
        pytester.makeconftest(
            """
            from pycloudlib.pytest_plugin import plugin

            def fail(*_):
                raise RuntimeError("nothing can be told")

            plugin.report_machine = fail
            """
        )
    pytester.makepyfile(
        """
        def test_one(vm_factory):
            vm_factory(image="off.img", instance_type="c1m64", warm=False, fast_boot=False)

        def test_two():
            pass
        """
    )

    result = pytester.runpytest_subprocess("--vm-artifacts=kept", timeout=120)

    result.assert_outcomes(failed=1, passed=1)
    shown = result.stdout.str() + result.stderr.str()
    assert "INTERNALERROR" not in shown
    assert "MachineEndedError" in shown
    assert ("not all could be kept" if obstacle == "artifacts" else "nothing can be told") in shown


# Writes its 32 KiB to one place of the disk after the other, then halts.
WRITER = (
    "fc 31c0 8ed8 8ed0 bc007c"  # cld; ds = ss = 0, sp = 0x7c00
    "bf0002"  # 512 times:
    "be407c b443 b000 b280 cd13"  # write what the packet at 0x7c40 says to drive 0x80
    "8306487c40 8316 4a7c00"  # let it name the next 64 sectors
    "4f 75e8"
    "f4 ebfd"
)
PACKET = bytes.fromhex("10004000 00000010 4000000000000000")


def test_host_that_has_no_room_is_told_at_once_and_goes_on(
    small_host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = bytes.fromhex(WRITER).ljust(0x40, b"\0") + PACKET
    image = write_boot_sector(tmp_path / "writer.img", program.hex(), 64 << 20)
    monkeypatch.setattr(running, "NEEDED_SPACE", 8 << 20)
    config = f'[qemu]\nworking_dir = "{small_host}"\naccelerator = "tcg"\n'
    with Qemu("full", config_file=io.StringIO(config)) as cloud:
        vm = hurry(cloud.launch(str(image), SMALL))
        assert becomes(lambda: vm.machine.state is State.PAUSED)
        begun = time.monotonic()
        with pytest.raises(HostDiskFullError) as caught:
            vm.wait()
        assert time.monotonic() - begun < 10
        told = diagnosis_of(caught.value)
        assert told.cause is Cause.HOST_DISK
        assert str(vm.instance_dir) in str(caught.value)
        assert "0 MiB" in str(caught.value)
        assert any(event.startswith("BLOCK_IO_ERROR") for event in told.events)
        with pytest.raises(HostDiskFullError):
            vm.execute("true")

        subprocess.run(["mount", "-o", "remount,size=100m", small_host], check=True)
        with pytest.raises(PycloudlibTimeoutError):
            vm.wait(ready_timeout=0.05)
        assert vm.machine.state is State.RUNNING
        vm.machine.kill()
        subprocess.run(["qemu-img", "check", vm.instance_path], check=True)
