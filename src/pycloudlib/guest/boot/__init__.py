"""How a boot is followed: the console, cloud-init's own report, and when a machine is ready."""
