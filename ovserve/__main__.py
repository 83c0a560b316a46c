"""`python -m ovserve`: run the `ovserve` command."""

import sys

from ovserve.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
