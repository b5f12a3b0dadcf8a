"""The examination of a machine: from its state, events and console to the cause of a failure."""

from __future__ import annotations

import dataclasses
import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pycloudlib.diagnosis import Cause, Diagnosis
from pycloudlib.errors import InvalidKeyError, ToolError
from pycloudlib.guest.access import ssh
from pycloudlib.guest.boot.bootlines import Phase, find_kernel_failure, find_sign
from pycloudlib.guest.boot.cloudinit import merge_warnings
from pycloudlib.qemu.host.accelerator import KvmUnavailableError
from pycloudlib.qemu.vm.machine import Machine
from pycloudlib.qemu.vm.process import LaunchError, ProcessEnd
from pycloudlib.qemu.vm.qmp import Event, QmpError
from pycloudlib.qemu.vm.running import MachineEndedError, State

_CONSOLE_LINES = 12
_LONGEST_SHOWN = 300
_EVENTS = 8
_QMP_LIMIT = 2.0
# QEMU's states (RunState, qapi/run-state.json) of a machine whose processors do not run, except
# those with a cause of their own.
STANDS_STILL = frozenset(
    ("paused", "prelaunch", "suspended", "postmigrate", "finish-migrate", "inmigrate",
     "save-vm", "restore-vm", "internal-error", "watchdog", "shutdown", "debug", "colo")
)  # fmt: skip
# A machine boots twice if user-data reboots it.
_MANY_BOOTS = 4

