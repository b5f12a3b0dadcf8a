"""The QEMU process: its command line, its sockets made and handed over, its start and its end."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pycloudlib._base import tools
from pycloudlib._base.deadline import Deadline
from pycloudlib._base.files import make_socket_pair, moved
from pycloudlib.errors import CloudError, describe_exit
from pycloudlib.qemu.host import resources
from pycloudlib.qemu.host.accelerator import Features, find_features
from pycloudlib.qemu.host.ownership import Orphans, Ownership, claim, environment
from pycloudlib.qemu.host.processes import ProcessIdentity, World, find_proc_directory
from pycloudlib.qemu.parts.part import POWER_ON, Channels, Origin, Start, UnixListener
from pycloudlib.qemu.state.rundir import RunDirectory, StagedSocket
from pycloudlib.qemu.state.spec import MachineSpec
from pycloudlib.qemu.vm.memory import create_shared_memory

_OUTPUT_LIMIT = 16 * 1024
_KILL_LIMIT = 10.0
_log = logging.getLogger(__name__)
# Clients of a socket that wait in the kernel while QEMU serves another.
_WAITING = 64
# Seconds for which another program may hold a port that it only tries, and between two attempts.
_PORT_PATIENCE = 1.0
_PORT_INTERVAL = 0.05


def build_command(
    binary: str,
    spec: MachineSpec,
    channels: Channels,
    features: Features,
    origin: Origin = POWER_ON,
) -> list[str]:
    """Build the command line: what each part of the machine adds, and the caller's arguments."""
    start = Start(spec.disk, channels, features, origin)
    # fmt: off
    return [
        binary,
        "-name", f"guest={spec.name}",
        "-no-user-config", "-nodefaults",
        *(argument for part in spec.parts for argument in part.arguments(start)),
        *(spec.launch_args if origin.state is None else _incoming(spec.launch_args)),
        *(["-S"] if origin.is_twin else []),
    ]
    # fmt: on


def _incoming(launch_args: tuple[str, ...]) -> list[str]:
    """Have QEMU wait for a state, which says whether the machine runs: `-S` would overrule it."""
    return [*(argument for argument in launch_args if argument != "-S"), "-incoming", "defer"]


@dataclass(frozen=True, slots=True)
class ProcessEnd:
    """How a QEMU process ended.

    Attributes:
        exit_status: Its exit status, negative for the signal that ended it; None when it cannot
            be known because another process had started it.
        stderr: What it wrote to stdout and stderr since it was started.
    """

    exit_status: int | None
    stderr: str

    def __str__(self) -> str:
        output = f": {self.stderr}" if self.stderr else ", and said nothing on stderr"
        return f"{self.how}{output}"

    @property
    def how(self) -> str:
        """Its exit status or signal, for people."""
        if self.exit_status is None:
            return "QEMU ended with an unknown exit status"
        name = f" ({_signal_name(-self.exit_status)})" if self.exit_status < 0 else ""
        return f"QEMU ended with {describe_exit(self.exit_status)}{name}"


