"""Programs that serve a machine beside QEMU: started before it, watched, and ended after it."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
from dataclasses import dataclass

from pycloudlib._base.files import make_socket
from pycloudlib.errors import describe_exit
from pycloudlib.qemu.parts.part import Program
from pycloudlib.qemu.state.rundir import RunDirectory, StagedSocket, short_path
from pycloudlib.qemu.state.spec import MachineSpec
from pycloudlib.qemu.vm.process import QemuProcess, owned_environment
from pycloudlib.qemu.vm.qmp import LoopThread

_log = logging.getLogger(__name__)

# Seconds that a program has for its own end before it is killed.
_END_LIMIT = 5.0


@dataclass(frozen=True, slots=True)
class RunningPrograms:
    """The programs beside one QEMU, which this program has started.

    Attributes:
        machine: The machine's name, for messages.
        processes: Their processes, by the names that parts give them.
        connections: The connections to them that QEMU is to have, by the same names.
    """

    machine: str
    processes: dict[str, QemuProcess]
    connections: dict[str, socket.socket]

    @classmethod
    def start(cls, spec: MachineSpec, rundir: RunDirectory) -> RunningPrograms:
        """Start the programs of a machine's parts; end those that an earlier QEMU has left.

        Raises:
            CloudError: One cannot be executed; then none runs.
        """
        end_recorded(rundir)
        started = cls(spec.name, {}, {})
        wanted = [program for part in spec.parts for program in part.programs(rundir.path)]
        if not wanted:
            return started
        environment = owned_environment(rundir)
        with contextlib.ExitStack() as undo:
            undo.callback(started.end, rundir)
            for program in wanted:
                with contextlib.closing(started._listen(program, rundir)) as listener:
                    number = str(listener.fileno())
                    started.processes[program.name] = QemuProcess.start(
                        [word.replace("{fd}", number) for word in program.argv],
                        pass_fds=[listener.fileno()],
                        log=rundir.path / f"{program.name}.log",
                        environment=environment,
                    )
                # At once: what runs unrecorded would be leaked.
                rundir.write_programs([one.identity for one in started.processes.values()])
            undo.pop_all()
        return started

    def _listen(self, program: Program, rundir: RunDirectory) -> socket.socket:
        """Return a socket that a program is to accept from, and connect to it for QEMU.

        QEMU is given the connection, as a path may be longer than a socket's address can be; the
        socket has its file for this moment alone.
        """
        staged = StagedSocket.listen(rundir.path / f"{program.name}-socket")
        try:
            connection = make_socket(socket.AF_UNIX)
            self.connections[program.name] = connection
            with short_path(staged.staged) as address:
                connection.connect(address)
        except BaseException:
            staged.listener.close()
            raise
        finally:
            staged.discard()
        return staged.listener

    def close(self) -> None:
        """Close the connections: QEMU has them."""
        for connection in self.connections.values():
            connection.close()

    def watch(self) -> None:
        """Log when one ends by itself, before QEMU does."""
        for name, process in self.processes.items():

            def report(name: str = name, process: QemuProcess = process) -> None:
                end = process.end()
                if end.exit_status not in (None, 0, -signal.SIGTERM):
                    how = describe_exit(end.exit_status)
                    _log.error("%s of %s ended with %s: %s", name, self.machine, how, end.stderr)

            LoopThread.get().watch(process.fileno(), report)

    def terminate(self) -> None:
        """Ask them to end, without waiting for it."""
        for process in self.processes.values():
            process.terminate()

    def end(self, rundir: RunDirectory) -> None:
        """End them, and wait until they are gone."""
        self.close()
        for process in self.processes.values():
            _end(process)
            process.end()
        rundir.write_programs([])

    def forget(self) -> None:
        """Watch them no more; they run on."""
        for process in self.processes.values():
            LoopThread.get().forget(process, process.fileno())


def end_recorded(rundir: RunDirectory) -> None:
    """End the programs of a machine whose QEMU has ended, whichever program has started them."""
    recorded = rundir.find_programs()
    for identity in recorded:
        process = QemuProcess.attach(identity, None, rundir.qemu_log)
        if process is not None:
            _end(process)
    if recorded:
        rundir.write_programs([])


def _end(process: QemuProcess) -> None:
    process.terminate()
    if not process.wait(_END_LIMIT):
        process.kill()
