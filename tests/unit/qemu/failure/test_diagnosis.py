"""A cause found in what can be seen of a machine, and how it is told."""

from __future__ import annotations

import errno
import re

import paramiko
import pytest

from pycloudlib.diagnosis import Audience, Cause, Diagnosis
from pycloudlib.errors import (
    CleanupError,
    CloudError,
    CloudSetupError,
    GuestRefusedError,
    InvalidKeyError,
    PycloudlibError,
    PycloudlibTimeoutError,
    ToolError,
)
from pycloudlib.guest.access import ssh
from pycloudlib.qemu.failure.examination import Facts, diagnose, diagnose_launch, with_guest_words
from pycloudlib.qemu.failure.explaining import explain, explaining_launch, is_failure
from pycloudlib.qemu.host.accelerator import KvmUnavailableError
from pycloudlib.qemu.vm.process import LaunchError, ProcessEnd
from pycloudlib.qemu.vm.qmp import Event
from pycloudlib.qemu.vm.running import State

PANICS_END = Event("SHUTDOWN", {"guest": True, "reason": "guest-panic"}, 0.0)
GUESTS_END = Event("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}, 1.0)
HOSTS_END = Event("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"}, 1.0)


def facts(
    state: State = State.RUNNING,
    status: str = "running",
    end: ProcessEnd | None = None,
    events: tuple[Event, ...] = (),
    console: tuple[str, ...] = (),
    phase: str = "",
    boots: int = 1,
    warnings: tuple[str, ...] = (),
) -> Facts:
    return Facts(state, status, end, events, console, phase, boots=boots, warnings=warnings)


def off(exit_status: int | None, stderr: str = "", *events: Event) -> Facts:
    return facts(State.OFF, "", ProcessEnd(exit_status, stderr), events)


@pytest.mark.parametrize(
    ("seen", "cause"),
    [
        (off(-9), Cause.QEMU_KILLED),
        (off(-11, "some last words"), Cause.QEMU_KILLED),
        (off(1, "qemu: something else"), Cause.QEMU_FAILED),
        (off(1, "cannot set up guest memory 'ram0': Cannot allocate memory"), Cause.HOST_MEMORY),
        (off(-6, "kvm_buf_set_msrs: Assertion failed"), Cause.KVM_UNAVAILABLE),
        (off(0, "", GUESTS_END), Cause.POWERED_OFF),
        (off(0, "", PANICS_END), Cause.KERNEL_PANIC),
        (off(0, "", HOSTS_END), Cause.SWITCHED_OFF),
        (off(None), Cause.SWITCHED_OFF),
        (facts(State.OFF, ""), Cause.SWITCHED_OFF),
        (facts(State.PAUSED, "io-error"), Cause.HOST_DISK),
        (facts(State.PAUSED, "guest-panicked"), Cause.KERNEL_PANIC),
        (facts(State.PAUSED, "prelaunch"), Cause.STANDS_STILL),
        (facts(console=("SeaBIOS", "No bootable device.")), Cause.NO_BOOTABLE_DISK),
        (facts(phase="kernel"), Cause.STILL_BOOTING),
        (facts(phase="kernel", boots=2), Cause.STILL_BOOTING),
        (facts(phase="kernel", boots=4), Cause.REBOOTS),
        (facts(phase="cloud-init done", boots=9), Cause.REBOOTS),
        (facts(phase="kernel", warnings=("WARNING: x",)), Cause.STILL_BOOTING),
        (facts(phase="cloud-init done", warnings=("WARNING: x",)), Cause.CLOUD_INIT_WARNING),
        (facts(console=("[  130.2] reboot: System halted",)), Cause.HALTED),
        (facts(phase="cloud-init done"), Cause.UNKNOWN),
    ],
)
def test_cause_is_found_in_what_is_seen(seen: Facts, cause: Cause) -> None:
    assert diagnose(seen).cause is cause


