"""Fixtures for all tests: the live server, the sample pictures, and a check for leaks."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import hypothesis
import pytest

from tests.live import LiveServer, children_of
from tests.raycluster import three_nodes

DATA = Path(__file__).parent / "data"
# nginx, haproxy, curl and jq, where scripts/test has extracted them because the machine lacks them.
PROGRAMS = Path(__file__).parents[1] / ".venv" / "programs" / "bin"

# Servers in tests keep compiled models and measurements here, and not in the user's cache directory. Each process of
# pytest-xdist has its own: a test that stops a worker while it loads would hold up the workers of all others.
_cache = tempfile.TemporaryDirectory(prefix="ovserve-tests-")
os.environ["CACHE_DIRECTORY"] = _cache.name
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", str(PROGRAMS)])

# A deadline would fail examples on a loaded machine: speed is measured in benchmarks. In CI Hypothesis has none.
_profile = hypothesis.settings.get_profile(hypothesis.settings.get_current_profile_name())
hypothesis.settings.register_profile("no deadline", _profile, deadline=None)
hypothesis.settings.load_profile("no deadline")


def pytest_collection_finish() -> None:
    """Leave what exists now out of later garbage collections: with 7000 collected tests, one takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def data() -> Path:
    """Return the directory with the sample pictures."""
    return DATA


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Start one live server with the built-in model. It is shared by all tests that do not change its state.

    With the parameter `cluster`, its workers are on a cluster with three nodes.
    """
    spool = tmp_path_factory.mktemp("spool")
    with ExitStack() as stack:
        arguments: list[str] = []
        environment = {}
        if getattr(request, "param", None) == "cluster":
            cluster = stack.enter_context(three_nodes())
            arguments = ["--pool", "ray", "--ray_address", cluster.address, "--replicas", "3"]
            environment = cluster.environment
        live = stack.enter_context(LiveServer(*arguments, spool=spool, environment=environment))
        yield live


@pytest.fixture
def leak_guard() -> Iterator[None]:
    """Fail the test if it leaves threads, descriptors or child processes of this process behind."""
    gc.collect()
    threads, descriptors, children = _snapshot()
    yield
    gc.collect()
    after_threads, after_descriptors, after_children = _snapshot()
    assert after_threads <= threads, f"threads left: {after_threads - threads}"
    assert after_children <= children, f"children left: {after_children - children}"
    assert len(after_descriptors) <= len(descriptors), f"descriptors left: {after_descriptors - descriptors}"


def _snapshot() -> tuple[set[str], set[str], set[int]]:
    """Return the names of the running threads, the open descriptors, and the ids of the child processes."""
    threads = {thread.name for thread in threading.enumerate() if thread.is_alive()}
    descriptors = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:
            continue
    return threads, descriptors, set(children_of(os.getpid()))
