"""Machines for tests: a pytest plugin, which pytest finds by itself when the package is installed.

Fixtures: `vm`, `vm_factory`, `shared_vm`, `vm_image` and `qemu_cloud`; a marker `vm`; options that
begin with `--vm-`. `from pycloudlib.pytest_plugin import VmFactory` is for annotations.
"""

from pycloudlib.pytest_plugin.machines import VmFactory

__all__ = ["VmFactory"]
