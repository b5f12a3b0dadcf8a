"""Instances on IBM Cloud's classic infrastructure."""

from pycloudlib._otherclouds import OtherInstance


class IBMClassicInstance(OtherInstance):
    """An instance on IBM Cloud's classic infrastructure; a placeholder."""
