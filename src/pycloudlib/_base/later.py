"""Libraries that load slowly, named where their errors are caught and seldom raised."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class ImportedLater:
    """A module that is imported when it is first used.

    `except library.Error` looks at it only when something is raised.

    Args:
        name: Its name.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)
