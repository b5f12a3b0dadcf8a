"""Google Compute Engine, as a cloud."""

from pycloudlib._otherclouds import OtherCloud


class GCE(OtherCloud):
    """Google Compute Engine; a placeholder."""