@pytest.mark.parametrize(
    ("why", "phase", "cause"),
    [
        (ssh.HostKeyRefusedError("another key"), "", Cause.HOST_KEY),
        (paramiko.AuthenticationException("key /k refused"), "", Cause.KEY_REFUSED),
        (paramiko.BadAuthenticationType("no", ["password"]), "", Cause.KEY_REFUSED),
        (ssh.NoCommandsError("the boot id could not be read"), "", Cause.NO_COMMANDS),
        (ssh.NoServerError("closed"), "kernel", Cause.NO_SSH_SERVER),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "kernel", Cause.NO_SSH_SERVER),
        (ssh.NoBannerError("no SSH banner within 2 s"), "cloud-init done", Cause.NO_NETWORK),
        (ssh.NoBannerError("no SSH banner within 2 s"), "kernel", Cause.STILL_BOOTING),
    ],
)
def test_cause_is_found_in_how_ssh_failed(why: Exception, phase: str, cause: Cause) -> None:
    error = PycloudlibTimeoutError("vm-1 could not be reached")
    error.__cause__ = paramiko.SSHException("u@h port 1")
    error.__cause__.__cause__ = why
    assert diagnose(facts(phase=phase), error).cause is cause


def test_key_that_cannot_be_read_is_not_one_that_is_refused() -> None:
    error = paramiko.AuthenticationException("u@h: /k is no key")
    error.__cause__ = InvalidKeyError("/k is no key")
    assert diagnose(facts(phase="cloud-init done"), error).cause is Cause.UNKNOWN


@pytest.mark.parametrize(
    "command",
    [
        "ssh-keygen -R host key",
        "grep 'key /k refused: ' log",
        "echo commands do not run",
        "echo closed before SSH's banner; echo Connection reset; echo no SSH banner",
        "modprobe kvm",
        "echo No space left on device",
        "echo Cannot allocate memory",
    ],
)
def test_cause_is_not_found_in_the_words_of_a_command(command: str) -> None:
    """They are of the caller's choice, and so is what a program's file is called."""
    error = PycloudlibTimeoutError(f"The command did not end within 2 s: {command}")
    assert diagnose(facts(phase="cloud-init done"), error).cause is Cause.UNKNOWN
    assert diagnose_launch(CloudError(f"The tag is {command}")) is None


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (
            LaunchError(["qemu"], ProcessEnd(1, "qemu: -device x: not a valid device")),
            Cause.QEMU_FAILED,
        ),
        (
            LaunchError(["qemu"], ProcessEnd(1, "failed to initialize kvm: denied")),
            Cause.KVM_UNAVAILABLE,
        ),
        (LaunchError(["qemu"], ProcessEnd(1, "write: No space left on device")), Cause.HOST_DISK),
        (KvmUnavailableError("accelerator is kvm, but KVM does not work"), Cause.KVM_UNAVAILABLE),
        (
            ToolError("making a disk", ["qemu-img"], 1, "qemu-img: /x: No space left on device"),
            Cause.HOST_DISK,
        ),
        (OSError(errno.ENOSPC, "No space left on device"), Cause.HOST_DISK),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), Cause.HOST_MEMORY),
    ],
)
def test_cause_of_a_failed_launch_is_found(error: Exception, cause: Cause) -> None:
    found = diagnose_launch(error)
    assert found is not None
    assert found.cause is cause


@pytest.mark.parametrize(
    "said",
    [
        "Could not access KVM kernel module: No such file or directory",
        "ioctl(KVM_CREATE_VM) failed: 16 Device or resource busy",
        "qemu-kvm: failed to initialize kvm: Permission denied",
        "qemu: invalid accelerator kvm",
        "error: kvm run failed Function not implemented",
        "KVM internal error. Suberror: 1",
    ],
)
def test_kvm_is_at_fault_where_qemu_says_so(said: str) -> None:
    assert diagnose(off(1, said)).cause is Cause.KVM_UNAVAILABLE


