"""What is measured, a course a module: its `run` measures with a `Bench`."""
