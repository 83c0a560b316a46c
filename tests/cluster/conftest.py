"""One cluster for all tests in this folder: a head that places nothing, and two nodes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.raycluster import RayCluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[RayCluster]:
    """Start a cluster with two nodes, and let this process's children connect to it."""
    with RayCluster(cpus=0) as made:
        made.add(cpus=4, first=4)
        made.add(cpus=4, second=4)
        os.environ.update(made.environment)
        yield made
        for name in made.environment:
            os.environ.pop(name)
