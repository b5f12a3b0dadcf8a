"""What this host has for machines: accelerator, ports, memory; processes, and who owns what."""
