"""Ubuntu cloud images as local QEMU virtual machines, driven from Python.

The front door: `from pycloudlib import Qemu`. Nothing heavy is imported before it is used.
"""

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
