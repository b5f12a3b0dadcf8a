"""`python -m pycloudlib` is the command line."""

import sys

from pycloudlib.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