# Messages of QEMU and the system in the output of a program of QEMU's; the first match counts. They
# are whole phrases, since names that others chose, of a binary, a machine or a file, stand beside
# them. The system's message (strerror) ends the line.
_QEMU_MESSAGES = (
    (
        Cause.KVM_UNAVAILABLE,
        # accel/kvm/kvm-all.c, accel/accel-system.c, system/vl.c, target/i386/kvm/kvm.c
        r"could not access kvm kernel module\b|failed to initialize kvm\b|invalid accelerator kvm\b"
        r"|ioctl\(kvm_\w+\)|\bkvm_\w+: assertion|\bkvm (?:run failed|internal error)"
        r"|\bkvm version (?:too old|not supported)|\bkvm (?:is not supported|does not support)\b",
    ),
    (Cause.HOST_DISK, r"(?:no space left on device|disk quota exceeded)\.?$"),
    (Cause.HOST_MEMORY, r"(?:cannot allocate memory|out of memory)\.?$"),
    (Cause.HOST_MEMORY, r"\bcannot set up guest memory\b"),
)


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts about a machine, from outside of the guest.

    Attributes:
        state: Its state.
        status: Its state by QEMU, or why QEMU does not answer; empty if it is off.
        end: How QEMU ended.
        events: The latest QMP events.
        console: Lines of the current boot on the console: the latest, and signs of failures.
        phase: How far the boot got.
        copied: Whether it is a copy of a machine that had booted.
        boots: How often the guest has booted in this power cycle.
        warnings: What cloud-init warned of on the console.
    """

    state: State
    status: str
    end: ProcessEnd | None
    events: tuple[Event, ...]
    console: tuple[str, ...]
    phase: str
    copied: bool = False
    boots: int = 1
    warnings: tuple[str, ...] = ()

    @classmethod
    def collect(cls, machine: Machine) -> Facts:
        """Collect the facts about a machine, which takes milliseconds."""
        state = machine.state
        status = ""
        if state is not State.OFF:
            try:
                status = machine.execute("query-status", timeout=_QMP_LIMIT)["status"]
            except (QmpError, MachineEndedError) as error:
                status = str(error)
        seen = machine.console.look()
        return cls(
            state,
            status,
            machine.end,
            machine.events,
            tuple(machine.console.lines),
            seen.phase.value if seen.phase else "",
            machine.rundir.fix_up.exists() or machine.rundir.fixed_up.exists(),
            seen.boots,
            merge_warnings(seen.warnings(seen.boot_start)),
        )


def diagnose(facts: Facts, error: BaseException | None = None) -> Diagnosis:
    """Return the diagnosis of a machine: the facts, and the cause that they show.

    Args:
        facts: The facts.
        error: The error, if something has failed.
    """
    cause, evidence = _find_cause(facts, error)
    end = error.end if isinstance(error, LaunchError) else facts.end
    state = facts.state.value
    if facts.status not in ("", state):
        state += f" (QMP: {facts.status})"
    if end is not None:
        state += f"; {end.how}"
    return Diagnosis(
        cause,
        evidence,
        state=state,
        exit_status=None if end is None else end.exit_status,
        stderr="" if end is None else end.stderr,
        events=tuple(_describe_event(event) for event in facts.events[-_EVENTS:]),
        phase=facts.phase,
        boots=facts.boots,
        warnings=facts.warnings,
        console=_shorten(facts.console, panic=cause is Cause.KERNEL_PANIC),
    )


def _shorten(console: Sequence[str], *, panic: bool) -> tuple[str, ...]:
    """Return the relevant lines of the console: its end, and the start of a panic far above it."""
    lines = [_shorten_line(line) for line in console if line]
    last = lines[-_CONSOLE_LINES:]
    begun = find_kernel_failure(lines) if panic else None
    if begun is None or begun >= len(lines) - _CONSOLE_LINES:
        return tuple(last)
    first = lines[begun : len(lines) - _CONSOLE_LINES][:_CONSOLE_LINES]
    return (*first, "…", *last)


def _shorten_line(line: str) -> str:
    return line if len(line) <= _LONGEST_SHOWN else line[:_LONGEST_SHOWN] + "…"


def diagnose_launch(error: BaseException) -> Diagnosis | None:
    """Return the diagnosis of a failed launch; None if the error says everything already."""
    found = _find_in_error(None, error)
    if found is None:
        return None
    end = error.end if isinstance(error, LaunchError) else None
    return Diagnosis(
        *found,
        exit_status=None if end is None else end.exit_status,
        stderr="" if end is None else end.stderr,
    )


def with_guest_words(
    diagnosis: Diagnosis,
    words: Sequence[str],
    failed_units: Sequence[str],
    warnings: Sequence[str] = (),
) -> Diagnosis:
    """Add the guest's own report; it is the cause if no other is known."""
    cause, evidence = diagnosis.cause, diagnosis.evidence
    warnings = merge_warnings(warnings, diagnosis.warnings)
    if cause in (Cause.UNKNOWN, Cause.STILL_BOOTING, Cause.CLOUD_INIT_WARNING):
        for mark, meaning in ((" is full", Cause.GUEST_DISK), (" failed: ", Cause.CLOUD_INIT)):
            lines = [line for line in words if mark in line]
            if lines:
                cause, evidence = meaning, lines[0]
                break
        else:
            if cause is not Cause.STILL_BOOTING and warnings:
                cause, evidence = Cause.CLOUD_INIT_WARNING, _first_line(warnings)
    return dataclasses.replace(
        diagnosis,
        cause=cause,
        evidence=evidence,
        guest=tuple(words),
        failed_units=tuple(failed_units),
        warnings=tuple(warnings),
    )


def _find_cause(facts: Facts, error: BaseException | None) -> tuple[Cause, str]:
    finders = (_find_in_error, _find_in_end, _find_in_state, _find_on_console, _find_in_connection)
    for finder in finders:
        found = finder(facts, error)
        if found is not None:
            return found
    if facts.boots >= _MANY_BOOTS:
        return Cause.REBOOTS, f"{facts.boots} boots since it was switched on"
    if facts.phase != Phase.CLOUD_INIT_DONE.value and not facts.copied:
        return Cause.STILL_BOOTING, ""
    if facts.warnings:
        return Cause.CLOUD_INIT_WARNING, _first_line(facts.warnings)
    return Cause.UNKNOWN, ""


def _first_line(texts: Sequence[str]) -> str:
    return texts[0].partition("\n")[0]


def _find_in_error(_facts: Facts | None, error: BaseException | None) -> tuple[Cause, str] | None:
    for link in _chain(error):
        found = None
        if isinstance(link, LaunchError):
            found = _find_in_output(link.end.stderr) or (Cause.QEMU_FAILED, link.end.how)
        elif isinstance(link, ToolError):
            found = _find_in_output(link.output)
        elif isinstance(link, KvmUnavailableError):
            found = Cause.KVM_UNAVAILABLE, ""
        elif isinstance(link, OSError):
            cause = _BY_NUMBER.get(link.errno or 0)
            found = None if cause is None else (cause, str(link))
        if found is not None:
            return found
    return None


