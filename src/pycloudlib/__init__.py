"""Ubuntu cloud images as local QEMU virtual machines, driven from Python."""

from pycloudlib._version import __version__

__all__ = ["__version__"]
