"""Google Compute Engine: placeholders, see `pycloudlib._otherclouds`."""