_BY_NUMBER = {
    errno.ENOSPC: Cause.HOST_DISK,
    errno.EDQUOT: Cause.HOST_DISK,
    errno.ENOMEM: Cause.HOST_MEMORY,
}


def _find_in_output(output: str) -> tuple[Cause, str] | None:
    for cause, pattern in _QEMU_MESSAGES:
        for line in map(str.rstrip, output.splitlines()):
            if re.search(pattern, line, re.IGNORECASE):
                return cause, line
    return None


def _find_in_end(facts: Facts, _error: BaseException | None) -> tuple[Cause, str] | None:
    if facts.state is not State.OFF:
        return None
    end = facts.end
    if end is None or end.exit_status is None:
        return Cause.SWITCHED_OFF, "" if end is None else end.how
    if any(_is_panic(event) for event in facts.events):
        return Cause.KERNEL_PANIC, "QMP event SHUTDOWN, by the guest's panic"
    if any(_is_guests_end(event) for event in facts.events) and end.exit_status == 0:
        return Cause.POWERED_OFF, "QMP event SHUTDOWN, by the guest"
    if end.exit_status == 0:
        return Cause.SWITCHED_OFF, end.how
    cause = Cause.QEMU_KILLED if end.exit_status < 0 else Cause.QEMU_FAILED
    return _find_in_output(end.stderr) or (cause, end.how)


def _is_panic(event: Event) -> bool:
    """Whether QEMU has ended because its device pvpanic reported a panic."""
    return event.name == "SHUTDOWN" and event.data.get("reason") == "guest-panic"


def _is_guests_end(event: Event) -> bool:
    return event.name == "SHUTDOWN" and bool(event.data.get("guest"))


def _find_in_state(facts: Facts, _error: BaseException | None) -> tuple[Cause, str] | None:
    if facts.status == "io-error":
        return Cause.HOST_DISK, "QEMU has stopped the machine: status io-error"
    if facts.status == "guest-panicked":
        return Cause.KERNEL_PANIC, "status guest-panicked"
    if facts.status in STANDS_STILL:
        return Cause.STANDS_STILL, f"status {facts.status}"
    return None


def _find_on_console(facts: Facts, _error: BaseException | None) -> tuple[Cause, str] | None:
    found = find_sign(facts.console)
    return None if found is None else (found[0].cause, found[1])


def _find_in_connection(facts: Facts, error: BaseException | None) -> tuple[Cause, str] | None:
    """Find the cause of an SSH error: user-mode networking accepts connections before the guest.

    The types of the errors count, not their messages, which a guest may choose.
    """
    import paramiko  # noqa: PLC0415 - heavy

    kinds: tuple[tuple[Cause, tuple[type[BaseException], ...]], ...] = (
        (Cause.HOST_KEY, (ssh.HostKeyRefusedError, paramiko.BadHostKeyException)),
        (Cause.KEY_REFUSED, (paramiko.AuthenticationException,)),
        (Cause.NO_COMMANDS, (ssh.NoCommandsError,)),
        (Cause.NO_SSH_SERVER, (ssh.NoServerError, ConnectionResetError)),
    )
    links = _chain(error)
    if any(isinstance(link, InvalidKeyError) for link in links):
        return None  # it was raised on this host, and explains itself
    for cause, wanted in kinds:
        for link in links:
            if isinstance(link, wanted):
                return cause, str(link).partition("\n")[0]
    no_banner = any(isinstance(link, ssh.NoBannerError) for link in links)
    if no_banner and (facts.copied or facts.phase.startswith("cloud-init")):
        return Cause.NO_NETWORK, "connections to the guest are not answered"
    return None


def _chain(error: BaseException | None) -> list[BaseException]:
    """Return an error, its cause, the cause of that, and so on."""
    links: list[BaseException] = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__
    return links


def _describe_event(event: Event) -> str:
    data: dict[str, Any] = dict(event.data)
    facts = " ".join(f"{name}={value}" for name, value in data.items())
    return f"{event.name} {facts}".strip()
