"""The package's version: the epoch and major number are those that clients' pins accept."""

__version__ = "1!11.2.0"
