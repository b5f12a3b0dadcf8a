"""Disks: images that are checked before they are trusted, overlays, and layers."""
