"""What was going on with a machine when something failed: the facts, a cause, what to try."""

from __future__ import annotations

import enum
from dataclasses import dataclass

UNDIAGNOSED = "undiagnosed"
"""The attribute of an error that has its text from before a diagnosis was added to it."""


class Audience(enum.Enum):
    """Who reads a text, which names what they can use."""

    PROGRAMMERS = "those who write Python programs"
    COMMAND_LINE = "those who use the command line"


@enum.unique
class Cause(enum.Enum):
    """Why a machine did not do what was expected of it."""

    KVM_UNAVAILABLE = "KVM cannot be used"
    HOST_MEMORY = "the host is out of memory"
    HOST_DISK = "the host's disk is full"
    QEMU_KILLED = "QEMU was killed"
    QEMU_FAILED = "QEMU failed"
    POWERED_OFF = "the guest powered itself off"
    SWITCHED_OFF = "the machine is off"
    STANDS_STILL = "the machine is paused"
    NO_BOOTABLE_DISK = "no bootable disk"
    BOOT_LOADER_PROMPT = "the boot loader waits for input"
    KERNEL_PANIC = "kernel panic"
    GUEST_MEMORY = "the guest is out of memory"
    GUEST_DISK = "the guest's disk is full"
    HALTED = "the guest has halted"
    REBOOTS = "the guest boots again and again"
    EMERGENCY_SHELL = "emergency shell"
    HOST_KEY = "the SSH host key is not the machine's"
    KEY_REFUSED = "the SSH key is refused"
    NO_COMMANDS = "the login user may run no commands"
    CLOUD_INIT = "cloud-init failed"
    CLOUD_INIT_WARNING = "cloud-init warned"
    NO_NETWORK = "the guest has no network"
    NO_SSH_SERVER = "no SSH server answers in the guest"
    STILL_BOOTING = "the guest is still booting"
    UNKNOWN = "unknown"

    @property
    def hint(self) -> str:
        """What to try, for those who write programs."""
        return self.hint_for(Audience.PROGRAMMERS)

    def hint_for(self, audience: Audience) -> str:
        """Return what to try, in terms of what the readers use."""
        return _HINTS[self].format_map(_WORDS[audience])


_HINTS = {
    Cause.KVM_UNAVAILABLE: (
        "load the module (modprobe kvm_intel or kvm_amd), switch on virtualization in the firmware,"
        " join the group 'kvm', or set accelerator to 'auto' or 'tcg' in [qemu]"
    ),
    Cause.HOST_MEMORY: "launch smaller or fewer machines; free -m shows how much is free",
    Cause.HOST_DISK: (
        "free space in the file system of working_dir; the next {call} continues the machine"
    ),
    Cause.QEMU_KILLED: (
        "find out who sent the signal; SIGKILL may be the kernel's, short of memory: "
        "journalctl -k --grep 'Out of memory'"
    ),
    Cause.QEMU_FAILED: "read QEMU's own message above; {launch_args} are passed on unchecked",
    Cause.POWERED_OFF: (
        "user-data (power_state) or a user in the guest may have requested it; {start} switches it "
        "on again"
    ),
    Cause.SWITCHED_OFF: "{start} switches it on",
    Cause.STANDS_STILL: "it was launched with -S or stopped by QMP; QMP's cont resumes it",
    Cause.NO_BOOTABLE_DISK: (
        "the image has no boot loader for BIOS; boot its kernel directly ({kernel_cmdline})"
    ),
    Cause.BOOT_LOADER_PROMPT: (
        "the boot loader does not find its configuration: is the image complete?"
    ),
    Cause.KERNEL_PANIC: (
        "if it found no root file system: does root= name one that the kernel or its initrd can "
        "mount? Otherwise the first lines of the panic on the console name the fault; in emulation "
        "that may be QEMU: try again, with one processor ({one_processor})"
    ),
    Cause.GUEST_MEMORY: "launch it with more memory: {more_memory}",
    Cause.GUEST_DISK: "launch it with a larger disk: {larger_disk}",
    Cause.EMERGENCY_SHELL: (
        "a file system of /etc/fstab is missing or damaged, or root= is; the lines above it on the "
        "console name the unit that failed"
    ),
    Cause.HALTED: (
        "user-data (power_state) or a user in the guest may have requested it; {stop} switches it "
        "off"
    ),
    Cause.REBOOTS: (
        "find out on the console what reboots it in each boot: user-data that runs in each "
        "(bootcmd), a watchdog, or a kernel that panics with panic= set"
    ),
    Cause.HOST_KEY: (
        "another program may answer on the machine's port, or its QEMU runs where its process "
        "cannot be seen (another user, another container)"
    ),
    Cause.KEY_REFUSED: (
        "is the user right ({username})? User-data with a 'users' list removes the key of the "
        "default user; was authorized_keys changed?"
    ),
    Cause.NO_COMMANDS: (
        "log in as another user ({username}): cloud-init refuses root unless disable_root is false,"
        " and a shell like nologin runs nothing"
    ),
    Cause.CLOUD_INIT: "read its message above; /var/log/cloud-init.log in the guest has more",
    Cause.CLOUD_INIT_WARNING: (
        "cloud-init may have left out what it warned of; `sudo cloud-init schema --system` in the "
        "guest shows what is wrong with user-data"
    ),
    Cause.NO_NETWORK: "does network_config match the interface? {console} without a network",
    Cause.NO_SSH_SERVER: "is it installed and enabled? {console} without it",
    Cause.STILL_BOOTING: "{wait_longer}, or use a host with working KVM",
    Cause.UNKNOWN: "{logs} shows what the guest did",
}

