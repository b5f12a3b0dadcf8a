"""What machine it is, and the directory in which that is written down."""
