"""Ubuntu cloud images as local QEMU virtual machines, driven from Python.

The front door: `from pycloudlib import Qemu`. Nothing heavy is imported before it is used.
"""

from typing import TYPE_CHECKING

from pycloudlib import cloud, config, errors, instance, key, result, util
from pycloudlib._version import __version__
from pycloudlib.qemu.cloud import Qemu

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

# Placeholders, see _otherclouds.py: the package of each, by name. Type checkers see them as they
# are; at run time they are imported when they are first used.
if TYPE_CHECKING:
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

    def __getattr__(name):
        if name not in _OTHER_CLOUDS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module  # noqa: PLC0415 - for programs of other clouds

        return getattr(import_module(f"{__name__}.{_OTHER_CLOUDS[name]}.cloud"), name)
