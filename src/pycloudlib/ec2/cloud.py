"""Amazon EC2, as a cloud."""

from pycloudlib._otherclouds import OtherCloud


class EC2(OtherCloud):
    """Amazon EC2; a placeholder."""
