"""What we say to the guest, and what it says to us; nothing here knows of QEMU."""
