"""Programs that run inside guests: sent there as text."""
