"""The whole server with toy workers (tests.toys): `python -m tests.toyserver`, with the options of ovserve.

Front end, API, dispatcher, supervisor, links and segments are the real ones. Only the code in the worker process is a
toy, so that a prompt can set the moment at which the process dies. This is a package with a `__main__`, as ovserve is:
spawned workers do not import it again, and start in a tenth of the time.
"""

from __future__ import annotations

import sys

from ovserve.cli import main as cli
from ovserve.worker import main as worker
from tests import toys

if __name__ == "__main__":
    worker.main = toys.worker_main
    sys.exit(cli.main())
