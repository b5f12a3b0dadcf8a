"""Instances on Google Compute Engine."""

from pycloudlib._otherclouds import OtherInstance


class GceInstance(OtherInstance):
    """An instance on Google Compute Engine; a placeholder."""
