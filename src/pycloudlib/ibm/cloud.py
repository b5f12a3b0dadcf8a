"""IBM Cloud, as a cloud."""

from pycloudlib._otherclouds import OtherCloud


class IBM(OtherCloud):
    """IBM Cloud; a placeholder."""
