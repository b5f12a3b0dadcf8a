"""The tests, in three layers; each has the folders of the code that it tries."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The checkout."""
