"""`python -m ovserve`: run the `ovserve` command.

`python -m` puts the current directory first on the module search path: a file such as `numpy.py` there would be
imported in place of the package. It is removed before anything else is imported, and workers get the search path of
this process.
Some modules of the standard library have been imported before this file: only `python -P -m ovserve` protects those.
"""

import os  # Python itself has imported it, before it added the current directory
import sys


def _remove_current_directory() -> None:
    """Remove the current directory from the module search path, unless ovserve itself is imported from it."""
    if sys.flags.safe_path:
        return  # Python has not added it
    try:
        current = os.getcwd()
    except OSError:
        return  # it has been deleted, so Python has not added it
    if os.path.dirname(os.path.dirname(os.path.abspath(__file__))) != current and sys.path[0] in ("", current):
        del sys.path[0]


if __name__ == "__main__":
    _remove_current_directory()

    from ovserve.cli.main import main

    sys.exit(main())
