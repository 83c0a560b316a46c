"""The tests of some modules run against workers on this machine, and in the heavy tier also on a cluster."""

from __future__ import annotations

import pytest

# Edits, masks, streams and official clients.
ON_CLUSTER = {"test_edits", "test_masked_edits", "test_stream", "test_clients", "test_client_examples"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give these modules the fixture `server` of tests/conftest.py in both kinds."""
    if "server" in metafunc.fixturenames and metafunc.module.__name__.rpartition(".")[2] in ON_CLUSTER:
        # None is also what other modules give it: the server on this machine stays the same for all.
        kinds = [pytest.param(None, id="local"), pytest.param("cluster", id="cluster", marks=pytest.mark.heavy)]
        metafunc.parametrize("server", kinds, indirect=True, scope="session")
