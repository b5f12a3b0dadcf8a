"""Writes memory and state of a running machine to files, in one of three ways that its QEMU allows.

- **In place**: the state of the devices is read by itself, and composed with that of a machine like
  it. The guest is paused for milliseconds, whatever kind its memory is.
- **By a migration without memory**, of a machine whose memory is shared. It takes some milliseconds
  more, and works with any QEMU.
- **By a twin**, for all others: a machine like it takes over the whole state, memory included, and
  is read instead. The guest is paused for about a second for a gigabyte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from pycloudlib._base.deadline import Deadline
from pycloudlib._base.files import make_socket_pair, private_opener, replace_atomically
from pycloudlib.errors import CloudError
from pycloudlib.qemu.disk import diskimage
from pycloudlib.qemu.host.ownership import Orphans, create_owned_directory
from pycloudlib.qemu.parts.part import SHARED, Origin
from pycloudlib.qemu.saved import devicestate, guestmemory
from pycloudlib.qemu.saved.devicestate import list_blocks, write_state
from pycloudlib.qemu.saved.guestmemory import GuestMemory
from pycloudlib.qemu.saved.memoryfile import MemoryFile
from pycloudlib.qemu.state.rundir import RunDirectory
from pycloudlib.qemu.vm.machine import Machine
from pycloudlib.qemu.vm.running import RunningQemu

_log = logging.getLogger(__name__)

_MEMORY = "memory"
_STATE = "state"
_TAKE_LIMIT = 300.0
_HELD = "-S"


class Capture(Protocol):
    """Reads a machine into the directory of a saved one.

    Attributes:
        way: How its memory is read, for people.
    """

    way: str

    def prepare(self) -> None:
        """Do what can be done while the guest runs."""

    def read_memory(self) -> None:
        """Read the memory of the paused guest."""

    def read_state(self) -> None:
        """Read the state of the paused guest, whose disk is exchanged by now.

        After the memory: what a device receives meanwhile (from the helper's socket) may then be in
        the state and not in the memory, and is lost to the guest. The other way round, QEMU refuses
        to load it.
        """

    def finish(self) -> None:
        """Do the rest when the guest runs again."""


@contextlib.contextmanager
def choose(machine: Machine, directory: Path) -> Iterator[Capture]:
    """Choose how a machine is read, and open in the block what that needs.

    Args:
        machine: The machine; the caller keeps others from changing it.
        directory: Where its memory and state are written.

    Raises:
        MachineEndedError: It is off.
        CloudError: It cannot be read.
    """
    qemu = machine.qemu()
    size = machine.spec.memory_kib << 10
    obstacle = _find_obstacle(machine, qemu)
    with guestmemory.opened(qemu, size) as memory:
        if obstacle is not None:
            _log.info("%s is not saved in place: %s", machine.spec.name, obstacle)
        if obstacle is not None and not memory.shared:
            with _by_twin(machine, directory) as reading:
                yield reading
            return
        with MemoryFile(directory / _MEMORY, size) as kept:
            if obstacle is None:
                yield InPlace(machine, qemu, memory, kept, directory)
            else:
                yield _ByMigration(qemu, memory, kept, directory)


def _find_obstacle(machine: Machine, qemu: RunningQemu) -> str | None:
    """Return why a machine cannot be saved in place; None when it can."""
    with qemu.session() as session:
        obstacle = devicestate.find_obstacle(session)
    if obstacle is None and not machine.rundir.base_state.exists():
        own = [argument for argument in machine.spec.launch_args if argument != _HELD]
        if own:
            return f"it has launch_args of its own ({' '.join(own)})"
    return obstacle


class Reading:
    """Reads the memory where it is, and writes it to the file `kept`."""

    def __init__(self, memory: GuestMemory, kept: MemoryFile) -> None:
        self._memory = memory
        self._kept = kept
        self.way = memory.way

    def prepare(self) -> None:
        """Copy what can be copied while the guest runs."""
        if self._memory.base is not None:
            self._kept.begin_with(self._memory.base)
        self._kept.update(self._memory)

    def read_memory(self) -> None:
        """Copy what has changed since, while the guest is paused."""
        self._kept.update(self._memory)


class InPlace(Reading):
    """Reads the devices by themselves."""

    def __init__(
        self,
        machine: Machine,
        qemu: RunningQemu,
        memory: GuestMemory,
        kept: MemoryFile,
        directory: Path,
    ) -> None:
        super().__init__(memory, kept)
        self._machine = machine
        self._qemu = qemu
        self._state = directory / _STATE
        self._devices = b""

    def prepare(self) -> None:
        """Copy what can be copied while the guest runs."""
        with ThreadPoolExecutor(1) as thread:
            base = thread.submit(self._provide_base_state)
            super().prepare()
            base.result()

    def _provide_base_state(self) -> None:
        base = self._machine.rundir.base_state
        if base.exists():
            return
        with replace_atomically(base, synced=False) as temporary:
            write_base_state(self._machine, temporary)

    def read_state(self) -> None:
        """Save the state of the devices, while the guest is paused."""
        with self._qemu.session() as session:
            self._devices = devicestate.save_devices(session)

    def finish(self) -> None:
        """Write the state, when the guest runs again."""
        base = self._machine.rundir.base_state.read_bytes()
        with open(self._state, "wb", opener=private_opener) as file:
            file.write(devicestate.compose(base, self._devices))


class _ByMigration(Reading):
    """Has QEMU migrate everything but the memory."""

    def __init__(
        self, qemu: RunningQemu, memory: GuestMemory, kept: MemoryFile, directory: Path
    ) -> None:
        super().__init__(memory, kept)
        self._qemu = qemu
        self._state = directory / _STATE
        self.way += ", its state by a migration"

    def read_state(self) -> None:
        """Save the state of the devices, while the guest is paused."""
        devicestate.write_state(self._qemu, self._state)

    def finish(self) -> None:
        """There is no rest."""


class _ByTwin:
    """Has QEMU migrate everything to a twin, and reads that."""

    way = "from a twin to which everything was migrated"

    def __init__(
        self, qemu: RunningQemu, twin_qemu: RunningQemu, stream: int, directory: Path, size: int
    ) -> None:
        self._qemu = qemu
        self._twin = twin_qemu
        self._stream = stream
        self._directory = directory
        self._size = size

    def prepare(self) -> None:
        """Nothing can be done yet: a guest that runs may write faster than QEMU migrates."""

    def read_memory(self) -> None:
        """It comes with the state."""

    def read_state(self) -> None:
        """Save the state of the devices, while the guest is paused."""
        devicestate.send_state(self._qemu, self._stream, with_memory=True)
        devicestate.wait_for_state(self._twin, Deadline.after(_TAKE_LIMIT))

    def finish(self) -> None:
        """Write the state, when the guest runs again."""
        write_whole(self._twin, self._directory, self._size)


@contextlib.contextmanager
def _by_twin(machine: Machine, directory: Path) -> Iterator[_ByTwin]:
    ours, theirs = make_socket_pair()
    with ours, theirs, running_twin(machine, theirs.fileno()) as waiting:
        devicestate.accept_state(waiting, SHARED, theirs.fileno())
        size = machine.spec.memory_kib << 10
        yield _ByTwin(machine.qemu(), waiting, ours.fileno(), directory, size)


def write_whole(qemu: RunningQemu, directory: Path, size: int) -> None:
    """Write state and memory of a paused machine whose memory is shared.

    It must not be interrupted, since its threads read that memory.

    Args:
        qemu: Its QEMU, which is not resumed.
        directory: The directory of the saved machine.
        size: The length of the memory in bytes.

    Raises:
        MachineEndedError: QEMU is gone.
        CloudError: They could not be written.
    """
    devicestate.write_state(qemu, directory / _STATE)
    with guestmemory.opened(qemu, size) as memory, MemoryFile(directory / _MEMORY, size) as kept:
        kept.update(memory)


_ANY_PORT = 0


@contextlib.contextmanager
def running_twin(machine: Machine, state: int | None = None) -> Iterator[RunningQemu]:
    """Start the twin of a machine for the block, with shared memory and an empty disk.

    Args:
        machine: The machine.
        state: Descriptor from which it loads a state, if any.

    Raises:
        CloudError: It could not be started.
    """
    name = f"{machine.spec.name}-twin-{secrets.token_hex(4)}"
    rundir = RunDirectory(machine.rundir.path.with_name(name))
    with contextlib.ExitStack() as stack:
        # No other program takes it for a machine, and `prune` removes it if this one is killed.
        create_owned_directory(rundir.path, Orphans.REAP)
        stack.callback(rundir.remove)
        for disk in machine.spec.own_disks:
            diskimage.create_empty(disk.beside(rundir.disk))
        spec = dataclasses.replace(machine.spec, disk=rundir.disk, telnet_port=_ANY_PORT)
        origin = Origin(SHARED, state=state, is_twin=True)
        twin = RunningQemu.start(machine.binary, spec, rundir, origin)
        stack.callback(twin.kill)
        yield twin


def write_base_state(machine: Machine, file: Path) -> None:
    """Write a whole state of a machine like another that has booted, before its own boot.

    Raises:
        CloudError: It could not be written, or is not that of such a machine.
    """
    with running_twin(machine) as twin:
        with machine.session() as session, twin.session() as other:
            version, today = (one.execute("query-version")["qemu"] for one in (session, other))
            ours, theirs = list_blocks(session), list_blocks(other)
        if [version["major"], version["minor"]] != [today["major"], today["minor"]]:
            raise CloudError(
                f"{machine.spec.name} runs in QEMU {_text(version)}, which is {_text(today)} here "
                "by now, and could not load its state: power it off and on first"
            )
        if ours != theirs:
            raise CloudError(f"{machine.spec.name} has other memory than a machine like it")
        write_state(twin, file)


def _text(version: dict[str, int]) -> str:
    return ".".join(str(version[part]) for part in ("major", "minor", "micro"))
