"""Starts each worker in the pool that its model names: on this machine, or on a cluster."""

from __future__ import annotations

from collections.abc import Mapping

from ovserve.errors import LaunchError
from ovserve.wire.launcher import Launcher, WorkerProcess, WorkerSpec
from ovserve.wire.link import Link

__all__ = ["Pools"]


class Pools:
    """`wire.launcher.Launcher` over several others.

    Args:
        launchers: by the values of the model option `pool`. The first is that of models that name none.
    """

    def __init__(self, launchers: Mapping[str, Launcher]) -> None:
        self._launchers = dict(launchers)

    def prepare(self) -> None:
        """Prepare all of them."""
        for launcher in self._launchers.values():
            launcher.prepare()

    def start(self, spec: WorkerSpec) -> tuple[WorkerProcess, Link]:
        """Start a worker in the pool of its model. Raises LaunchError."""
        launcher = self._launchers.get(spec.model.pool or next(iter(self._launchers)))
        if launcher is None:
            raise LaunchError(f"there is no pool {spec.model.pool!r}")
        return launcher.start(spec)

    def overhead_bytes(self) -> int:
        """Return the memory that this program takes on this machine beside the workers."""
        return next(iter(self._launchers.values())).overhead_bytes()

    def close(self) -> None:
        """End what the pools have started beside workers."""
        for launcher in self._launchers.values():
            launcher.close()
