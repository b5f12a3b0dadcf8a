"""Instances on OpenStack."""

from pycloudlib._otherclouds import OtherInstance


class OpenstackInstance(OtherInstance):
    """An instance on OpenStack; a placeholder."""
