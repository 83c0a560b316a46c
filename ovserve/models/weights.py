"""The size of a model's weights, and the memory that a worker is expected to take before one was measured."""

from __future__ import annotations

from pathlib import Path

__all__ = ["estimated_bytes", "weights_bytes"]

MIB = 1 << 20
# Measured with workers of random models: interpreter, libraries, and buffers of a small picture.
_WORKER_BYTES = 350 * MIB
# Of the weights: they are mapped from the file, and the CPU plugin keeps a repacked copy of them, in bfloat16 as large
# as a float16 file and in float32 twice as large.
_WEIGHTS_FACTOR = 2.2


def weights_bytes(directory: Path) -> int:
    """Return the size of the weight files of a model's directory: its OpenVINO IR `.bin` files."""
    total = 0
    for path in directory.glob("*/*.bin"):
        try:
            total += path.stat().st_size
        except OSError:  # it was removed meanwhile; a worker reports what is missing
            continue
    return total


def estimated_bytes(directory: Path) -> int:
    """Return the memory that one worker is expected to take, from the model's files alone.

    It is a first guess: quantised weights can take several times as much, and only a measurement decides.
    """
    return _WORKER_BYTES + int(_WEIGHTS_FACTOR * weights_bytes(directory))
