"""IBM Cloud's classic infrastructure, as a cloud."""

from pycloudlib._otherclouds import OtherCloud


class IBMClassic(OtherCloud):
    """IBM Cloud's classic infrastructure; a placeholder."""
