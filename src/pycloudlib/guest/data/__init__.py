"""What a guest is given: its seed, its user-data, and scripts that configure it while it runs."""
