"""Machines for tests: a pytest plugin, which pytest loads if the package is installed.

Fixtures: `vm`, `vm_factory`, `shared_vm`, `prepare_vm`, `vm_image` and `qemu_cloud`; a marker `vm`;
options that begin with `--vm-`. `VmFactory` and `PrepareVm` are for annotations.
"""

from pycloudlib.pytest_plugin.machines import PrepareVm, VmFactory

__all__ = ["PrepareVm", "VmFactory"]
