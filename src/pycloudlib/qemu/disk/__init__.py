"""Disks: images, checked before they are trusted, overlays on them, and layers of overlays."""
