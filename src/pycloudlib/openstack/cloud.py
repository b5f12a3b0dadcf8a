"""OpenStack, as a cloud."""

from pycloudlib._otherclouds import OtherCloud


class Openstack(OtherCloud):
    """OpenStack; a placeholder."""
