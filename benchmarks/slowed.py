"""Start ovserve with a delay before each admission: a deliberate regression for the test of compare.py.

python -m benchmarks.slowed SECONDS [arguments of ovserve]
"""

from __future__ import annotations

import sys
import time

from ovserve.cli import main as cli
from ovserve.dispatch.dispatcher import Dispatcher
from ovserve.dispatch.jobs import Job

__all__: list[str] = []

_admit = Dispatcher.admit


def main() -> None:
    """Delay the admission of each job, in the thread of its request, and start the server."""
    delay_s = float(sys.argv.pop(1))

    def admit_late(self: Dispatcher, job: Job) -> None:
        time.sleep(delay_s)
        _admit(self, job)

    Dispatcher.admit = admit_late  # type: ignore[method-assign]
    sys.exit(cli.main())


if __name__ == "__main__":
    main()
