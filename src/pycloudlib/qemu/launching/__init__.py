"""What is asked of a launch, and the ways in which a machine begins."""
