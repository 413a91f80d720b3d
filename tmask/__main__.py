"""``python -m tmask``: the command line."""

import sys

from tmask.cli import main

if __name__ == "__main__":
    sys.exit(main())
