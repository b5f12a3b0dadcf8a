"""Ubuntu cloud images as local QEMU virtual machines, driven from Python.

The front door: `from pycloudlib import Qemu`. Nothing is imported before it is used.
"""

from typing import TYPE_CHECKING

from pycloudlib._version import __version__

__all__ = [
    "Qemu",
    "__version__",
    "cloud",
    "config",
    "errors",
    "instance",
    "key",
    "result",
    "util",
]

# Type checkers see all names as they are; at run time what is behind them is imported when they are
# first used. The other clouds are placeholders, see _otherclouds.py: the package of each, by name.
if TYPE_CHECKING:
    from pycloudlib import cloud, config, errors, instance, key, result, util
    from pycloudlib.azure.cloud import Azure as Azure
    from pycloudlib.ec2.cloud import EC2 as EC2
    from pycloudlib.gce.cloud import GCE as GCE
    from pycloudlib.ibm.cloud import IBM as IBM
    from pycloudlib.ibm_classic.cloud import IBMClassic as IBMClassic
    from pycloudlib.lxd.cloud import LXD as LXD
    from pycloudlib.lxd.cloud import LXDContainer as LXDContainer
    from pycloudlib.lxd.cloud import LXDVirtualMachine as LXDVirtualMachine
    from pycloudlib.oci.cloud import OCI as OCI
    from pycloudlib.openstack.cloud import Openstack as Openstack
    from pycloudlib.qemu.cloud import Qemu
    from pycloudlib.vmware.cloud import VMWare as VMWare
else:
    _OTHER_CLOUDS = {
        "Azure": "azure",
        "EC2": "ec2",
        "GCE": "gce",
        "IBM": "ibm",
        "IBMClassic": "ibm_classic",
        "LXD": "lxd",
        "LXDContainer": "lxd",
        "LXDVirtualMachine": "lxd",
        "OCI": "oci",
        "Openstack": "openstack",
        "VMWare": "vmware",
    }

    _CLOUDS = {"Qemu": "qemu", **_OTHER_CLOUDS}
    # Reachable without an import of their own, as if this module had imported them.
    _MODULES = (*__all__, "diagnosis", "guest", "images", "progress", "qemu")

    def __getattr__(name):
        from importlib import import_module  # noqa: PLC0415 - each program uses some names

        if name in _CLOUDS:
            return getattr(import_module(f"{__name__}.{_CLOUDS[name]}.cloud"), name)
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name == "qemu":
            import_module(f"{__name__}.qemu.cloud")
        return import_module(f"{__name__}.{name}")

    def __dir__():
        return sorted({*globals(), *__all__})
