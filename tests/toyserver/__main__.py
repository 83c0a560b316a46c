"""The whole server with toy workers (tests.toys): `python -m tests.toyserver`, with ovserve's own options.

The front end, the API, dispatcher, supervisor, links and segments are the real ones; only what runs in the worker process is
a toy, so that a prompt can say at which moment the process shall die. A folder with a `__main__`, as ovserve itself is: spawned
workers do not import that again, and start in a tenth of the time.
"""

from __future__ import annotations

import sys

from ovserve.cli import main as cli
from ovserve.worker import main as worker
from tests import toys

if __name__ == "__main__":
    worker.main = toys.worker_main
    sys.exit(cli.main())
