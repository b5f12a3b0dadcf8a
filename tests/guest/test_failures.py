"""Guests that fail: each cause is provoked in a real one and told, and no wait outlasts it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import paramiko
import pytest
import yaml

from pycloudlib import Qemu
from pycloudlib.diagnosis import Cause, Diagnosis
from pycloudlib.errors import BootFailedError, KernelPanicError, PycloudlibTimeoutError
from pycloudlib.qemu.instance import QemuInstance
from tests.guest.conftest import Guest, collecting_warnings, get_image
from tests.guest.seeds import SIZE, Kind

pytestmark = pytest.mark.guest


@pytest.fixture
def cloud() -> Iterator[Qemu]:
    with Qemu(tag="failures") as cloud:
        yield cloud


@pytest.fixture
def copy(cloud: Qemu, saved: str) -> QemuInstance:
    """Give a copy of a machine that has booted, reached by SSH alone."""
    vm = cloud.launch(saved)
    vm.wait()
    return vm


def without_helper(vm: QemuInstance) -> QemuInstance:
    """Let commands run over SSH, as in a machine that was never saved."""
    vm.execute("systemctl stop pycloudlib-helper", use_sudo=True)
    vm.machine.rundir.helper_mark.unlink(missing_ok=True)
    assert vm.execute("true").ok
    return vm


def diagnosis_of(error: BaseException) -> Diagnosis:
    found = error.diagnosis  # type: ignore[attr-defined]
    assert isinstance(found, Diagnosis)
    return found


@pytest.mark.parametrize(
    ("cmdline", "cause", "line"),
    [
        ("rdinit=/nowhere root=/dev/nowhere", Cause.KERNEL_PANIC, "end Kernel panic"),
        pytest.param("break=top", Cause.EMERGENCY_SHELL, "(initramfs)", marks=pytest.mark.thorough),
        pytest.param(
            "systemd.unit=emergency.target",
            Cause.EMERGENCY_SHELL,
            "emergency mode|root account is locked",
            marks=pytest.mark.thorough,
        ),
    ],
    ids=["panic", "initramfs", "emergency"],
)
def test_boot_that_goes_no_further(
    cmdline: str, cause: Cause, line: str, cloud: Qemu, image: str
) -> None:
    vm = cloud.launch(image, SIZE, kernel_cmdline=cmdline)
    with pytest.raises(BootFailedError) as caught:
        vm.wait()
    told = diagnosis_of(caught.value)
    assert told.cause is cause
    assert any(word in told.evidence for word in line.split("|"))
    assert told.waited < 300
    assert "Try: " in str(caught.value)


@pytest.mark.thorough
def test_boot_loader_without_a_configuration(copy: QemuInstance) -> None:
    moved = copy.execute("mv /boot/grub/grub.cfg /boot/grub/lost && sync", use_sudo=True)
    assert moved.ok, moved.stderr
    with pytest.raises(BootFailedError) as caught:
        copy.restart()
    assert diagnosis_of(caught.value).cause is Cause.BOOT_LOADER_PROMPT


def test_ssh_server_that_does_not_run(copy: QemuInstance) -> None:
    without_helper(copy).execute("systemctl stop ssh.socket ssh.service", use_sudo=True)
    copy._forget_client()
    with pytest.raises(paramiko.SSHException) as caught:
        copy.execute("true")
    assert diagnosis_of(caught.value).cause is Cause.NO_SSH_SERVER


def test_network_that_is_down(copy: QemuInstance) -> None:
    interface = copy.execute("ip -oneline route show default | cut -d' ' -f5")
    assert copy.execute(f"ip link set {interface} down", use_sudo=True).ok
    copy.machine.rundir.helper_mark.unlink()
    copy._forget_client()
    copy.banner_timeout = 3
    with pytest.raises(paramiko.SSHException) as caught:
        copy.execute("true")
    assert diagnosis_of(caught.value).cause is Cause.NO_NETWORK


@pytest.mark.parametrize("by", ["helper", "ssh"])
def test_kernel_that_panics_ends_a_command(by: str, copy: QemuInstance, saved: str) -> None:
    if by == "ssh":
        without_helper(copy)
    # Once the command runs; it would never end.
    with pytest.raises(paramiko.SSHException, match="end Kernel panic") as caught:
        copy.execute(
            "(sleep 2; echo c >/proc/sysrq-trigger) & sleep 10000 >/dev/null 2>&1", use_sudo=True
        )
    assert isinstance(caught.value.__cause__, KernelPanicError)
    assert diagnosis_of(caught.value).cause is Cause.KERNEL_PANIC
    with pytest.raises(paramiko.SSHException, match="end Kernel panic"):
        copy.execute("true")

    copy.rollback(saved)
    assert copy.execute("echo as before") == "as before"
    # Others do not hear of it either, though it is on the console.
    with Qemu(tag="failures-other") as other:
        assert other.get_instance(copy.id).execute("echo as before") == "as before"
    assert copy.diagnose().cause is Cause.UNKNOWN


def test_guest_without_memory(copy: QemuInstance) -> None:
    eaten = copy.execute(["python3", "-c", "x = [bytes([1]) * (1 << 20) for _ in range(1 << 16)]"])
    assert eaten.failed
    told = copy.diagnose()
    assert told.cause is Cause.GUEST_MEMORY
    assert "Killed process" in told.evidence


def test_guest_with_a_full_disk(copy: QemuInstance) -> None:
    # All at once, without writing it: what is left then is little.
    filled = copy.execute(
        "fallocate -l $(($(stat -f -c '%f * %S' /) - (16 << 20))) /full;"
        "dd if=/dev/zero of=/rest bs=64K",
        use_sudo=True,
    )
    assert "No space left" in filled.stderr
    told = copy.diagnose()
    assert told.cause is Cause.GUEST_DISK


def test_unit_that_failed(copy: QemuInstance) -> None:
    copy.execute("systemd-run --unit=broken --wait false", use_sudo=True)
    assert "broken.service" in copy.diagnose().failed_units


@pytest.mark.uses(Kind.SCRIPT)
def test_cloud_init_that_failed(guests: dict[Kind, Future[Guest]]) -> None:
    vm = guests[Kind.SCRIPT].result().machine
    vm.execute("true")
    told = vm.diagnose()
    assert told.cause is Cause.CLOUD_INIT
    assert "modules-final failed" in told.evidence


@pytest.mark.thorough
def test_guest_that_user_data_powers_off(cloud: Qemu, image: str) -> None:
    config = {"bootcmd": ["poweroff -f"]}
    user_data = "#cloud-config\n" + yaml.safe_dump(config)
    vm = cloud.launch(image, SIZE, user_data=user_data, fast_boot=True)
    with pytest.raises(Exception, match="powered itself off") as caught:
        vm.wait()
    assert diagnosis_of(caught.value).cause is Cause.POWERED_OFF


@pytest.mark.thorough
@pytest.mark.parametrize("release", ["bookworm", "trixie"])
def test_key_that_user_data_takes_away(release: str, cloud: Qemu) -> None:
    user_data = "#cloud-config\nusers: [{name: bob}]\n"
    vm = cloud.launch(get_image(release), SIZE, user_data=user_data, fast_boot=True)
    with pytest.raises(PycloudlibTimeoutError, match="users are bob, without 'default'") as caught:
        vm.wait()
    told = diagnosis_of(caught.value)
    assert told.cause is Cause.KEY_REFUSED
    assert told.phase == "cloud-init done"


@pytest.mark.thorough
@pytest.mark.parametrize("release", ["bookworm", "trixie"])
def test_guest_that_user_data_has_boot_again(release: str, cloud: Qemu) -> None:
    config = {
        "power_state": {"mode": "reboot"},
        "users": ["default", {"name": "bob", "sudo": False}],  # of which cloud-init warns
    }
    user_data = "#cloud-config\n" + yaml.safe_dump(config)
    vm = cloud.launch(get_image(release), SIZE, user_data=user_data, fast_boot=True)
    with collecting_warnings(vm.name) as warnings:
        vm.wait()
    assert vm.execute("grep -c \"running 'init-local'\" /var/log/cloud-init.log") == "2"
    assert vm.diagnose().boots == 2
    assert any("deprecated" in warning.lower() for warning in warnings), warnings
    assert len(warnings) == len(set(warnings))
    told = vm.diagnose()
    assert told.cause is Cause.CLOUD_INIT_WARNING
    assert any("sudo" in warning for warning in told.warnings)
