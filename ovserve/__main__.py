"""`python -m ovserve`: run `ovserve.cli.main.main`."""

import sys

from ovserve.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
