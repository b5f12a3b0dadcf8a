"""A KVM that is emulation: all that the package does with a working KVM, where there is none.

A wrapper of QEMU swaps the accelerator and the CPU model, and nothing else. The package tries its
KVM, finds that it works, and takes every way that machines with KVM take.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.wrapper import write_wrapper
from pycloudlib.qemu.host import accelerator
from pycloudlib.qemu.host.accelerator import Accelerator
from pycloudlib.qemu.instance import QemuInstance
from pycloudlib.qemu.parts.standard import BACKEND, accel_option
from pycloudlib.qemu.vm import machine
from pycloudlib.qemu.vm.memory import choose_memory

# A trial in emulation takes longer than one with KVM, and this host may be busy.
_PATIENCE = 120.0

NEVER = "always within_size advise [never] deny force"
"""The kernel's setting of huge pages for shared memory, as on most hosts."""


@contextlib.contextmanager
def pretended_kvm(directory: Path, huge_shared: str = NEVER) -> Iterator[str]:
    """Let KVM "work" in the block, and yield section `[qemu]` of a configuration that asks for it.

    Args:
        directory: Where the wrapper goes, and what else is needed.
        huge_shared: The kernel's setting of huge pages for shared memory.
    """
    qemu = shutil.which("qemu-system-x86_64")
    assert qemu is not None
    wrapper = directory / "qemu-with-kvm"
    emulated = Accelerator.TCG
    write_wrapper(wrapper, qemu, accel_option(emulated), emulated.cpu_model)
    device, setting = directory / "kvm", directory / "shmem_enabled"
    device.touch()
    setting.write_text(f"{huge_shared}\n")
    trial = functools.partial(accelerator.try_accelerator, wall_limit=_PATIENCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        patch.setattr(accelerator, "KVM_DEVICE", device)
        patch.setattr(accelerator, "try_accelerator", trial)
        patch.setattr(
            machine, "choose_memory", functools.partial(choose_memory, huge_shared=setting)
        )
        yield f'accelerator = "kvm"\nqemu_binary = "{wrapper}"\n'


def kind_of_memory(instance: QemuInstance) -> str:
    """Return what QEMU says of a machine's memory: its type, and whether it is shared."""
    (memory,) = (each for each in instance.machine.execute("query-memdev") if each["id"] == BACKEND)
    kind = instance.machine.execute("qom-get", {"path": f"/objects/{BACKEND}", "property": "type"})
    return f"{kind}, {'shared' if memory['share'] else 'private'}"
