"""OpenStack: placeholders, see `pycloudlib._otherclouds`."""
