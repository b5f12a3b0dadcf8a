"""Oracle Cloud Infrastructure, as a cloud."""

from pycloudlib._otherclouds import OtherCloud


class OCI(OtherCloud):
    """Oracle Cloud Infrastructure; a placeholder."""
