"""What this computer gives machines: an accelerator, ports, processes, and who owns what."""
