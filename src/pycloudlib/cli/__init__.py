"""The command line: machines that live until they are deleted, by name, across shells."""
