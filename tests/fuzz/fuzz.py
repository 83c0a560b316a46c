"""Run one coverage-guided fuzzer: `python -m tests.fuzz.fuzz TARGET [libFuzzer options] [corpus folders]`."""

from __future__ import annotations

import resource
import sys

import atheris

with atheris.instrument_imports(include=["ovserve.front"]):
    from tests.fuzz.targets import TARGETS


# What the process may allocate. libFuzzer's own -rss_limit_mb reads the peak that a process inherits from the one that started it.
MOST_BYTES = 1 << 30


def main() -> None:
    """Fuzz until the options say to stop; a failure leaves the input in a file and ends with a status above 0."""
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
