"""The choice of a pool for each worker, and the check for what a pool needs."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from ovserve.errors import LaunchError, SettingsError
from ovserve.server import check_settings
from ovserve.settings.options import ModelSettings, Settings
from ovserve.settings.worker import WorkerSettings
from ovserve.wire.launcher import WorkerSpec
from ovserve.wire.memory.blobs import MemoryBlobs
from ovserve.wire.memory.launcher import MemoryLauncher
from ovserve.wire.pools import Pools
from tests.toys import toy_profile


def spec(pool: str) -> WorkerSpec:
    return WorkerSpec(toy_profile(), ModelSettings(name="toy", pool=pool), WorkerSettings.of(Settings()), 0, 0)


def test_worker_starts_in_the_pool_of_its_model_and_else_in_the_first() -> None:
    def main(*_: Any) -> None:
        pass

    near, far = MemoryLauncher(main, MemoryBlobs()), MemoryLauncher(main, MemoryBlobs())
    pools = Pools({"local": near, "ray": far})
    pools.prepare()
    for pool in ("", "local", "ray"):
        _, link = pools.start(spec(pool))
        link.close()
    assert (len(near.started), len(far.started)) == (2, 1)
    with pytest.raises(LaunchError, match="no pool"):
        pools.start(spec("other"))
    assert pools.overhead_bytes() == 0
    pools.close()


def test_pool_without_its_package_is_an_error_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r"pip install 'ovserve\[ray\]'"):
        check_settings(Settings(models=(ModelSettings(name="m", pool="ray"),)))
