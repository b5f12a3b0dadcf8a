"""The engine: QEMU machines from their description to their end."""
