"""What is found out and kept when a machine fails."""
