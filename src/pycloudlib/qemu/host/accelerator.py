"""Which accelerator works on this host, and which features a QEMU has: both found by trying."""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import json
import logging
import os
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pycloudlib._base.documents import decode, parse_json, read_kernel_file
from pycloudlib._base.files import create_directories, moved, replace_atomically, write_private
from pycloudlib._base.tools import environment
from pycloudlib.errors import CloudSetupError, describe_exit

_log = logging.getLogger(__name__)


class KvmUnavailableError(CloudSetupError):
    """KVM is configured, and does not work on this host."""


# QEMU's names of the CPU features by which a processor says that its string instructions take a
# byte as fast as a longer unit. In emulation each byte is a step of its own, and a guest that
# believes it copies and clears memory, above all every new page, by bytes.
_SLOW_IN_EMULATION = ("erms", "fsrm", "fzrm", "fsrs", "fsrc")


@enum.unique
class Accelerator(enum.Enum):
    """How QEMU executes the guest's instructions; the values are QEMU's names."""

    KVM = "kvm"
    TCG = "tcg"

    @property
    def cpu_model(self) -> str:
        """The CPU model of machines: all features that the accelerator has."""
        return "host" if self is Accelerator.KVM else "max"

    @property
    def slow_features(self) -> tuple[str, ...]:
        """The CPU features of the model that only slow its guests down."""
        return () if self is Accelerator.KVM else _SLOW_IN_EMULATION


@dataclass(frozen=True, slots=True)
class Choice:
    """An accelerator and why it was chosen."""

    accelerator: Accelerator
    reason: str


@dataclass(frozen=True, slots=True)
class Trial:
    """The result of a trial of an accelerator.

    Attributes:
        problem: What went wrong; None if it works.
        conclusive: Whether another trial would have the same result. A time-out by the wall clock
            may only mean that the host is busy.
    """

    problem: str | None
    conclusive: bool = True


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The outcome of a trial, as it is cached."""

    problem: str | None


AUTO = "auto"
SETTINGS = (AUTO, *(accelerator.value for accelerator in Accelerator))
"""The values of `accelerator` in the configuration."""

KVM_DEVICE = Path("/dev/kvm")

# The payload takes a working KVM a tenth of a second of processor time, and one that only seems to
# work three seconds or more. The wall-clock limit is for a QEMU that hangs without computing: time
# in which it could compute, but others have the processors, does not count, up to a bound.
_CPU_LIMIT_SECONDS = 1
WALL_LIMIT_SECONDS = 2.5
QUEUE_LIMIT_SECONDS = 30.0

# The payload ends QEMU by writing 0x2a to isa-debug-exit, which makes the exit status 0x2a * 2 + 1.
_PASSED = 0x2A * 2 + 1

# Assembled from:
#   cli; xor ax,ax; mov ds,ax; mov es,ax; mov ss,ax; mov sp,0x7c00
#   clear 0x1000..0x3fff; PML4[0] = 0x2003, PDPT[0] = 0x3003, PD[0] = 0x83 (one 2 MiB page)
#   cr4 = PAE; cr3 = 0x1000; EFER |= LME; lgdt; cr0 |= PG | PE; ljmp 8:long
#   long: mov ecx,2000000; 1: dec ecx; jnz 1b; mov dx,0xf4; mov al,0x2a; out dx,al; 2: hlt; jmp 2b
#   gdt: null, 64-bit code; gdtr
_PAYLOAD = bytes.fromhex(
    "fa31c08ed88ec08ed0bc007cbf00106631c0b9000cfc66f3ab66c70600100320000066c706002003"
    "30000066c70600308300000066b8200000000f22e066b8001000000f22d866b9800000c00f32660d"
    "000100000f30660f0116987c0f20c0660d010000800f22c066ea707c00000800b980841e00ffc975"
    "fc66baf400b02aeef4ebfd0f1f440000000000000000000000000000009a20000f00887c"
)
BOOT_SECTOR = _PAYLOAD.ljust(510, b"\0") + b"\x55\xaa"


SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
"""QEMU's option `-sandbox` for machines."""

_LIMIT_SECONDS = 30
_LONGEST_SHOWN = 500
_QUERIES = (
    b'{"execute": "qmp_capabilities"}'
    b' {"execute": "qom-list-properties", "arguments": {"typename": "memory-backend-file"}}'
    b' {"execute": "qom-list-properties", "arguments": {"typename": "max-x86_64-cpu"}}'
    b' {"execute": "quit"}\n'
)


