"""Run one coverage-guided fuzzer: `python -m tests.fuzz.fuzz TARGET [libFuzzer options] [corpus folders]`."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["ovserve.front"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Fuzz until the options say to stop; a failure leaves the input in a file and ends with a status above 0."""
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
