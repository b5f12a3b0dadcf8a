"""Microsoft Azure: placeholders, see `pycloudlib._otherclouds`."""
