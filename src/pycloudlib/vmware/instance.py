"""Instances on VMware vSphere."""

from pycloudlib._otherclouds import OtherInstance


class VMWareInstance(OtherInstance):
    """An instance on VMware vSphere; a placeholder."""
