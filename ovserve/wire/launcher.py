"""A launcher: starts workers, and the handle on each for what the fleet needs of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ovserve.models.profile import ModelProfile
from ovserve.settings.options import ModelSettings
from ovserve.settings.worker import WorkerSettings
from ovserve.wire.blobs import WorkerBlobs
from ovserve.wire.link import Link, WorkerLink

__all__ = ["Launcher", "WorkerMain", "WorkerProcess", "WorkerSpec"]

# What runs in a worker: serves one model until Stop arrives or the link ends.
WorkerMain = Callable[[WorkerLink, WorkerBlobs, ModelProfile, ModelSettings, WorkerSettings], None]


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker to start.

    Attributes:
        index: the worker's slot.
        incarnation: how many workers this slot had before.
    """

    profile: ModelProfile
    model: ModelSettings
    settings: WorkerSettings
    index: int
    incarnation: int


class WorkerProcess(Protocol):
    """One started worker. Used by the supervisor thread alone, but for `pid` and `kill`."""

    @property
    def name(self) -> str:
        """`model/index#incarnation`, as in the log."""

    @property
    def pid(self) -> int:
        """Its process id, for the log; 0 where it has none on this machine."""

    @property
    def readiness(self) -> int:
        """A descriptor for `multiprocessing.connection.wait`: readable when the worker has exited."""

    def is_alive(self) -> bool:
        """Return whether it runs; reap it when it has exited."""

    def exit_reason(self) -> str:
        """Return why it has exited, for the log."""

    def was_lost(self) -> bool:
        """Return whether its cluster has lost it or had no place for it: that says nothing about the model."""

    def log_stacks(self) -> None:
        """Make it write the stacks of its threads into the log, if it can. Returns at once."""

    def kill(self) -> None:
        """Kill it at once. Idempotent."""

    def resident_bytes(self) -> int:
        """Return its resident memory without pages mapped from files; 0 when it has exited or this is not known."""

    def memory_bytes(self) -> int:
        """Return the memory that it takes with its children, of shared pages its share; 0 when it has exited."""

    def node(self) -> str:
        """Return the name of the node of a cluster that it runs on; empty: this machine, or not known yet."""

    def is_leaving(self) -> bool:
        """Return whether its node is being drained, so that another worker has to take over from it."""

    def machine_bytes(self) -> int:
        """Return the memory of the machine that it runs on, or of the control group there if that is less."""

    def waits_for(self) -> str:
        """Return what it waits for before it is started, such as a place in a cluster; empty if it was started."""

    def close(self) -> None:
        """Free the handle of a worker that has exited."""


class Launcher(Protocol):
    """Starts workers."""

    def prepare(self) -> None:
        """Do what must happen once, in the calling thread, before the thread that calls `start` begins."""

    def start(self, spec: WorkerSpec) -> tuple[WorkerProcess, Link]:
        """Begin to start a worker; return its handle and the front end's side of its link.

        It returns without waiting for the worker. Where a worker has to be placed first, as in a cluster, its handle
        counts as alive meanwhile, its link keeps commands, and a failure to place it is an exit with its reason.

        Raises:
            LaunchError: no worker can be started now.
        """

    def overhead_bytes(self) -> int:
        """Return the memory that this program takes beside its workers, where it shares their machine; else 0."""

    def close(self) -> None:
        """End what was started beside workers. Called by the thread that has called `start`, when all have exited."""
