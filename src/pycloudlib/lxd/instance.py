"""Instances on LXD."""

from pycloudlib._otherclouds import OtherInstance


class LXDInstance(OtherInstance):
    """A container of LXD; a placeholder."""


class LXDVirtualMachineInstance(LXDInstance):
    """A virtual machine of LXD; a placeholder."""
