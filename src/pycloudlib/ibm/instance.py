"""Instances on IBM Cloud."""

from pycloudlib._otherclouds import OtherInstance


class IBMInstance(OtherInstance):
    """An instance on IBM Cloud; a placeholder."""
