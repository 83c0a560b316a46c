"""Benchmarks: each figure is compared with a baseline from the same run. See benchmarks/README.md."""
