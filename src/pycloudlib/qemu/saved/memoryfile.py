"""The file to which a guest's memory is saved."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pycloudlib._base.files import moved
from pycloudlib.errors import CloudError

if TYPE_CHECKING:
    from typing_extensions import Self

# Bytes that are compared at once, and left out where they are zero.
_CHUNK = 256 << 10
# Bytes that are written where a chunk has changed.
_PART = 16 << 10
# More threads would only wait for the host's memory.
_MOST_THREADS = 8
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# Errors of a file system that copies no ranges by itself.
_NO_RANGES = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
# MAP_NORESERVE: as nothing is written there, no memory is reserved for it.
_NO_RESERVE = 0x4000
_ZEROS = bytearray(_CHUNK)

Run = tuple[int, int]
"""A piece of a guest's memory: its first byte, and the one after its last."""


class Reader(Protocol):
    """Reads pieces of a guest's memory; not to be used from several threads."""

    @property
    def block(self) -> int:
        """The largest number of bytes that it reads at once."""

    def read(self, run: Run) -> tuple[int, memoryview]:
        """Read a piece; return its address in this process, and itself, valid until the next."""


class Content(Protocol):
    """The content of a guest's memory."""

    @property
    def parallel(self) -> bool:
        """Whether several readers may read at once."""

    def list_runs(self) -> Sequence[Run]:
        """List the pieces that may differ from what the file begins with."""

    def open_reader(self) -> contextlib.AbstractContextManager[Reader]:
        """Open a reader in the block."""


class MemoryFile:
    """The file to which a guest's memory is saved, with holes where that is zero.

    It can be updated again and again: its content is compared with the memory, which takes a tenth
    of the time that writing takes. So nearly all of it is written while the guest runs, and the
    rest while it is paused.

    Args:
        path: The new file; only its owner can read it, since it holds the guest's secrets.
        size: The length of the memory in bytes.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._file = moved(os.open(path, _NEW, 0o600))
        try:
            os.ftruncate(self._file, size)
            self._content = map_to_read(self._file, size)
        except BaseException:
            os.close(self._file)
            raise
        self._address = address_of(self._content)
        # Comparing must not allocate pages for chunks that are holes.
        self._filled = bytearray(-(-size // _CHUNK))
        self._runs: list[Run] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._content.close()
        os.close(self._file)

    def begin_with(self, base: int) -> None:
        """Copy what another such file holds: by reference, where the file system can.

        Args:
            base: Its descriptor.

        Raises:
            CloudError: There is no space for it.
        """
        with self._naming_full_disk():
            for start, end in list_data(base):
                _copy_range(base, self._file, start, end)
                first, last = start // _CHUNK, -(-end // _CHUNK)
                self._filled[first:last] = b"\1" * (last - first)

    def update(self, memory: Content) -> int:
        """Write what has changed in the memory; return how many bytes that was.

        Raises:
            CloudError: There is no space for it.
        """
        # What was listed before may have been freed since: then it is as it was at first.
        self._runs = _unite([*self._runs, *memory.list_runs()])
        shares = _share_out(self._runs, _count_threads() if memory.parallel else 1)
        with self._naming_full_disk():
            if len(shares) < 2:
                return sum(self.update_runs(memory, share) for share in shares)
            with ThreadPoolExecutor(len(shares)) as threads:
                return sum(threads.map(lambda share: self.update_runs(memory, share), shares))

    def update_runs(self, memory: Content, runs: Iterable[Run]) -> int:
        """Write what has changed in some runs; return the bytes written."""
        written = 0
        with memory.open_reader() as reader:
            for block in cut_runs(runs, reader.block):
                address, content = reader.read(block)
                origin = block[0]
                for start, end in cut_runs([block], _CHUNK):
                    if self._has(address + start - origin, start, end):
                        continue
                    for first, last in self._list_changed(address - origin, start, end):
                        self._write(content[first - origin : last - origin], first)
                        written += last - first
                    self._filled[start // _CHUNK] = 1
        return written

    def _has(self, address: int, start: int, end: int) -> bool:
        filled = self._filled[start // _CHUNK]
        here = self._address + start if filled else _ADDRESS_OF_ZEROS
        return _compare()(address, here, end - start) == 0

    def _list_changed(self, origin: int, start: int, end: int) -> Iterator[Run]:
        """List what has to be written of a chunk that has changed."""
        if not self._filled[start // _CHUNK]:
            yield start, end
            return
        for first, last in cut_runs([(start, end)], _PART):
            if not self._has(origin + first, first, last):
                yield first, last

    def _write(self, data: memoryview, position: int) -> None:
        while data:
            # A disk that is nearly full takes a part of it; then the rest raises the error.
            done = os.pwrite(self._file, data, position)
            data, position = data[done:], position + done

    @contextlib.contextmanager
    def _naming_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise CloudError(
                f"No space for the guest's memory in {self._path.parent}: {error}"
            ) from error


def list_data(file: int) -> Iterator[Run]:
    """List the pieces of a sparse file that are not holes."""
    end = 0
    while True:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # there is none any more
                return
            raise
        end = os.lseek(file, start, os.SEEK_HOLE)
        yield start, end


def map_to_read(file: int, size: int) -> mmap.mmap:
    """Map a file so that its changes are seen, and none can be made.

    The mapping is writable, as `address_of` needs; what is written stays in this process.
    """
    flags = mmap.MAP_PRIVATE | _NO_RESERVE
    return mmap.mmap(file, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def address_of(content: mmap.mmap | bytearray) -> int:
    """Return the address of a buffer's content in this process, for the C library's functions."""
    return ctypes.addressof(ctypes.c_char.from_buffer(content))


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    by_range = True
    while start < end:
        done = 0
        if by_range:
            try:
                done = os.copy_file_range(source, target, end - start, start, start)
            except OSError as error:
                if error.errno not in _NO_RANGES:
                    raise
            # Some kernels return 0 for a file that they cannot copy.
            by_range = done > 0
        if not done:
            os.lseek(target, start, os.SEEK_SET)
            done = os.sendfile(target, source, start, end - start)
        if not done:
            return  # the source is shorter by now
        start += done


def cut_runs(runs: Iterable[Run], length: int) -> Iterator[Run]:
    """Cut runs at the multiples of a length."""
    for start, end in runs:
        first = start
        while first < end:
            last = min(end, (first // length + 1) * length)
            yield first, last
            first = last


def _count_threads() -> int:
    return min(_MOST_THREADS, len(os.sched_getaffinity(0)))


def _unite(runs: Iterable[Run]) -> list[Run]:
    """Sort runs, and join those that overlap."""
    united: list[Run] = []
    for start, end in sorted(runs):
        if united and start < united[-1][1]:
            united[-1] = (united[-1][0], max(end, united[-1][1]))
        else:
            united.append((start, end))
    return united


def _share_out(runs: Sequence[Run], count: int) -> list[list[Run]]:
    """Share runs out so that each share has about as much to read."""
    share = sum(end - start for start, end in runs) / count
    shares: list[list[Run]] = [[]]
    taken = 0
    for start, end in cut_runs(runs, _CHUNK << 4):
        if taken >= share * len(shares):
            shares.append([])
        shares[-1].append((start, end))
        taken += end - start
    return shares


@functools.cache
def _compare() -> Callable[[Any, Any, int], int]:
    """Return the C library's memcmp, which lets other threads run."""
    function = ctypes.CDLL(None).memcmp
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return function


_ADDRESS_OF_ZEROS = address_of(_ZEROS)