def choose_accelerator(setting: str, qemu_binary: Path, cache_dir: Path) -> Choice:
    """Return the accelerator to use, and log which and why.

    Args:
        setting: `auto`, `kvm` or `tcg`, from the configuration.
        qemu_binary: The QEMU that will run the machines.
        cache_dir: Where the outcome of a trial is cached.

    Raises:
        KvmUnavailableError: `kvm` is configured and does not work; says why.
    """
    if setting == Accelerator.TCG.value:
        choice = Choice(Accelerator.TCG, "configured")
    else:
        is_required = setting == Accelerator.KVM.value
        problem = kvm_problem(qemu_binary, cache_dir, retry=is_required)
        if problem is None:
            choice = Choice(Accelerator.KVM, "KVM was tried and works")
        elif is_required:
            raise KvmUnavailableError(
                f"accelerator is 'kvm' in [qemu], but KVM does not work here: {problem}. "
                "Set it to 'auto' or 'tcg' for software emulation"
            )
        else:
            choice = Choice(Accelerator.TCG, f"KVM does not work here: {problem}")
    _log.info("Accelerator: %s (%s)", choice.accelerator.value, choice.reason)
    return choice


def kvm_problem(qemu_binary: Path, cache_dir: Path, *, retry: bool = False) -> str | None:
    """Return what is wrong with KVM; None if it works.

    The outcome of a trial is valid for this boot of the host, this QEMU and this CPU model.

    Args:
        qemu_binary: The QEMU that will run the machines.
        cache_dir: Where the outcome is cached.
        retry: Whether to try again after a cached failure.
    """
    if not KVM_DEVICE.exists():
        return f"{KVM_DEVICE} does not exist (no virtualization, or the kvm module is not loaded)"
    if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return f"no permission for {KVM_DEVICE} (is this user in the group 'kvm'?)"
    cached = cache_dir / f"kvm-{_fingerprint(qemu_binary)}.json"
    # If it cannot be read, KVM is tried again.
    with contextlib.suppress(OSError, ValueError):
        outcome = decode(_Outcome, parse_json(cached.read_bytes())).problem
        if outcome is None or not retry:
            return outcome
    trial = try_accelerator(qemu_binary, Accelerator.KVM)
    if trial.conclusive:
        _cache(cached, trial.problem)
    return trial.problem


def try_accelerator(
    qemu_binary: Path, accelerator: Accelerator, wall_limit: float = WALL_LIMIT_SECONDS
) -> Trial:
    """Run the payload, with the CPU model of machines.

    Args:
        qemu_binary: The QEMU.
        accelerator: What it is to execute the payload with.
        wall_limit: Seconds after which it is taken for one that hangs, beside those in which it
            waits for a processor.
    """
    with tempfile.TemporaryDirectory(prefix="pycloudlib-probe-") as directory:
        disk = Path(directory) / "boot-sector.img"
        disk.write_bytes(BOOT_SECTOR)
        process = subprocess.Popen(
            _probe_command(qemu_binary, accelerator, disk),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment(),
        )
        try:
            # At the soft limit the kernel ends it with SIGXCPU, which would write a core file.
            with contextlib.suppress(ProcessLookupError):
                limits = (_CPU_LIMIT_SECONDS, _CPU_LIMIT_SECONDS + 1)
                resource.prlimit(process.pid, resource.RLIMIT_CPU, limits)
                resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
            stderr = _communicate(process, wall_limit)
        except subprocess.TimeoutExpired:
            problem = f"a boot sector did not end within {wall_limit} s"
            return Trial(problem, conclusive=False)
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
    status = process.returncode
    # A plain error, such as a busy device, may not occur again; a crash will.
    conclusive = status == _PASSED or status < 0
    return Trial(_judge(status, stderr.decode(errors="replace").strip()), conclusive)


def _communicate(process: subprocess.Popen[bytes], wall_limit: float) -> bytes:
    """Return what a process writes to stderr until its end.

    Raises:
        subprocess.TimeoutExpired: It takes too long, and not since others have the processors.
    """
    limit, granted = wall_limit, 0.0
    while True:
        try:
            return process.communicate(timeout=limit)[1]
        except subprocess.TimeoutExpired:
            queued = min(measure_queueing(process.pid), QUEUE_LIMIT_SECONDS)
            limit, granted = queued - granted, queued
            if limit < wall_limit / 10:
                raise