@pytest.mark.parametrize(
    "said",
    [
        "qemu-kvm: -device x: 'x' is not a valid device model name",
        "/usr/libexec/qemu-kvm: -drive file=/w/pycl-qemu-kvm/kvm-1/disk.qcow2: Could not open",
        "kvm: -drive if=none,file=/srv/kvm images/kvm.img: Permission denied",
        "qemu: -cpu host,kvm=off: Property 'kvm' not found",
        "qemu: /No space left on device/x.img: Permission denied",
        "qemu: /Out of memory/Cannot allocate memory.img: Permission denied",
    ],
)
def test_names_that_others_chose_are_no_cause(said: str) -> None:
    assert diagnose(off(1, said)).cause is Cause.QEMU_FAILED
    told = diagnose_launch(LaunchError(["/usr/bin/qemu-kvm"], ProcessEnd(1, said)))
    assert told is not None
    assert told.cause is Cause.QEMU_FAILED


def test_binary_called_after_kvm_is_no_matter_of_kvm() -> None:
    error = CloudSetupError("qemu_binary '/usr/bin/qemu-kvm' does not answer as QEMU does")
    assert diagnose_launch(error) is None


def test_error_that_says_all_has_no_diagnosis() -> None:
    with pytest.raises(CloudError, match=r"^No two free ports$") as caught, explaining_launch():
        raise CloudError("No two free ports")
    assert caught.value.diagnosis is None


def test_launch_error_is_told_once() -> None:
    end = ProcessEnd(1, "qemu: failed to initialize kvm: Permission denied")
    with pytest.raises(LaunchError) as caught, explaining_launch():
        raise LaunchError(["qemu"], end)
    text = str(caught.value)
    assert text.count("Permission denied") == 2, "in QEMU's words, and as the evidence"
    assert "Try: load the module" in text
    assert caught.value.diagnosis is not None
    assert caught.value.diagnosis.exit_status == 1


def test_every_cause_has_a_hint() -> None:
    assert all(cause.hint for cause in Cause)


@pytest.mark.parametrize("cause", Cause)
def test_hint_names_what_its_readers_can_use(cause: Cause) -> None:
    programmers, command_line = map(cause.hint_for, (Audience.PROGRAMMERS, Audience.COMMAND_LINE))

    assert cause.hint == programmers
    assert not re.search(r"'pycloudlib |--(?!grep|system)", programmers)
    assert not re.search(r"\w\(\)|(?<!root)(?<!panic)=|ready_timeout|launch_args", command_line)


def test_words_of_the_guest_are_the_cause_where_there_is_none() -> None:
    words = ("modules-final ended", "modules-final failed: ('scripts_user', ...)")
    told = with_guest_words(Diagnosis(Cause.UNKNOWN), words, ("nginx.service",))
    assert told.cause is Cause.CLOUD_INIT
    assert told.evidence == words[1]
    assert told.failed_units == ("nginx.service",)
    assert with_guest_words(Diagnosis(Cause.HOST_DISK), words, ()).cause is Cause.HOST_DISK
    full = with_guest_words(Diagnosis(Cause.UNKNOWN), ("disk of / is full",), ())
    assert full.cause is Cause.GUEST_DISK


def test_warnings_of_cloud_init_are_told_and_are_the_cause_where_there_is_none() -> None:
    seen = diagnose(facts(phase="cloud-init done", warnings=("WARNING: a", "WARNING: b")))
    assert (seen.cause, seen.evidence) == (Cause.CLOUD_INIT_WARNING, "WARNING: a")
    told = with_guest_words(seen, ("init ended",), (), ("WARNING: b\nand more", "WARNING: c"))
    assert told.warnings == ("WARNING: b\nand more", "WARNING: c", "WARNING: a")
    assert (told.cause, told.evidence) == (Cause.CLOUD_INIT_WARNING, "WARNING: b")
    assert "Cloud-init warned: WARNING: b; WARNING: c; WARNING: a" in str(told)
    failed = with_guest_words(seen, ("init failed: x",), (), ())
    assert failed.cause is Cause.CLOUD_INIT
    booting = with_guest_words(Diagnosis(Cause.STILL_BOOTING), (), (), ("WARNING: a",))
    assert booting.cause is Cause.STILL_BOOTING
    assert booting.warnings == ("WARNING: a",)


