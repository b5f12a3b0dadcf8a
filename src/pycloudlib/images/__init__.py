"""Where images come from and what is on disk: catalog, download, build, store."""
