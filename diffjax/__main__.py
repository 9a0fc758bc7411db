"""`python -m diffjax` is the command line."""

import sys

from diffjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
