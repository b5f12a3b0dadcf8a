"""VMware vSphere, as a cloud."""

from pycloudlib._otherclouds import OtherCloud


class VMWare(OtherCloud):
    """VMware vSphere; a placeholder."""
