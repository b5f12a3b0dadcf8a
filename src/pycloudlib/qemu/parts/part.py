"""The base of all parts, and what the answers of a part are made of.

A part is a frozen value. It starts nothing, and writes nothing: it answers questions, and those who
launch, save, copy, roll back or describe a machine ask each of its parts. They know none by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pycloudlib.guest.data.seed import Seed
from pycloudlib.qemu.host.accelerator import Features


@dataclass(frozen=True, slots=True)
class Memory:
    """A guest's memory, as QEMU is to make it.

    Attributes:
        shared: Whether it is a shared mapping of a file of its own, which has no name and goes
            with the process.
        file: Kept memory that is mapped copy-on-write; None for memory that begins empty.
    """

    shared: bool = False
    file: Path | None = None


ANONYMOUS = Memory()
SHARED = Memory(shared=True)


@dataclass(frozen=True, slots=True)
class Origin:
    """What a QEMU begins with.

    Attributes:
        memory: The guest's memory.
        state: Descriptor of a stream, which QEMU inherits, that the machine's state comes from;
            None when the power is switched on.
        is_twin: Whether another QEMU runs this machine, and this one never does: it has no port.
        stops_at: The sector of the seed, of 512 bytes, before whose first read the machine stops;
            None for a machine that reads its seed.
    """

    memory: Memory = SHARED
    state: int | None = None
    is_twin: bool = False
    stops_at: int | None = None

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What QEMU inherits."""
        return () if self.state is None else (self.state,)


POWER_ON = Origin()


@dataclass(frozen=True, slots=True)
class UnixListener:
    """A unix socket that QEMU listens on.

    Attributes:
        name: What the part calls it; see `Channels.listeners`.
        file: Its file's name in the machine's directory.
    """

    name: str
    file: str


@dataclass(frozen=True, slots=True)
class TcpListener:
    """A TCP socket on the loopback that QEMU listens on.

    Attributes:
        name: What the part calls it; see `Channels.listeners`.
        port: The port; 0 for any that is free.
    """

    name: str
    port: int


@dataclass(frozen=True, slots=True)
class Program:
    """A program that serves a machine: started before QEMU, watched, and ended after it.

    Attributes:
        name: Its name in messages; its output goes to `<name>.log` in the machine's directory.
        argv: Its command line, in which `{fd}` is the descriptor of a listening unix socket: from
            it the program accepts the connection that QEMU has; see `Channels.programs`.
    """

    name: str
    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Channels:
    """The file descriptors that QEMU inherits.

    Attributes:
        control: A connected stream socket for our own QMP session.
        listeners: The sockets that it listens on, by the names that parts give them.
        memory: The file of memory to be shared; None for memory of another kind.
        programs: Connections to the programs that parts have run, by their names.
    """

    control: int
    listeners: Mapping[str, int]
    memory: int | None = None
    programs: Mapping[str, int] = field(default_factory=dict)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What QEMU inherits."""
        memory = () if self.memory is None else (self.memory,)
        return (self.control, *self.listeners.values(), *memory, *self.programs.values())


@dataclass(frozen=True, slots=True)
class Start:
    """What a part's arguments depend on beside the part.

    Attributes:
        disk: The file of the machine's root disk; all files of the machine are beside it.
        channels: The descriptors that QEMU inherits.
        features: What the QEMU binary can do.
        origin: What it begins with.
    """

    disk: Path
    channels: Channels
    features: Features
    origin: Origin = POWER_ON

    @property
    def directory(self) -> Path:
        """The machine's directory."""
        return self.disk.parent


SUFFIX = r"\+[0-9A-Za-z._-]+"
"""What a disk's `OwnDisk.suffix` looks like, unless it is the root disk's."""


@dataclass(frozen=True, slots=True)
class OwnDisk:
    """A disk whose file is the machine's own, and is saved and rolled back with the machine.

    Attributes:
        device: QEMU's name of the drive or its device, by which it is found in a running QEMU.
        suffix: What tells its file from that of the machine's root disk, or of a saved one; empty
            for the root disk itself.
        size: Its length in bytes; 0 where the launch decides, as with the root disk.
        image: The image that it begins with; None for one that begins empty.
        image_format: The image's format.
    """

    device: str
    suffix: str = ""
    size: int = 0
    image: Path | None = None
    image_format: str = ""

    def beside(self, disk: Path) -> Path:
        """Name its file in the directory of a machine.

        Args:
            disk: The file of the machine's root disk.
        """
        return disk.with_name(f"{disk.stem}{self.suffix}{disk.suffix}")

    def kept_beside(self, image: Path) -> Path:
        """Name its file in a saved machine.

        Args:
            image: The image of the saved machine's root disk.
        """
        return image.with_name(f"{image.name}{self.suffix}")


class Part:
    """One part of a machine; what is not overridden is what most parts answer."""

    __slots__ = ()

    def arguments(self, start: Start) -> list[str]:
        """Return what it adds to QEMU's command line, however QEMU begins."""
        return []

    @property
    def listeners(self) -> tuple[UnixListener | TcpListener, ...]:
        """What QEMU listens on for it."""
        return ()

    def programs(self, directory: Path) -> tuple[Program, ...]:
        """Return what has to run before QEMU, and ends after it.

        Args:
            directory: The machine's directory.
        """
        return ()

    @property
    def forwards(self) -> tuple[str, ...]:
        """The rules by which user-mode networking forwards ports of the host for it."""
        return ()

    @property
    def disks(self) -> tuple[OwnDisk, ...]:
        """The disks that it brings: saved, copied and rolled back with the machine."""
        return ()

    @property
    def kept_files(self) -> tuple[str, ...]:
        """The names of its files in the machine's directory that a saved machine has, too."""
        return ()

    def complete_seed(self, seed: Seed) -> Seed:
        """Return the seed of a machine that is launched with it, with what cloud-init is to do."""
        return seed

    @property
    def needs(self) -> tuple[Path, ...]:
        """The files elsewhere that the machine cannot do without: nobody deletes them."""
        return ()

    @property
    def save_obstacle(self) -> str | None:
        """Why a machine with it cannot be saved, as the end of a sentence; None when it can."""
        return None

    @property
    def start_obstacle(self) -> str | None:
        """Why its first boot has to begin at the power-on; None when it can begin later."""
        return None

    @property
    def key(self) -> Mapping[str, Any]:
        """What decides, of a part that was asked for, what a machine is like that is kept ready."""
        return {}

    def tell(self, disk: Path) -> Mapping[str, Any]:
        """Return what `info` tells of it: by the keys of its JSON.

        Args:
            disk: The file of the machine's root disk; all files of the machine are beside it.
        """
        return {}


def escape(path: Path) -> str:
    """Write a path as the value of an option: QEMU takes a doubled comma for one comma."""
    return str(path).replace(",", ",,")