class QemuProcess:
    """A running or ended QEMU, made by `start` or `attach`. Safe to use from several threads.

    Attributes:
        identity: Which process it is, for other programs.
        pid: Its pid in our own PID namespace.
    """

    def __init__(
        self,
        identity: ProcessIdentity,
        pid: int,
        pidfd: int,
        log: Path,
        log_start: int,
        child: subprocess.Popen[bytes] | None,
    ) -> None:
        self.identity = identity
        self.pid = pid
        self._pidfd = pidfd
        self._log = log
        self._log_start = log_start
        self._child = child

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        *,
        pass_fds: Sequence[int],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> QemuProcess:
        """Start QEMU in a session of its own, so that Ctrl-C at the terminal does not end it.

        Args:
            argv: The command line.
            pass_fds: Descriptors that it inherits.
            log: Where its output goes, at the end of what is there.
            environment: Its environment; by default what every program gets.

        Raises:
            CloudError: The binary cannot be executed.
        """
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            log_start = os.fstat(descriptor).st_size
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                pass_fds=pass_fds,
                start_new_session=True,
                env=tools.environment() if environment is None else environment,
            )
        except OSError as error:
            raise CloudError(f"Cannot run {argv[0]!r}: {error}") from error
        finally:
            os.close(descriptor)
        try:
            # A child that has ended already keeps its pid until it is reaped.
            identity = ProcessIdentity.find(child.pid) or ProcessIdentity(child.pid, 0, World.own())
            pidfd = moved(os.pidfd_open(child.pid))
        except BaseException:
            # As where too many files are open: the process would be lost.
            child.kill()
            child.wait()
            raise
        return cls(identity, child.pid, pidfd, log, log_start, child)

    @classmethod
    def attach(cls, identity: ProcessIdentity, disk: Path | None, log: Path) -> QemuProcess | None:
        """Watch a QEMU that another process started; None when it does not run, or not here.

        Args:
            identity: Which process it was.
            disk: The machine's disk, which is on its command line: a second proof that this is
                the machine's own QEMU, where no boot of the host was recorded. None where the
                identity alone has to do.
            log: Where its output goes.
        """
        pid = identity.find_pid()
        if pid is None:
            return None
        try:
            pidfd = moved(os.pidfd_open(pid))
        except ProcessLookupError:
            return None
        # Checked again: the pidfd is of whatever process had the pid at that moment.
        if identity.find_pid() != pid or not (disk is None or _has_on_command_line(pid, disk)):
            os.close(pidfd)
            return None
        return cls(identity, pid, pidfd, log, 0, None)

    def fileno(self) -> int:
        """Return the pidfd, which becomes readable when the process ends."""
        return self._pidfd

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self.wait(0)

    def wait(self, seconds: float) -> bool:
        """Wait for the process's end; return whether it came."""
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return bool(poller.poll(seconds * 1000))

    def end(self) -> ProcessEnd:
        """Return how the process ended, which it must have."""
        exit_status = None if self._child is None else self._child.wait()
        return ProcessEnd(exit_status, self._read_output())

    def kill(self) -> None:
        """End the process at once and wait until it is gone; no error when it is gone already.

        Raises:
            CloudError: The kernel did not end it.
        """
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        if not self.wait(_KILL_LIMIT):
            raise CloudError(f"QEMU, pid {self.pid}, did not end")

    def terminate(self) -> None:
        """Ask the process to end (SIGTERM), without waiting for it."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    def _read_output(self) -> str:
        try:
            with self._log.open("rb") as log:
                # The reason is in the last lines; after a long run there is much before them.
                end = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, end - _OUTPUT_LIMIT))
                return log.read().decode(errors="replace").strip()
        except FileNotFoundError:
            return ""

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # interrupted before it was whole
            os.close(self._pidfd)


def _has_on_command_line(pid: int, disk: Path) -> bool:
    """Whether a process has a disk on its command line; it may see it by another mount."""
    try:
        command = (find_proc_directory(pid) / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    # As in QEMU's options, where a comma in a path is written twice.
    return os.fsencode(Path(*disk.parts[-2:])) in command.replace(b",,", b",")


def is_open_elsewhere(identity: ProcessIdentity, disk: Path) -> bool:
    """Whether a QEMU that cannot be seen from here runs a machine, or may run it.

    On our own kernel, QEMU's own lock on the disk shows it. On another one nothing does.
    """
    if not identity.is_elsewhere:
        return False
    world = identity.world
    return world is None or world.boot != World.own().boot or _is_locked(disk)


def _is_locked(disk: Path) -> bool:
    """Whether another process holds a lock on a part of a file, as QEMU does on its disks."""
    with contextlib.suppress(FileNotFoundError), disk.open("rb") as file:
        # struct flock: l_type, l_whence, l_start, l_len, l_pid; all of the file.
        wanted = struct.pack("@hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        found = fcntl.fcntl(file, fcntl.F_OFD_GETLK, wanted)
        return bool(struct.unpack_from("@h", found)[0] != fcntl.F_UNLCK)
    return False


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


class LaunchError(CloudError):
    """QEMU did not start.

    Attributes:
        argv: Its command line.
        end: How the process ended, with its exit status and stderr.
    """

    def __init__(self, argv: list[str], end: ProcessEnd) -> None:
        self.argv = argv
        self.end = end
        super().__init__(f"The machine could not be started. {end}")


class PortTakenError(CloudError):
    """Another program listens on a port that the machine was to have."""


@dataclass(frozen=True, slots=True)
class StartedQemu:
    """A QEMU that was just started, and that nobody else can find yet.

    Attributes:
        process: Its process.
        control: Our end of its first QMP session.
        argv: Its command line.
        sockets: The unix sockets that it listens on, still under temporary names.
        listeners: All sockets that it listens on.
        rundir: The machine's directory.
    """

    process: QemuProcess
    control: socket.socket
    argv: list[str]
    sockets: tuple[StagedSocket, ...]
    listeners: tuple[socket.socket, ...]
    rundir: RunDirectory

    def publish(self) -> None:
        """Publish it to other programs as the machine's QEMU."""
        self.rundir.write_process(self.process.identity)
        for staged in self.sockets:
            staged.publish()

    def queue_clients(self) -> None:
        """Make the queues of its sockets longer: QEMU's own listen(2) lets one client wait."""
        for listener in self.listeners:
            listener.listen(_WAITING)
            listener.close()

    def discard(self) -> None:
        """Close and remove its sockets, and end its process."""
        self.control.close()
        for listener in self.listeners:
            listener.close()
        for staged in self.sockets:
            staged.discard()
        self.process.kill()
        self.process.end()


