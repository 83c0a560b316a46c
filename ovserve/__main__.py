"""`python -m ovserve`: hands over to cli.main."""

import sys

from ovserve.cli import main

if __name__ == "__main__":
    sys.exit(main())
