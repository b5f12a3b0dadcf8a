"""What is kept of a running machine: how it is saved, and how it is restored."""
