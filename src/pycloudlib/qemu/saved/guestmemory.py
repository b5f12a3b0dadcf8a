"""A guest's memory while its QEMU has it: its address, its own pages, and how to read it.

QEMU has the memory as one mapping; `gpa2hva` returns its address. /proc/PID/maps says what is
mapped there, and /proc/PID/pagemap which pages of a private mapping are its own: those that are
present or swapped, and not the file's (Documentation/admin-guide/mm/pagemap.rst). Shared memory is
read from its file, other memory from /proc/PID/mem. That needs the rights of a debugger
(ptrace(2)), which a host may reserve for a process's ancestors (Yama). Without them, QEMU writes
ranges by itself (`pmemsave`), a millisecond for each; all of them where even the maps cannot be
read (of a QEMU that has capabilities). It writes what the guest's processors see: not the memory
behind a display.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pycloudlib._base.documents import read_kernel_file
from pycloudlib._base.files import moved
from pycloudlib.errors import CloudError
from pycloudlib.qemu.host.processes import find_proc_directory
from pycloudlib.qemu.parts.standard import BACKEND
from pycloudlib.qemu.saved.memoryfile import (
    Content,
    Reader,
    Run,
    address_of,
    list_data,
    map_to_read,
)
from pycloudlib.qemu.vm.qmp import QmpSession
from pycloudlib.qemu.vm.running import RunningQemu

_log = logging.getLogger(__name__)

_PAGE = mmap.PAGESIZE
# The last byte of a page's entry: present, swapped; of a file, or shared.
_THERE = 0xC0
_OF_FILE = 0x20
_OWN = [value for value in range(256) if value & _THERE and not value & _OF_FILE]
_OWN_CLASS = b"[" + b"".join(re.escape(bytes([value])) for value in _OWN) + b"]"
# Pages between two runs that are read with them, since a call costs more.
_GAP = 8
_GAP_OF_CALLS = 1024
_BLOCK = 1 << 20
_BLOCK_OF_CALLS = 16 << 20
# The address of a PC's memory that does not fit below the devices.
_HIGH = 1 << 32
# Where a processor may see a display or the firmware, not memory; in pieces of this size.
_HIDDEN = range(0xA0000, 0x100000, 0x4000)


class GuestMemory(Content, Protocol):
    """The memory of a guest that runs, or is paused."""

    @property
    def way(self) -> str:
        """How it is read, for people."""

    @property
    def shared(self) -> bool:
        """Whether it is a file of its own that QEMU has mapped shared."""

    @property
    def base(self) -> int | None:
        """Descriptor of the file that has the pages that are not its own; None without one."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """What a QEMU has mapped as its guest's memory.

    Attributes:
        address: Its address in the process.
        size: Its length in bytes.
        shared: Whether others can write to it, too.
        inode: The inode of the file; None for memory without a file, or if that is unknown.
    """

    address: int
    size: int
    shared: bool = False
    inode: int | None = None


@contextlib.contextmanager
def opened(qemu: RunningQemu, size: int) -> Iterator[GuestMemory]:
    """Open the memory of a guest, of `size` bytes, in the block.

    Raises:
        MachineEndedError: QEMU is gone.
        CloudError: The memory cannot be found.
    """
    with contextlib.ExitStack() as stack:
        # QEMU serves one program at a time: others wait until this session is closed.
        asking = stack.enter_context(contextlib.ExitStack())
        session = asking.enter_context(qemu.session())
        address = _find_address(session, 0)
        if address is None:
            raise CloudError(f"QEMU of {qemu.name} does not say where its guest's memory is")
        mapping, base, pages, content = Mapping(address, size), None, None, None
        try:
            process = find_proc_directory(qemu.process.pid)
            mapping = find_mapping(process, address, size)
            if mapping.inode is not None:
                base = _open(_find_file(process, mapping), stack)
            if not mapping.shared:
                pages = _open(process / "pagemap", stack)
                content = open_process_memory(process, stack)
        except OSError as error:
            _log.info("QEMU writes its guest's memory itself: %s", error)
        if mapping.shared and base is not None:
            asking.close()
            yield open_shared(base, size)
        elif pages is not None and content is not None:
            asking.close()
            yield _Own(mapping, pages, content, base)
        else:
            yield _OwnByQemu(session, mapping, pages, base, tuple(_list_seen(session, mapping)))


def open_process_memory(process: Path, stack: contextlib.ExitStack) -> int:
    """Open the memory of a process, which a host may refuse.

    Args:
        process: Its directory in /proc.
        stack: Closes it.
    """
    return _open(process / "mem", stack)


def _open(file: Path, stack: contextlib.ExitStack) -> int:
    descriptor = moved(os.open(file, os.O_RDONLY | os.O_CLOEXEC))
    stack.callback(os.close, descriptor)
    return descriptor


def find_mapping(process: Path, address: int, size: int) -> Mapping:
    """Find what a QEMU has mapped at an address, by the kernel's list of its mappings."""
    for line in read_kernel_file(process / "maps").splitlines():
        # Addresses, rights, offset, device, inode, path.
        places, rights, _, _, inode, *_ = line.split(maxsplit=5)
        start, end = (int(place, 16) for place in places.split("-"))
        if start <= address < end:
            return Mapping(address, size, rights.endswith("s"), int(inode) or None)
    raise CloudError(f"{process} does not have its guest's memory where QEMU says: {address:#x}")


