"""Workers on a Ray cluster, seen from the front end: orders to the bridge process, and a handle on each worker.

Imports no Ray: the bridge does. Runs in: supervisor.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess

from ovserve.errors import LaunchError, LinkGarbage
from ovserve.settings.placement import parse_placement
from ovserve.wire.launcher import WorkerMain, WorkerSpec
from ovserve.wire.local import processes
from ovserve.wire.local.blobs import SpoolBlobs
from ovserve.wire.local.pipes import PipeLink, open_link
from ovserve.wire.ray.bridge import KILL, STACKS, Order, run_bridge
from ovserve.wire.ray.host import Launch
from ovserve.wire.ray.records import decode_json

__all__ = ["RayLauncher", "RayProcess"]

_END_S = 8.0  # for the bridge to end, with a cluster that was started for it
_STATUS_BYTES = 65536
_ANY_SIZE = 1 << 60  # the memory of a machine that has not reported it yet


class RayProcess:
    """`wire.launcher.WorkerProcess` for a worker on the cluster.

    Attributes:
        name: `model/index#incarnation`.
        pid: its process id on its node, once it was placed.
    """

    def __init__(self, name: str, status: socket.socket) -> None:
        self.name = name
        self.pid = 0
        self.readiness = status.fileno()
        self._status = status
        self._exit = ""
        self._waits_for = ""
        self._node = ""
        self._is_leaving = False
        self._was_lost = False
        self._memory: dict[str, int] = {}

    def is_alive(self) -> bool:
        """Return whether it runs or waits for its place."""
        self._read()
        return not self._exit

    def exit_reason(self) -> str:
        """Return why it has exited."""
        return self._exit or "still running"

    def was_lost(self) -> bool:
        """Return whether the cluster was lost, or has not placed it."""
        return self._was_lost

    def waits_for(self) -> str:
        """Return what it waits for before it is placed on a node, or ""."""
        return self._waits_for

    def kill(self) -> None:
        """Have the bridge kill its actor. Idempotent."""
        with contextlib.suppress(OSError):
            self._status.send(KILL, socket.MSG_DONTWAIT)

    def log_stacks(self) -> None:
        """Have its actor signal it, if it was placed."""
        with contextlib.suppress(OSError):
            self._status.send(STACKS, socket.MSG_DONTWAIT)

    def resident_bytes(self) -> int:
        """Return its resident memory as last reported."""
        return 0 if self._exit else self._memory.get("resident", 0)

    def memory_bytes(self) -> int:
        """Return the memory that it takes with its children as last reported."""
        return 0 if self._exit else self._memory.get("memory", 0)

    def node(self) -> str:
        """Return the name of its node, once it was placed."""
        return self._node

    def is_leaving(self) -> bool:
        """Return whether its node is being drained."""
        return self._is_leaving

    def machine_bytes(self) -> int:
        """Return the memory of its node."""
        return self._memory.get("machine", _ANY_SIZE)

    def close(self) -> None:
        """Close the handle: the bridge ends the worker if it still runs."""
        self._status.close()

    def _read(self) -> None:
        """Read what the bridge has reported."""
        while not self._exit:
            try:
                data = self._status.recv(_STATUS_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                self._exit, self._was_lost = f"lost: {error.strerror}", True
                return
            if not data:
                self._exit, self._was_lost = "the connection to the Ray cluster was lost", True
                return
            with contextlib.suppress(LinkGarbage):
                self._note(decode_json(data))

    def _note(self, values: dict[str, object]) -> None:
        numbers = {name: value for name, value in values.items() if type(value) is int}
        self._memory.update(numbers)
        self.pid = self._memory.get("pid", 0)
        self._node = str(values.get("node", "") or self._node)
        self._is_leaving = self._is_leaving or values.get("leaving") is True
        self._was_lost = self._was_lost or values.get("lost") is True
        self._waits_for = str(values.get("waits_for", ""))
        self._exit = str(values.get("exit", "") or self._exit)


class RayLauncher:
    """`wire.launcher.Launcher` that has a bridge process place actors.

    The bridge is spawned with the first worker, and again when it has ended. It ends with the thread that calls
    `start` (PR_SET_PDEATHSIG).

    Args:
        worker_main: what runs in a worker, importable by name on the nodes.
        blobs: access to the front end's segments.
        address: of the cluster; `local`: one that is started for this server.
        place_timeout_s: for the cluster to place a worker.
    """

    def __init__(self, worker_main: WorkerMain, blobs: SpoolBlobs, address: str, place_timeout_s: float) -> None:
        self._worker_main = worker_main
        self._blobs = blobs
        self._address = address
        self._place_timeout_s = place_timeout_s
        self._context = multiprocessing.get_context("spawn")
        self._bridge: SpawnProcess | None = None
        self._control: socket.socket | None = None

    def prepare(self) -> None:
        """Start the resource tracker. Its first start unblocks signals in the thread that makes it."""
        resource_tracker.ensure_running()

    def start(self, spec: WorkerSpec) -> tuple[RayProcess, PipeLink]:
        """Order a worker. Raises LaunchError."""
        try:
            try:
                return self._order(self._running_bridge(spec), spec)
            except ConnectionError:  # the bridge is about to end: it has lost its cluster
                self._forget_bridge(wait_s=0.0)
                return self._order(self._running_bridge(spec), spec)
        except OSError as error:
            raise LaunchError(str(error)) from error

    def _order(self, control: socket.socket, spec: WorkerSpec) -> tuple[RayProcess, PipeLink]:
        link, end = open_link(self._context, spec.model.name, spec.index, spec.incarnation)
        own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        placement = parse_placement(spec.model.placement)
        order = Order(
            name=link.name,
            launch=Launch(self._worker_main, spec).to_bytes(),
            cpus=placement.cpus,
            memory_bytes=placement.memory_bytes,
            resources=dict(placement.resources),
            place_timeout_s=self._place_timeout_s,
        )
        packet = pickle.dumps(order)
        try:
            ends = [end.commands.fileno(), end.reports.fileno(), other.fileno()]
            socket.send_fds(control, [packet], ends, socket.MSG_DONTWAIT)
        except BaseException:
            link.close()
            own.close()
            raise
        finally:
            end.close()
            other.close()
        return RayProcess(link.name, own), link

    def _running_bridge(self, spec: WorkerSpec) -> socket.socket:
        """Return the control socket of a bridge that runs; spawn one if there is none. Raises OSError."""
        if self._bridge is not None and self._bridge.is_alive() and self._control is not None:
            return self._control
        self._forget_bridge()
        own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        bridge = self._context.Process(
            target=run_bridge,
            args=(os.getpid(), other, self._address, self._blobs, spec.settings),
            name="ray bridge",
            daemon=True,
        )
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, processes.BLOCKED_SIGNALS)
            bridge.start()
        except OSError:
            own.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            other.close()
        self._bridge, self._control = bridge, own
        return own

    def _forget_bridge(self, wait_s: float = _END_S) -> None:
        if self._control is not None:
            self._control.close()
        if self._bridge is not None:
            self._bridge.join(wait_s)
            if self._bridge.is_alive():
                self._bridge.kill()
                self._bridge.join()
            self._bridge.close()
        self._bridge = self._control = None

    def overhead_bytes(self) -> int:
        """Return the memory that this process and the bridge take."""
        own = processes.proportional_bytes(os.getpid())
        bridge = self._bridge
        return own + (processes.proportional_bytes(bridge.pid) if bridge is not None and bridge.pid else 0)

    def close(self) -> None:
        """End the bridge, and with it every worker that is left."""
        self._forget_bridge()
