"""Benchmarks: each figure against a baseline measured in the same run. How to repeat them: benchmarks/README.md."""
