"""IBM Cloud's classic infrastructure: placeholders, see `pycloudlib._otherclouds`."""