def _find_address(session: QmpSession, physical: int) -> int | None:
    """Return where QEMU has a physical address of the guest; None if there is no memory."""
    said = session.execute("human-monitor-command", {"command-line": f"gpa2hva {physical:#x}"})
    found = re.search(rf"\({BACKEND}\) is (0x[0-9a-f]+)", said)
    return None if found is None else int(found[1], 16)


def _find_file(process: Path, mapping: Mapping) -> Path:
    """Find a file that a process has mapped among its open files: it may have no name."""
    for link in (process / "fd").iterdir():
        with contextlib.suppress(OSError):
            facts = link.stat()
            # Without the device, in which maps and stat(2) differ on some file systems.
            if (facts.st_ino, facts.st_size) == (mapping.inode, mapping.size):
                return link
    raise CloudError(f"QEMU, {process.name}, has no open file that is its guest's memory")


class _View:
    """A reader of what this process has mapped."""

    block = 1 << 40

    def __init__(self, address: int, content: memoryview) -> None:
        self._address = address
        self._content = content

    def read(self, run: Run) -> tuple[int, memoryview]:
        start, end = run
        return self._address + start, self._content[start:end]


@dataclass(frozen=True, slots=True)
class _Shared:
    """Memory that is a shared mapping of a file, which is mapped here, too."""

    memory: int
    view: _View
    way: str = "from its shared memory"
    parallel: bool = True
    shared: bool = True
    base: None = None

    def list_runs(self) -> Sequence[Run]:
        return list(list_data(self.memory))

    @contextlib.contextmanager
    def open_reader(self) -> Iterator[Reader]:
        yield self.view


def open_shared(memory: int, size: int) -> _Shared:
    """Map shared memory, to be read here.

    Args:
        memory: Its descriptor.
        size: Its length in bytes.
    """
    # It is unmapped when its last view is gone.
    content = map_to_read(memory, size)
    return _Shared(memory, _View(address_of(content), memoryview(content)))


@dataclass(frozen=True, slots=True)
class _Own:
    """Private memory, read from QEMU's process: other pages are those of its base, or zero."""

    mapping: Mapping
    pages: int
    content: int
    base: int | None
    way: str = "from QEMU's process"
    parallel: bool = True
    shared: bool = False

    def list_runs(self) -> Sequence[Run]:
        return list_own(self.pages, self.mapping, _GAP)

    @contextlib.contextmanager
    def open_reader(self) -> Iterator[Reader]:
        buffer = bytearray(_BLOCK)
        yield _ProcessReader(
            self.content, self.mapping.address, address_of(buffer), memoryview(buffer)
        )


@dataclass(frozen=True, slots=True)
class _ProcessReader:
    content: int
    origin: int
    address: int
    buffer: memoryview
    block: int = _BLOCK

    def read(self, run: Run) -> tuple[int, memoryview]:
        start, end = run
        view = self.buffer[: end - start]
        done = 0
        while done < end - start:
            got = os.preadv(self.content, [view[done:]], self.origin + start + done)
            if not got:
                raise CloudError("QEMU ended while its guest's memory was read")
            done += got
        return self.address, view


