"""Starting QEMU: its sockets are made by us and handed over, then the process is born."""

from __future__ import annotations

import contextlib
import logging
import socket
from dataclasses import dataclass
from pathlib import Path

from pycloudlib.errors import CloudError
from pycloudlib.qemu import ports
from pycloudlib.qemu.command import Channels, build_command
from pycloudlib.qemu.features import find_features
from pycloudlib.qemu.process import ProcessEnd, QemuProcess
from pycloudlib.qemu.rundir import RunDirectory
from pycloudlib.qemu.spec import MachineSpec

_log = logging.getLogger(__name__)


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
    """A QEMU that was just born.

    Attributes:
        process: Its process.
        control: Our end of its first QMP session.
        argv: Its command line.
        console_start: Where in the console log its output begins, in bytes.
    """

    process: QemuProcess
    control: socket.socket
    argv: list[str]
    console_start: int


def start_qemu(binary: Path, spec: MachineSpec, rundir: RunDirectory) -> StartedQemu:
    """Start QEMU and note in the run directory which process it is.

    Raises:
        PortTakenError: Another program listens on the console's port.
        CloudError: The binary cannot be executed.
    """
    # QEMU appends to it, and would make it readable for everybody.
    rundir.console_log.touch(mode=0o600)
    console_start = rundir.console_log.stat().st_size
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
        control, peer = socket.socketpair()
        ours.callback(control.close)
        theirs.callback(peer.close)
        channels = Channels(
            control=peer.fileno(),
            attach=theirs.enter_context(rundir.open_listener(rundir.attach_socket)).fileno(),
            qmp=theirs.enter_context(rundir.open_listener(rundir.qmp_socket)).fileno(),
            console=theirs.enter_context(_listen(spec.telnet_port)).fileno(),
            console_log=rundir.console_log,
        )
        argv = build_command(str(binary), spec, channels, find_features(binary))
        _log.debug("Starting %s", argv)
        process = QemuProcess.start(argv, pass_fds=channels.descriptors, log=rundir.qemu_log)
        ours.callback(process.kill)
        rundir.write_process(process.identity)
        ours.pop_all()
    return StartedQemu(process, control, argv, console_start)


def launch_error(argv: list[str], end: ProcessEnd, spec: MachineSpec) -> CloudError:
    """Say why a QEMU that ended at once did so."""
    # QEMU's own words when it cannot bind the port of a `hostfwd`; the caller's arguments may
    # hold others.
    rule = f"host forwarding rule 'tcp:{ports.LOOPBACK}:{spec.ssh_port}-"
    if rule in end.stderr:
        return PortTakenError(str(end))
    return LaunchError(argv, end)


def _listen(port: int) -> socket.socket:
    try:
        return ports.listen(port)
    except OSError as error:
        raise PortTakenError(f"Cannot listen on {ports.LOOPBACK}:{port}: {error}") from error