def test_boots_are_told_when_there_were_several() -> None:
    told = str(diagnose(facts(phase="kernel", boots=7)))
    assert "Cause: the guest boots again and again (7 boots since it was switched on)" in told
    assert "Boot: got as far as: kernel, in its boot number 7 since power-on" in told
    assert "boot number" not in str(diagnose(facts(phase="kernel")))


OOPS = (
    "[    5.1] BUG: unable to handle page fault for address: ffffffffb74c5547",
    "[    5.1] RIP: 0010:text_poke+0x1/0x20",
)
REGISTERS = tuple(f"[    5.{number}] R{number}: 0000000000000000" for number in range(40))
PANIC = (
    "[    5.2] Kernel panic - not syncing: Fatal exception in interrupt",
    "[   16.0] ---[ end Kernel panic - not syncing: Fatal exception in interrupt ]---",
)


@pytest.mark.parametrize("before", [(), ("[    0.000000] Linux version 6.1", "booting")])
def test_panic_is_told_from_its_beginning(before: tuple[str, ...]) -> None:
    """What it was is said first; what is printed last are registers."""
    earlier = ("[    9.0] BUG: of the boot before", "SeaBIOS (version 1)")
    told = diagnose(facts(console=(*earlier, *before, *OOPS, *REGISTERS, *PANIC))).console
    assert told[: len(OOPS)] == OOPS
    assert told[-len(PANIC) :] == PANIC
    assert "…" in told
    assert len(told) < 30


def test_short_panic_is_told_whole() -> None:
    console = ("[    1.0] VFS: Cannot open root device", *PANIC)
    assert diagnose(facts(console=console)).console == console


def test_it_is_told_in_lines() -> None:
    text = str(
        Diagnosis(
            Cause.KERNEL_PANIC,
            "---[ end Kernel panic",
            waiting_for="the machine to be ready",
            waited=12.34,
            limit="1200 s (the default)",
            state="running",
            events=("RESET guest=True",),
            phase="kernel",
            console=("one", "two"),
        )
    )
    assert text.splitlines()[0] == "  Cause: kernel panic (---[ end Kernel panic)"
    assert "  Waited for: the machine to be ready, 12.3 s of 1200 s (the default)" in text
    assert text.endswith("  Console:\n    | one\n    | two")


def test_error_of_another_library_is_explained_too() -> None:
    error = paramiko.SSHException("no banner")
    explain(error, Diagnosis(Cause.NO_NETWORK))
    assert str(error).startswith("no banner\n  Cause: the guest has no network")
    assert error.diagnosis.cause is Cause.NO_NETWORK  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (paramiko.ChannelException(2, "Connect failed"), (2,)),
        (CleanupError([OSError("stuck")]), None),
        (PycloudlibError("it failed", 5), (5,)),
        (PycloudlibError(), ()),
        (PycloudlibError(7), (7,)),
    ],
)
def test_diagnosis_leaves_what_is_no_text_in_an_error_alone(
    error: Exception, kept: tuple[object, ...] | None
) -> None:
    before = tuple(value for value in error.args if not isinstance(value, str))
    explain(error, Diagnosis(Cause.NO_NETWORK))
    assert tuple(value for value in error.args if not isinstance(value, str)) == before
    assert kept is None or before == kept
    assert error.diagnosis.cause is Cause.NO_NETWORK  # type: ignore[attr-defined]
    texts = [value for value in error.args if isinstance(value, str)]
    assert not texts or Cause.NO_NETWORK.value in texts[0]


def test_what_a_guest_says_itself_is_told_without_the_console() -> None:
    assert not is_failure(GuestRefusedError("web: cat: /etc/shadow: Permission denied"))
    assert is_failure(CloudError("QEMU refused"))
