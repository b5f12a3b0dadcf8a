"""Where a guest's memory is: what kinds there are, and which one a machine gets.

A machine that boots has memory of its own, shared or anonymous. Machines that go on from a saved
state map the kept memory privately, so that all of them share what none has changed. Each kind can
be saved while the machine runs; how it is read is in `guestmemory.py`.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from pycloudlib.descriptors import moved
from pycloudlib.qemu.accelerator import Accelerator
from pycloudlib.rawtext import read_kernel_file

BACKEND = "ram0"
"""QEMU's name of a machine's memory, of one name for all kinds: by it a state is fitted to it."""

_HUGE_SHARED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_NAME = "pycloudlib-guest-memory"


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

    Shared memory can be read whoever asks, and compared in place. Under KVM, however, guests are
    faster with huge pages, which most hosts give to anonymous memory only.
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
