"""What was going on with a machine when something failed: the facts, a cause, what to try."""

from __future__ import annotations

import enum
from dataclasses import dataclass

UNDIAGNOSED = "undiagnosed"
"""The attribute of an error that has its text from before a diagnosis was added to it."""


@enum.unique
class Cause(enum.Enum):
    """Why a machine does not do what it is waited for to do."""

    KVM_UNAVAILABLE = "KVM cannot be used"
    HOST_MEMORY = "the host is out of memory"
    HOST_DISK = "the host's disk is full"
    QEMU_KILLED = "QEMU was killed"
    QEMU_FAILED = "QEMU failed"
    POWERED_OFF = "the guest powered itself off"
    SWITCHED_OFF = "the machine is off"
    STANDS_STILL = "the machine stands still"
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
    UNKNOWN = "nothing that is known"

    @property
    def hint(self) -> str:
        """What to try, for those who write programs."""
        return _HINTS[self]


_HINTS = {
    Cause.KVM_UNAVAILABLE: (
        "load the module (modprobe kvm_intel or kvm_amd), switch on virtualization in the firmware,"
        " be in the group 'kvm', or let accelerator be 'auto' or 'tcg' in [qemu]"
    ),
    Cause.HOST_MEMORY: "launch smaller or fewer machines; free -m tells what there is",
    Cause.HOST_DISK: "make room where working_dir is; the machine goes on with the next call",
    Cause.QEMU_KILLED: (
        "whoever sent the signal knows; of SIGKILL that may be the kernel, short of memory: "
        "journalctl -k --grep 'Out of memory'"
    ),
    Cause.QEMU_FAILED: "QEMU's own words are above; launch_args are taken as they are",
    Cause.POWERED_OFF: (
        "user-data may have asked for it (power_state), or somebody in the guest; start() switches "
        "it on again"
    ),
    Cause.SWITCHED_OFF: "start() switches it on",
    Cause.STANDS_STILL: "it was launched with -S or stopped by QMP; QMP's cont lets it go on",
    Cause.NO_BOOTABLE_DISK: (
        "the image has no boot loader for BIOS; boot its kernel directly (kernel_cmdline)"
    ),
    Cause.BOOT_LOADER_PROMPT: (
        "the boot loader does not find its configuration: was the image made whole?"
    ),
    Cause.KERNEL_PANIC: (
        "where it found no root file system: does root= name one that the kernel or its initrd can "
        "mount? Else the console's first lines of it name what was at fault; in emulation that may "
        "be QEMU: try again, with one processor (c1m...)"
    ),
    Cause.GUEST_MEMORY: "give it more memory: instance_type='c1m2048'",
    Cause.GUEST_DISK: "its disk has the size of the image, or 10 GiB: build or resize the image",
    Cause.EMERGENCY_SHELL: (
        "a file system of /etc/fstab is missing or damaged, or root= is; the lines above it on the "
        "console tell which unit failed"
    ),
    Cause.HALTED: (
        "user-data may have asked for it (power_state), or somebody in the guest; shutdown() "
        "switches it off"
    ),
    Cause.REBOOTS: (
        "what has it reboot in each of its boots? User-data that is run in each (bootcmd), a "
        "watchdog, a kernel that panics with panic= set: the console tells"
    ),
    Cause.HOST_KEY: (
        "another program may answer on the machine's port, or its QEMU runs where its process "
        "cannot be looked at (another user, another container)"
    ),
    Cause.KEY_REFUSED: (
        "is the user right (username=)? User-data with a 'users' list takes the key away from the "
        "default user; did somebody change authorized_keys?"
    ),
    Cause.NO_COMMANDS: (
        "log in as another user (username=): cloud-init lets nobody in as root unless disable_root "
        "is false, and a shell like nologin runs nothing"
    ),
    Cause.CLOUD_INIT: "its words are above; /var/log/cloud-init.log in the guest tells more",
    Cause.CLOUD_INIT_WARNING: (
        "cloud-init may have left out what it warned of; `sudo cloud-init schema --system` in the "
        "guest tells what is wrong with user-data"
    ),
    Cause.NO_NETWORK: (
        "does network_config match the interface? The console's port is open still: telnet there"
    ),
    Cause.NO_SSH_SERVER: (
        "is it installed and enabled? The console's port is open still: telnet there"
    ),
    Cause.STILL_BOOTING: "give it more time (ready_timeout), or a host with working KVM",
    Cause.UNKNOWN: "the console log tells what the guest did",
}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was going on with a machine.

    Attributes:
        cause: Why, as far as that can be told.
        evidence: What tells it: a line of the console, a word of QEMU's, an error.
        waiting_for: What was waited for; empty when nothing was.
        waited: Seconds that it was waited for.
        limit: How long that might take, and where the limit comes from.
        state: What the machine was doing.
        exit_status: QEMU's exit status, negative for the signal that ended it; None while it runs,
            or when another program had started it.
        stderr: What QEMU said.
        events: The latest QMP events, oldest first.
        phase: How far the boot got; empty before the first sign of life.
        boots: How often the guest has booted since it was switched on.
        warnings: What cloud-init warned of, as far as the guest or the console tells.
        console: The latest lines on the serial console.
        guest: What the guest says, where it can be asked: cloud-init of itself, a full disk.
        failed_units: The systemd units that failed, where it can be asked.
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

    def _tell_boot(self) -> str:
        told = f"got as far as: {self.phase}" if self.phase else ""
        if self.boots > 1:
            told += f"{', ' if told else ''}in its boot number {self.boots} since power-on"
        return told

    def tell(self, *, beside: str = "", hint: str | None = None) -> str:
        """Return it as text, a line for each fact.

        Args:
            beside: A text that it follows; facts that this has are not told again.
            hint: What to try, for readers who do not write programs; by default `Cause.hint`.
        """
        told = f" ({self.evidence})" if self.evidence else ""
        limit = f" of {self.limit}" if self.limit else ""
        lines = [
            ("Cause", f"{self.cause.value}{told}"),
            ("Try", self.cause.hint if hint is None else hint),
            ("Waited for", self.waiting_for and f"{self.waiting_for}, {self.waited:.1f} s{limit}"),
            ("Machine", self.state),
            ("QEMU said", self.stderr),
            ("QMP events", ", ".join(self.events)),
            ("Boot", self._tell_boot()),
            ("Guest", "; ".join(self.guest)),
            ("Failed units", ", ".join(self.failed_units)),
            ("Cloud-init warned", "; ".join(text.partition("\n")[0] for text in self.warnings)),
        ]
        text = "\n".join(
            f"  {name}: {value}" for name, value in lines if value and value not in beside
        )
        console = "".join(f"\n    | {line}" for line in self.console)
        return text + (f"\n  Console:{console}" if console else "")
