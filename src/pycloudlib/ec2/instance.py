"""Instances on Amazon EC2."""

from pycloudlib._otherclouds import OtherInstance


class EC2Instance(OtherInstance):
    """An instance on Amazon EC2; a placeholder."""
