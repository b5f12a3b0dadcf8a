"""Programs that measure; each runs in the environment of one of the packages."""