def measure_queueing(pid: int) -> float:
    """Return how long a process has waited for a processor, in seconds; 0 if that is unknown."""
    queued = 0
    # Not all kernels count it, and a thread may end meanwhile.
    with contextlib.suppress(OSError, ValueError, IndexError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            # Nanoseconds on a processor, and in a queue for one.
            queued = max(queued, int(read_kernel_file(thread / "schedstat").split()[1]))
    return queued / 1e9


def _judge(exit_status: int, stderr: str) -> str | None:
    if exit_status == _PASSED:
        return None
    if exit_status in (-24, -9):  # SIGXCPU, or SIGKILL at the hard limit
        return (
            f"a boot sector used up {_CPU_LIMIT_SECONDS} s of processor time, ten times what a "
            "working KVM needs (guest instructions are probably interpreted in the host's kernel)"
        )
    message = stderr.splitlines()[-1] if stderr else "nothing on stderr"
    return f"QEMU ended with {describe_exit(exit_status)}: {message}"


def _probe_command(qemu_binary: Path, accelerator: Accelerator, disk: Path) -> list[str]:
    # fmt: off
    return [
        str(qemu_binary),
        "-no-user-config", "-nodefaults",
        "-display", "none",
        "-m", "16",
        "-accel", accelerator.value,
        "-cpu", accelerator.cpu_model,
        "-device", "isa-debug-exit,iobase=0xf4,iosize=1",
        "-drive", f"if=ide,format=raw,snapshot=on,file={str(disk).replace(',', ',,')}",
    ]
    # fmt: on


def _fingerprint(qemu_binary: Path) -> str:
    """Return a key for this boot of the host, this QEMU, the CPU model and the trial."""
    build = qemu_binary.stat()
    boot_id = read_kernel_file("/proc/sys/kernel/random/boot_id")[:8]
    facts = [str(qemu_binary), build.st_size, build.st_mtime_ns, build.st_ino]
    facts += [Accelerator.KVM.cpu_model, BOOT_SECTOR.hex(), _CPU_LIMIT_SECONDS]
    return f"{boot_id}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"


def _cache(path: Path, problem: str | None) -> None:
    # Without a writable cache the next process tries again.
    with contextlib.suppress(OSError):
        create_directories(path.parent)
        this_boot = path.name.rpartition("-")[0]
        for other in path.parent.glob("kvm-*.json"):
            if not other.name.startswith(this_boot):
                other.unlink(missing_ok=True)
        with replace_atomically(path) as temporary:
            write_private(temporary, json.dumps({"problem": problem}) + "\n")


@dataclass(frozen=True, slots=True)
class Features:
    """The features of a QEMU build.

    Attributes:
        sandbox: Whether it has a sandbox (seccomp).
        read_only_memory: Whether it can map memory from a file that it cannot write to (since 8.2).
        slow_features: The CPU features that it knows, of those that slow emulation down.
    """

    sandbox: bool = True
    read_only_memory: bool = True
    slow_features: tuple[str, ...] = _SLOW_IN_EMULATION


@functools.cache
def find_features(binary: Path) -> Features:
    """Query the features of a QEMU binary, once in this process.

    Raises:
        CloudSetupError: It is not QEMU, or cannot run here.
    """
    answers, problem = _query(binary)
    if problem:
        raise CloudSetupError(
            f"qemu_binary {str(binary)!r} does not answer as QEMU does: {problem}; expected "
            "qemu-system-x86_64 or a path to one"
        )
    sandbox = not _query(binary, "-sandbox", SANDBOX)[1]
    if not sandbox:
        _log.warning("%s was built without seccomp: machines run without QEMU's sandbox", binary)
    return Features(
        sandbox=sandbox,
        read_only_memory=_names(answers, "rom"),
        slow_features=tuple(name for name in _SLOW_IN_EMULATION if _names(answers, name)),
    )


def _names(answers: bytes, property_: str) -> bool:
    return f'"name": "{property_}"'.encode() in answers


def _query(binary: Path, *options: str) -> tuple[bytes, str]:
    """Start the binary without a machine, and send it queries.

    Returns:
        Its answers, and what is wrong with them: empty if it answers as QEMU does.
    """
    # fmt: off
    argv = [
        str(binary), "-no-user-config", "-nodefaults",
        "-machine", "none", "-display", "none",
        *options,
        "-chardev", "stdio,id=control", "-mon", "chardev=control,mode=control",
    ]
    # fmt: on
    try:
        with _pipe_with(_QUERIES) as queries:
            answer = subprocess.run(
                argv,
                stdin=queries,
                capture_output=True,
                timeout=_LIMIT_SECONDS,
                check=False,
                env=environment(),
            )
    except subprocess.TimeoutExpired:
        raise CloudSetupError(
            f"qemu_binary {str(binary)!r} did not answer within {_LIMIT_SECONDS} s; is this host "
            "overloaded?"
        ) from None
    except OSError as error:
        return b"", str(error)
    if answer.returncode == 0 and b'"QMP"' in answer.stdout:
        return answer.stdout, ""
    output = (answer.stderr + answer.stdout).decode(errors="replace").strip()[-_LONGEST_SHOWN:]
    end = f"it ended with {describe_exit(answer.returncode)}"
    return b"", f"{end}, and said: {output}" if output else end


@contextlib.contextmanager
def _pipe_with(content: bytes) -> Iterator[int]:
    """Yield a pipe that holds all of the content, so that its reader never waits for us."""
    reading, writing = (moved(end) for end in os.pipe())
    try:
        try:
            os.write(writing, content)  # a pipe takes at least 4096 bytes at once
        finally:
            os.close(writing)
        yield reading
    finally:
        os.close(reading)
