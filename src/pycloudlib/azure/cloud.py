"""Microsoft Azure, as a cloud."""

from pycloudlib._otherclouds import OtherCloud


class Azure(OtherCloud):
    """Microsoft Azure; a placeholder."""
