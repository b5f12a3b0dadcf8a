"""Starting QEMU: its sockets are made by us and handed over, then the process is born."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from pycloudlib.descriptors import make_socket_pair
from pycloudlib.errors import CloudError
from pycloudlib.qemu import ports
from pycloudlib.qemu.command import POWER_ON, Channels, Origin, build_command, ssh_rule
from pycloudlib.qemu.features import find_features
from pycloudlib.qemu.guardian import environment
from pycloudlib.qemu.memory import create_shared_memory
from pycloudlib.qemu.ownership import Orphans, Ownership, claim
from pycloudlib.qemu.process import ProcessEnd, QemuProcess
from pycloudlib.qemu.rundir import RunDirectory, StagedSocket
from pycloudlib.qemu.spec import MachineSpec

_log = logging.getLogger(__name__)

# Clients of a socket that the kernel lets wait while QEMU serves another.
_WAITING = 64


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
    """A QEMU that was just born, and that nobody else knows of yet.

    Attributes:
        process: Its process.
        control: Our end of its first QMP session.
        argv: Its command line.
        sockets: The unix sockets that it listens on, by another name than they are to have.
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
        """Make it the machine's QEMU in the eyes of all."""
        self.rundir.write_process(self.process.identity)
        for staged in self.sockets:
            staged.publish()

    def let_wait(self) -> None:
        """Let the clients of its sockets wait their turn; it lets one wait, when it has begun."""
        for listener in self.listeners:
            listener.listen(_WAITING)
            listener.close()

    def discard(self) -> None:
        """Give up what it has; the process is its owner's to end."""
        self.control.close()
        for listener in self.listeners:
            listener.close()
        for staged in self.sockets:
            staged.discard()


def start_qemu(
    binary: Path, spec: MachineSpec, rundir: RunDirectory, origin: Origin = POWER_ON
) -> StartedQemu:
    """Start QEMU.

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
        sockets = []
        for file in rundir.sockets:
            staged = StagedSocket.listen(file)
            ours.callback(staged.listener.close)
            ours.callback(staged.discard)
            sockets.append(staged)
        attach, qmp, helper = (staged.listener.fileno() for staged in sockets)
        console = ours.enter_context(_listen(spec.telnet_port))
        memory = None
        if origin.memory.shared:
            memory = create_shared_memory(spec.memory_kib << 10)
            theirs.callback(os.close, memory)
        channels = Channels(
            control=peer.fileno(),
            attach=attach,
            qmp=qmp,
            console=console.fileno(),
            helper=helper,
            console_log=rundir.console_log,
            memory=memory,
        )
        argv = build_command(str(binary), spec, channels, find_features(binary), origin)
        _log.debug("Starting %s", argv)
        descriptors = (*channels.descriptors, *origin.descriptors)
        # Whoever starts it has it from then on.
        found = Ownership.find(rundir.path)
        orphans = Orphans.REAP_AFTER_CRASH if found is None else found.orphans
        claim(rundir.path, orphans)
        process = QemuProcess.start(
            argv, pass_fds=descriptors, log=rundir.qemu_log, environment=environment(orphans)
        )
        ours.pop_all()
    listeners = (*(staged.listener for staged in sockets), console)
    return StartedQemu(process, control, argv, tuple(sockets), listeners, rundir)


def launch_error(argv: list[str], end: ProcessEnd, spec: MachineSpec) -> CloudError:
    """Say why a QEMU that ended at once did so."""
    # QEMU's own words when it cannot bind the port of a `hostfwd`; the caller's arguments may
    # hold others.
    if f"host forwarding rule '{ssh_rule(spec)}" in end.stderr:
        return PortTakenError(str(end))
    return LaunchError(argv, end)


def _listen(port: int) -> socket.socket:
    try:
        return ports.listen(port)
    except OSError as error:
        raise PortTakenError(f"Cannot listen on {ports.LOOPBACK}:{port}: {error}") from error
