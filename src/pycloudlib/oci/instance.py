"""Instances on Oracle Cloud Infrastructure."""

from pycloudlib._otherclouds import OtherInstance


class OciInstance(OtherInstance):
    """An instance on Oracle Cloud Infrastructure; a placeholder."""