def start_qemu(
    binary: Path,
    spec: MachineSpec,
    rundir: RunDirectory,
    origin: Origin = POWER_ON,
    programs: Mapping[str, int] | None = None,
) -> StartedQemu:
    """Start QEMU.

    Args:
        binary: The QEMU binary.
        spec: The machine.
        rundir: Its directory.
        origin: What it begins with.
        programs: Connections to the programs of its parts; see `Channels`.

    Raises:
        PortTakenError: Another program listens on the console's port.
        CloudError: The binary cannot be executed.
    """
    # QEMU appends to it, and would make it readable for everybody.
    rundir.console_log.touch(mode=0o600)
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
        control, peer = make_socket_pair()
        ours.callback(control.close)
        theirs.callback(peer.close)
        listeners, sockets = _listen(spec, rundir, ours)
        memory = None
        if origin.memory.shared:
            memory = create_shared_memory(spec.memory_kib << 10)
            theirs.callback(os.close, memory)
        numbers = {name: listener.fileno() for name, listener in listeners.items()}
        channels = Channels(peer.fileno(), numbers, memory, programs or {})
        argv = build_command(str(binary), spec, channels, find_features(binary), origin)
        _log.debug("Starting %s", argv)
        descriptors = (*channels.descriptors, *origin.descriptors)
        process = QemuProcess.start(
            argv,
            pass_fds=descriptors,
            log=rundir.qemu_log,
            environment=owned_environment(rundir),
        )
        ours.pop_all()
    return StartedQemu(process, control, argv, sockets, tuple(listeners.values()), rundir)


def owned_environment(rundir: RunDirectory) -> Mapping[str, str]:
    """Return the environment of what runs a machine, which this program owns from now on."""
    found = Ownership.find(rundir.path)
    orphans = Orphans.REAP_AFTER_CRASH if found is None else found.orphans
    claim(rundir.path, orphans)
    return environment(orphans)


def launch_error(argv: list[str], end: ProcessEnd, spec: MachineSpec) -> CloudError:
    """Return the error that says why a QEMU ended at once."""
    # What QEMU says when it cannot bind the port of a `hostfwd`; the caller's arguments may have
    # others.
    rules = (rule for part in spec.parts for rule in part.forwards)
    if any(f"host forwarding rule '{rule}" in end.stderr for rule in rules):
        return PortTakenError(str(end))
    return LaunchError(argv, end)


def _listen(
    spec: MachineSpec, rundir: RunDirectory, stack: contextlib.ExitStack
) -> tuple[dict[str, socket.socket], tuple[StagedSocket, ...]]:
    """Listen for each part of a machine; `stack` closes the sockets.

    Returns:
        The sockets, by the names that parts give them, and those of them that have a file.

    Raises:
        PortTakenError: Another program listens on a port.
    """
    listeners: dict[str, socket.socket] = {}
    files = []
    for part in spec.parts:
        for wanted in part.listeners:
            if isinstance(wanted, UnixListener):
                staged = StagedSocket.listen(rundir.path / wanted.file)
                stack.callback(staged.discard)
                files.append(staged)
                listener = staged.listener
            else:
                listener = _listen_on(wanted.port)
            stack.callback(listener.close)
            listeners[wanted.name] = listener
    return listeners, tuple(files)


def _listen_on(port: int) -> socket.socket:
    try:
        return resources.listen(port)
    except OSError as error:
        raise PortTakenError(f"Cannot listen on {resources.LOOPBACK}:{port}: {error}") from error


def retry_taken_ports(start: Callable[[], None]) -> None:
    """Start a machine whose ports are fixed; retry while another program briefly holds one.

    Raises:
        PortTakenError: It holds one for longer.
    """
    deadline = Deadline.after(_PORT_PATIENCE)
    while True:
        try:
            return start()
        except PortTakenError:
            if deadline.expired:
                raise
            time.sleep(_PORT_INTERVAL)
