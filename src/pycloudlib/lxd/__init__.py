"""LXD: placeholders, see `pycloudlib._otherclouds`."""
