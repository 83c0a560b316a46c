"""Run one coverage-guided fuzzer: `python -m tests.fuzz.fuzz TARGET [libFuzzer options] [corpus folders]`."""

from __future__ import annotations

import resource
import sys

import atheris

with atheris.instrument_imports(include=["ovserve.front", "ovserve.api.parameters.imagehead", "ovserve.pixels.counts"]):
    from tests.fuzz.targets import TARGETS

# Limit of the process's memory. libFuzzer's -rss_limit_mb would also count the peak inherited from the parent process.
MAX_DATA_BYTES = 1 << 30


def main() -> None:
    """Fuzz until a limit in the options is reached. On a failure, write the input to a file and exit with an error."""
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA_BYTES, MAX_DATA_BYTES))
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
