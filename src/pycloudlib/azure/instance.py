"""Instances on Microsoft Azure."""

from pycloudlib._otherclouds import OtherInstance


class AzureInstance(OtherInstance):
    """An instance on Microsoft Azure; a placeholder."""
