"""The contract of the process boundary across a cluster. The front end's store is its spool."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ovserve.wire.local.spool import Spool
from ovserve.wire.ray.launcher import RayLauncher
from tests.puppet import Puppet, PuppetBlobs, puppet_main
from tests.raycluster import RayCluster
from tests.wirecontract import *  # noqa: F403 - its tests are collected here
from tests.wirecontract import LIMIT_BYTES, Ends, Stores


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spool]:
    made = Spool(tmp_path_factory.mktemp("spool"), LIMIT_BYTES)
    yield made
    made.close()


@pytest.fixture(scope="module")
def launcher(cluster: RayCluster, spool: Spool) -> Iterator[RayLauncher]:
    made = RayLauncher(puppet_main, spool.worker_blobs(), cluster.address, 60.0)
    made.prepare()
    yield made
    made.close()


@pytest.fixture
def ends(launcher: RayLauncher, tmp_path: Path) -> Iterator[Ends]:
    puppet = Puppet(launcher, tmp_path)
    puppet.settle()
    yield puppet.link, puppet
    puppet.link.close()
    puppet.process.kill()
    puppet.process.close()


@pytest.fixture(scope="module")
def puppet(launcher: RayLauncher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Puppet]:
    made = Puppet(launcher, tmp_path_factory.mktemp("puppet"))
    made.settle()
    yield made
    made.link.close()
    made.process.close()


@pytest.fixture
def stores(spool: Spool, puppet: Puppet) -> Stores:
    return spool, PuppetBlobs(puppet, spool)
