"""What is asked of Microsoft Azure."""

from pycloudlib._otherclouds import Placeholder


class AzureParams(Placeholder):
    """What a request to Azure consists of; a placeholder."""


class AzureCreateParams(AzureParams):
    """What the making of something on Azure consists of; a placeholder."""
