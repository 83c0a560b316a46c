"""The contract of the process boundary over pipes and files, and in memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ovserve.wire.local.pipes import open_link
from ovserve.wire.local.spool import Spool
from ovserve.wire.memory.blobs import MemoryBlobs
from ovserve.wire.memory.link import open_memory_link
from tests.wirecontract import *  # noqa: F403 - its tests are collected here
from tests.wirecontract import LIMIT_BYTES, Ends, Stores


@pytest.fixture(params=["local", "memory"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    made: tuple[Any, Any] = (
        open_link(multiprocessing.get_context("spawn"), "toy", 2, 3)
        if request.param == "local"
        else open_memory_link("toy", 2, 3)
    )
    yield made
    made[0].close()
    made[1].close()


@pytest.fixture(params=["local", "memory"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stores]:
    if request.param == "memory":
        blobs = MemoryBlobs(LIMIT_BYTES)
        yield blobs, blobs
        return
    spool = Spool(tmp_path, LIMIT_BYTES)
    yield spool, spool.worker_blobs()
    spool.close()
