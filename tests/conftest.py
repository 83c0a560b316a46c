"""Fixtures that every test may use: the live server, the official client, sample pictures, and a guard against leaks."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live import LiveServer, children_of

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    """The directory with the sample pictures."""
    return DATA


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One live server with the built-in model for every test that leaves it as it was."""
    with LiveServer(spool=tmp_path_factory.mktemp("spool")) as live:
        yield live


@pytest.fixture
def leak_guard() -> Iterator[None]:
    """Fail a test that leaves threads, descriptors or child processes of this process behind."""
    gc.collect()
    threads, descriptors, children = _now()
    yield
    gc.collect()
    after_threads, after_descriptors, after_children = _now()
    assert after_threads <= threads, f"threads left: {after_threads - threads}"
    assert after_children <= children, f"children left: {after_children - children}"
    assert len(after_descriptors) <= len(descriptors), f"descriptors left: {after_descriptors - descriptors}"


def _now() -> tuple[set[str], set[str], set[int]]:
    threads = {thread.name for thread in threading.enumerate() if thread.is_alive()}
    descriptors = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:
            continue
    return threads, descriptors, set(children_of(os.getpid()))