_WORDS = {
    Audience.PROGRAMMERS: {
        "call": "call",
        "console": "telnet to the console's port works",
        "kernel_cmdline": "kernel_cmdline",
        "larger_disk": "disk_size_gib=20",
        "launch_args": "launch_args",
        "logs": "the console log",
        "more_memory": "instance_type='c1m2048'",
        "one_processor": "c1m...",
        "start": "start()",
        "stop": "shutdown()",
        "username": "username=",
        "wait_longer": "wait longer (ready_timeout)",
    },
    Audience.COMMAND_LINE: {
        "call": "command",
        "console": "'pycloudlib console' works",
        "kernel_cmdline": "--kernel-cmdline",
        "larger_disk": "'pycloudlib launch --disk 20G'",
        "launch_args": "the arguments of --launch-arg",
        "logs": "'pycloudlib logs'",
        "more_memory": "'pycloudlib launch --memory 2G'",
        "one_processor": "--cpus 1",
        "start": "'pycloudlib start'",
        "stop": "'pycloudlib stop'",
        "username": "--username",
        "wait_longer": "'pycloudlib wait --timeout' waits longer",
    },
}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was going on with a machine.

    Attributes:
        cause: Why, as far as it is known.
        evidence: What shows it: a line of the console, a message of QEMU's, an error.
        waiting_for: What was waited for; empty when nothing was.
        waited: Seconds spent waiting.
        limit: The limit of the wait, and where it comes from.
        state: What the machine was doing.
        exit_status: QEMU's exit status, negative for the signal that ended it; None while it runs,
            or when another program had started it.
        stderr: What QEMU printed.
        events: The latest QMP events, oldest first.
        phase: How far the boot got; empty before the first sign of life.
        boots: How often the guest has booted since it was switched on.
        warnings: What cloud-init warned of, as far as the guest or the console shows it.
        console: The latest lines on the serial console.
        guest: What the guest reports, if it answers: cloud-init's status, a full disk.
        failed_units: The systemd units that failed, if the guest answers.
    """

    cause: Cause
    evidence: str = ""
    waiting_for: str = ""
    waited: float = 0.0
    limit: str = ""
    state: str = ""
    exit_status: int | None = None
    stderr: str = ""
    events: tuple[str, ...] = ()
    phase: str = ""
    console: tuple[str, ...] = ()
    guest: tuple[str, ...] = ()
    failed_units: tuple[str, ...] = ()
    boots: int = 1
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.tell()

    def _describe_boot(self) -> str:
        text = f"got as far as: {self.phase}" if self.phase else ""
        if self.boots > 1:
            text += f"{', ' if text else ''}in its boot number {self.boots} since power-on"
        return text

    def tell(self, *, beside: str = "", audience: Audience = Audience.PROGRAMMERS) -> str:
        """Return the diagnosis as text, a line for each fact.

        Args:
            beside: The text before it; facts that it contains are left out.
            audience: Who reads it.
        """
        evidence = f" ({self.evidence})" if self.evidence else ""
        limit = f" of {self.limit}" if self.limit else ""
        lines = [
            ("Cause", f"{self.cause.value}{evidence}"),
            ("Try", self.cause.hint_for(audience)),
            ("Waited for", self.waiting_for and f"{self.waiting_for}, {self.waited:.1f} s{limit}"),
            ("Machine", self.state),
            ("QEMU said", self.stderr),
            ("QMP events", ", ".join(self.events)),
            ("Boot", self._describe_boot()),
            ("Guest", "; ".join(self.guest)),
            ("Failed units", ", ".join(self.failed_units)),
            ("Cloud-init warned", "; ".join(text.partition("\n")[0] for text in self.warnings)),
        ]
        text = "\n".join(
            f"  {name}: {value}" for name, value in lines if value and value not in beside
        )
        console = "".join(f"\n    | {line}" for line in self.console)
        return text + (f"\n  Console:{console}" if console else "")
