"""The bridge: the front end's child process that is a driver of the Ray cluster.

It connects, again and again if need be, and has two threads for each worker (`wire.ray.remote`). It ends with the front
end, with its control socket, or when Ray ends it because the head of the cluster is lost.

    front end ── control socket: one packet for each worker, with the ends of its link and its status socket ──▶ bridge
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import secrets
import signal
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, NoReturn

from ovserve.errors import ClusterLost, LaunchError
from ovserve.logs import configure_logs, fields
from ovserve.settings.worker import WorkerSettings
from ovserve.wire.local.blobs import SpoolBlobs
from ovserve.wire.local.pipes import PipeWorkerLink
from ovserve.wire.local.processes import die_with
from ovserve.wire.ray.remote import Host, RemoteWorker
from ovserve.wire.ray.uploads import Uploads

if TYPE_CHECKING:
    from ovserve.wire.ray.cluster import Cluster

__all__ = ["KILL", "PACKET_BYTES", "STACKS", "Order", "run_bridge"]

KILL = b"kill"  # from the front end, on a worker's status socket
STACKS = b"stacks"  # the same: its worker has to log its stacks
PACKET_BYTES = 128 * 1024  # of an order; it has the profile and the options of one model
_DESCRIPTORS = 3  # that come with an order: commands, reports, status
_SWEEP_S = 1.0
_RECONNECT_S = 2.0
_CHECK_S = 2.0  # between two looks at the cluster
_SILENT_S = 3 * _CHECK_S  # after that, a head that does not answer is the reason for what fails
_ASK_AFTER_S = 4.0  # that a worker waits for its place: an actor on a node that has room is there before
_HEAD_LIMIT_S = 75.0  # Ray ends the process itself after 60 s, except where a new head answers at the old address
_END_S = 6.0  # for a cluster that was started for this server to end

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Order:
    """One worker that the bridge has to start.

    Attributes:
        name: `model/index#incarnation`.
        launch: what its actor gets (`wire.ray.host.Launch`).
        place_timeout_s: for the cluster to place it.
    """

    name: str
    launch: bytes
    cpus: float
    memory_bytes: int
    resources: Mapping[str, float]
    place_timeout_s: float

    def bundle(self) -> dict[str, float]:
        """Return what its node must have free, by Ray's names of the resources."""
        own = {"CPU": self.cpus, "memory": float(self.memory_bytes), **self.resources}
        return {name: amount for name, amount in own.items() if amount}


def run_bridge(
    parent: int, control: socket.socket, address: str, blobs: SpoolBlobs, settings: WorkerSettings
) -> NoReturn:
    """Run the bridge until its control socket is closed. The spawn target. Runs in: bridge."""
    die_with(parent)
    # A session of its own: no Ctrl-C, and Ray's own clean-up signals the whole process group.
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())  # else Ray's processes inherit the mask
    configure_logs(settings.log_level, settings.log_format)
    os.dup2(2, 1)  # standard output is the front end's: `ready URL`
    Bridge(control, address, blobs).run()


