"""Where a guest's memory is: what kinds there are, which one a machine gets, how one is kept.

A machine can be saved while it runs when its memory is a shared mapping: QEMU then leaves the
memory out of the saved state (the migration capability `x-ignore-shared`), and what is left takes
milliseconds. Machines that go on from a saved state map the kept memory privately, so that all of
them share what none has changed.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pycloudlib.descriptors import moved
from pycloudlib.errors import CloudError
from pycloudlib.qemu.accelerator import Accelerator
from pycloudlib.qemu.identity import find_proc_directory
from pycloudlib.rawtext import read_kernel_file

BACKEND = "ram0"
"""QEMU's name of a machine's memory, of one name for all kinds: by it a state is fitted to it."""

_HUGE_SHARED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_NAME = "pycloudlib-guest-memory"
# What is looked at for having nothing in it, and left out.
_CHUNK = 256 << 10
_ZEROS = bytes(_CHUNK)


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


def choose_memory(accelerator: Accelerator) -> Memory:
    """Choose the memory of a machine that boots.

    Shared memory can be saved at once. Under KVM, however, guests are faster with huge pages,
    which most hosts give to anonymous memory only: there a machine is moved into shared memory
    when it is saved for the first time.
    """
    if accelerator is Accelerator.KVM and not _shared_memory_has_huge_pages():
        return ANONYMOUS
    return SHARED


def _shared_memory_has_huge_pages() -> bool:
    """Tell by the chosen word: "always within_size advise [never] deny force" (admin-guide/mm)."""
    with contextlib.suppress(OSError):
        chosen = read_kernel_file(_HUGE_SHARED).partition("[")[2].partition("]")[0]
        return chosen in ("always", "within_size", "advise", "force")
    return False


def create_shared_memory(size: int) -> int:
    """Make memory to be shared: a file without a name that goes with whoever has it open.

    QEMU is to take it for a file (`memory-backend-file`), not to make one itself
    (`memory-backend-memfd`): from 8.1 on it leaves only files out of a state.

    Returns:
        Its descriptor.
    """
    descriptor = moved(os.memfd_create(_NAME, os.MFD_CLOEXEC))
    os.ftruncate(descriptor, size)
    return descriptor


def find_shared_memory(pid: int) -> Path | None:
    """Find the file of a QEMU's shared memory; None when its memory is of another kind.

    Its path is good as long as the process lives.

    Args:
        pid: QEMU's pid in our own PID namespace.
    """
    for link in (find_proc_directory(pid) / "fd").iterdir():
        with contextlib.suppress(OSError):
            if str(link.readlink()).startswith(f"/memfd:{_NAME}"):
                return link
    return None


def keep(memory: int, target: Path, *, release: bool = False) -> None:
    """Copy a guest's memory into a file, leaving out what has nothing in it.

    Args:
        memory: Descriptor of the shared memory; nobody may write to it any more.
        target: The new file; only its owner can read it, since it holds the guest's secrets.
        release: Whether what has nothing in it is given back to the host on the way: a memory that
            was copied page by page takes its full size.

    Raises:
        CloudError: There is no room for it; nothing is left.
    """
    size = os.fstat(memory).st_size
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = moved(os.open(target, flags, 0o600))
    try:
        os.ftruncate(descriptor, size)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if release else 0)
        with mmap.mmap(memory, size, mmap.MAP_SHARED, protection) as content:
            for start, end in _data(memory):
                _copy(content, descriptor, start, end, release=release)
    except OSError as error:
        target.unlink()
        if error.errno != errno.ENOSPC:
            raise
        raise CloudError(f"No room for the guest's memory in {target.parent}: {error}") from error
    except BaseException:
        target.unlink()
        raise
    finally:
        os.close(descriptor)


def _data(memory: int) -> Iterator[tuple[int, int]]:
    """List the pieces of a sparse file that have something in them."""
    end = 0
    while True:
        try:
            start = os.lseek(memory, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # there is none any more
                return
            raise
        end = os.lseek(memory, start, os.SEEK_HOLE)
        yield start, end


def _copy(content: mmap.mmap, target: int, start: int, end: int, *, release: bool) -> None:
    while start < end:
        data = content[start : min(start + _CHUNK, end)]
        if data != _ZEROS[: len(data)]:
            written = os.pwrite(target, data, start)
            # A disk that is nearly full takes a part of it; the rest is told as the error then.
            start += written
            continue
        if release:
            content.madvise(mmap.MADV_REMOVE, start, len(data))
        start += len(data)
