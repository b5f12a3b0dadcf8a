"""Amazon EC2: placeholders, see `pycloudlib._otherclouds`."""