@dataclass(frozen=True, slots=True)
class _Seen:
    """A piece of memory as a guest's processors see it.

    Attributes:
        start: Its first byte in the memory.
        end: The one after its last.
        physical: The address that the first has in the guest.
    """

    start: int
    end: int
    physical: int


def _list_seen(session: QmpSession, mapping: Mapping) -> Iterator[_Seen]:
    """List the pieces of a memory that its guest's processors see."""
    low, first_mib = _HIDDEN.start, _HIDDEN.stop
    yield _Seen(0, low, 0)
    for place in _HIDDEN:
        if _find_address(session, place) == mapping.address + place:
            yield _Seen(place, place + _HIDDEN.step, place)
    high = _find_address(session, _HIGH)
    below = mapping.size if high is None else high - mapping.address
    yield _Seen(first_mib, below, first_mib)
    if high is not None:
        yield _Seen(below, mapping.size, _HIGH)


@dataclass(frozen=True, slots=True)
class _OwnByQemu:
    """Memory that QEMU writes for us, range by range, as its guest's processors see it.

    Attributes:
        pages: The page table; None if it cannot be read: then all of the memory is written.
    """

    session: QmpSession
    mapping: Mapping
    pages: int | None
    base: int | None
    seen: tuple[_Seen, ...]
    way: str = "by QEMU, range by range"
    parallel: bool = False
    shared: bool = False

    def list_runs(self) -> Sequence[Run]:
        own = [(0, self.mapping.size)]
        if self.pages is not None:
            own = list_own(self.pages, self.mapping, _GAP_OF_CALLS)
        return [run for piece in self.seen for run in _cut(own, (piece.start, piece.end))]

    @contextlib.contextmanager
    def open_reader(self) -> Iterator[Reader]:
        scratch = moved(os.memfd_create("pycloudlib-guest-memory-range", os.MFD_CLOEXEC))
        try:
            os.ftruncate(scratch, _BLOCK_OF_CALLS)
            lent = self.session.lend(scratch)
            file = f"/proc/self/fd/{lent.number}"
            try:
                content = mmap.mmap(scratch, _BLOCK_OF_CALLS)
                yield _QemuReader(
                    self.session, file, self.seen, address_of(content), memoryview(content)
                )
            finally:
                self.session.take_back(lent)
        finally:
            os.close(scratch)


@dataclass(frozen=True, slots=True)
class _QemuReader:
    session: QmpSession
    file: str
    seen: tuple[_Seen, ...]
    address: int
    buffer: memoryview
    block: int = _BLOCK_OF_CALLS

    def read(self, run: Run) -> tuple[int, memoryview]:
        start, end = run
        piece = next(piece for piece in self.seen if piece.start <= start < piece.end)
        physical = start - piece.start + piece.physical
        # QEMU truncates the file to the length of what it writes.
        arguments = {"val": physical, "size": end - start, "filename": self.file}
        self.session.execute("pmemsave", arguments)
        return self.address, self.buffer[: end - start]


def _cut(runs: Iterable[Run], piece: Run) -> Iterator[Run]:
    """List the parts of runs that are in a piece."""
    for start, end in runs:
        part = max(start, piece[0]), min(end, piece[1])
        if part[0] < part[1]:
            yield part


def list_own(pages: int, mapping: Mapping, gap: int) -> list[Run]:
    """List the pieces of a private mapping whose pages are its own."""
    count = -(-mapping.size // _PAGE)
    entries = os.pread(pages, 8 * count, mapping.address // _PAGE * 8)
    if len(entries) != 8 * count:
        # The process has ended. Other pages would be taken for its base's.
        raise CloudError(
            f"The kernel has entries for {len(entries) // 8} pages of a guest's {count} only"
        )
    # The flags are in the last byte of each entry; a search over them is one loop of C.
    flags = entries[7::8]
    other = rb"[\x00-\xff]{1,%d}?" % gap
    pattern = re.compile(_OWN_CLASS + b"+(?:" + other + _OWN_CLASS + b"+)*", re.DOTALL)
    return [
        (found.start() * _PAGE, min(found.end() * _PAGE, mapping.size))
        for found in pattern.finditer(flags)
    ]
