"""VMware vSphere: placeholders, see `pycloudlib._otherclouds`."""