def _set_variables(address: str) -> None:
    """Set what Ray reads from the environment when it is imported."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address == "local":
        # Its name says another system, but what it does is to name the own node 127.0.0.1: all ports are bound there.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # A token for this cluster alone, that is in no file.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


class Bridge:
    """The bridge's main loop."""

    def __init__(self, control: socket.socket, address: str, blobs: SpoolBlobs) -> None:
        self._control = control
        self._address = address
        self._cluster: Cluster | None = None  # once it is connected
        self._draining: set[str] = set()  # ids of nodes
        self._has_asked = False  # the autoscaler, for room
        self._seen_at = math.inf  # when the head has answered last
        self._lost = ""  # why the connection is of no use any more
        self._waits_for = "the Ray cluster is being connected"
        self._uploads = Uploads(blobs, self._put)
        self._workers: dict[socket.socket, RemoteWorker] = {}
        self._stopping = threading.Event()
        self._connecting = threading.Thread(target=self._connect, name="connect", daemon=True)

    def run(self) -> NoReturn:
        """Serve until the control socket is closed; then end all workers and exit."""
        self._connecting.start()
        try:
            while self._turn():
                pass
        finally:
            self._end()
            logging.shutdown()
            os._exit(0)

    def _turn(self) -> bool:
        """Wait for the front end, and do what it says.

        Return False when it has closed the control socket, or the cluster is lost: the front end then starts another
        bridge.
        """
        ready = wait([self._control, *self._workers], _SWEEP_S)
        for each in ready:
            if each is self._control:
                if not self._take_order():
                    return False
            elif isinstance(each, socket.socket):
                self._read_handle(each)
        for status, worker in [*self._workers.items()]:
            if worker.node.rpartition("/")[2] in self._draining:
                worker.report_leaving()
            if worker.has_ended:
                del self._workers[status]
                status.close()
        self._uploads.sweep()
        if time.monotonic() - self._seen_at > _HEAD_LIMIT_S:
            self._lost = f"the head has not answered for {_HEAD_LIMIT_S:g} s"
        if self._lost:
            log.error("Ray cluster lost", extra=fields(address=self._address, why=self._lost))
        return not self._lost

    def _take_order(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._control, PACKET_BYTES, _DESCRIPTORS)
        if not data:
            return False
        order = pickle.loads(data)  # noqa: S301 - from the parent process
        commands, reports, status = descriptors
        link = PipeWorkerLink(Connection(commands, writable=False), Connection(reports, readable=False))
        handle = socket.socket(fileno=status)

        def place() -> Host | None:
            """Start the worker on the cluster; return None while it waits for a connection. Raises LaunchError."""
            cluster = self._cluster
            if cluster is None:
                return None
            try:
                return cluster.start(order.name, order.launch, order.cpus, order.memory_bytes, order.resources)
            except ClusterLost as error:
                self._lost = str(error)
            except LaunchError as error:
                if time.monotonic() - self._seen_at < _SILENT_S:
                    raise
                self._waits_for = f"the head of the cluster does not answer: {error}"
            return None  # no fault of the model: the worker waits, for the next connection if need be

        worker = RemoteWorker(order.name, link, handle, self._uploads, order.place_timeout_s)
        worker.place, worker.waits_for = place, lambda: self._waits_for
        worker.bundle = order.bundle()
        self._workers[handle] = worker
        worker.start()
        return True

    def _read_handle(self, status: socket.socket) -> None:
        """Do what a worker's handle says; kill the worker if it is closed."""
        data = b""
        with contextlib.suppress(OSError):
            data = status.recv(max(len(KILL), len(STACKS)))
        worker = self._workers[status]
        if data == STACKS:
            worker.log_stacks()
        if data in (KILL, b""):
            worker.kill()
            if not data:
                del self._workers[status]
                status.close()

    def _connect(self) -> None:
        _set_variables(self._address)
        from ovserve.wire.ray import cluster  # noqa: PLC0415 - only this process imports Ray

        while not self._stopping.is_set():
            found = cluster.Cluster(self._address)
            try:
                found.connect()
            except Exception as error:  # noqa: BLE001 - Ray raises many kinds
                reason = " ".join(str(error).split())[:300]
                self._waits_for = f"the Ray cluster {self._address} cannot be reached: {reason}"
                log.warning("Ray cluster not connected", extra=fields(address=self._address, why=reason))
                self._stopping.wait(_RECONNECT_S)
                continue
            log.info("Ray cluster connected", extra=fields(address=self._address))
            self._seen_at = time.monotonic()
            self._cluster = found
            # Ray's own processes end with the thread that has started them.
            while not self._stopping.wait(_CHECK_S):
                with contextlib.suppress(LaunchError):  # the head does not answer
                    self._ask_for_room(found)
                    draining = found.draining()
                    if draining is None:
                        self._lost = "this machine's node is no longer one of the cluster"
                        return
                    self._draining, self._seen_at = draining, time.monotonic()
            with contextlib.suppress(LaunchError):
                if self._has_asked:
                    found.ask_for_room(())
            found.disconnect()

    def _ask_for_room(self, cluster: Cluster) -> None:
        """Ask the autoscaler for room for all workers while one of them waits; then withdraw that. Raises LaunchError.

        Ray keeps a request until the next one, and the nodes for it: one that stays would cost for ever.
        """
        workers = [worker for worker in list(self._workers.values()) if not worker.has_ended]
        is_waiting = any(worker.waits_s() > _ASK_AFTER_S for worker in workers)
        if is_waiting or self._has_asked:
            bundles = [worker.bundle for worker in workers] if is_waiting else []
            if is_waiting != self._has_asked:
                log.info("autoscaler asked for room", extra=fields(workers=len(bundles)))
            cluster.ask_for_room(bundles)
            self._has_asked = is_waiting

    def _put(self, data: bytes) -> object:
        if self._cluster is None:
            raise RuntimeError("no cluster")
        return self._cluster.put(data)

    def _end(self) -> None:
        """End all workers, and a cluster that was started for this server."""
        self._stopping.set()
        self._control.close()  # the front end then starts another bridge, and does not wait for the end of this one
        for worker in self._workers.values():
            worker.is_lost = worker.is_lost or bool(self._lost)
            worker.kill()
        if self._connecting.ident:
            self._connecting.join(_END_S)
