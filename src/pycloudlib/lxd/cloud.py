"""LXD, as a cloud."""

from pycloudlib._otherclouds import OtherCloud


class _BaseLXD(OtherCloud):
    """What LXD's containers and virtual machines have in common; a placeholder."""


class LXDContainer(_BaseLXD):
    """LXD's containers; a placeholder."""


class LXD(LXDContainer):
    """The older name of `LXDContainer`; a placeholder."""


class LXDVirtualMachine(_BaseLXD):
    """LXD's virtual machines; a placeholder."""
