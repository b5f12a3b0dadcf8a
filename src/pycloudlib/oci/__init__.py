"""Oracle Cloud Infrastructure: placeholders, see `pycloudlib._otherclouds`."""
