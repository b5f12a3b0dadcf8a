"""IBM Cloud: placeholders, see `pycloudlib._otherclouds`."""
