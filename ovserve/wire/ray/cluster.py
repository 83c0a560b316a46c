"""Ray itself: connect to a cluster, start an actor there, call it, read its records.

The only module of ovserve that imports Ray. Runs in: bridge.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray._private.state import state
from ray.autoscaler.sdk import request_resources
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from ovserve.errors import ClusterLost, LaunchError
from ovserve.wire.ray.host import Part, WorkerHost, pack_command, unpack_command

__all__ = ["Cluster", "RemoteHost"]

# Of the object store of a cluster that is started for one server: uploads and results in flight, most in parts of a
# megabyte. Ray writes what does not fit to disk.
_LOCAL_STORE_BYTES = 512 * 1024 * 1024
_FETCH_TIMEOUT_S = 60.0  # of one record: a picture, from another node
_REASON_CHARS = 300
_OTHER_CLUSTER = "WrongClusterID"  # in the error of a call whose head was replaced by that of another cluster
_NODE_CHARS = 8  # of a node's id, behind its address: several nodes may have the same
_GROUPS = {"commands": 1, "reports": 1}  # one thread each


class _NodeHost(WorkerHost):
    """A worker's host that knows which node of the cluster it is on."""

    def __init__(self) -> None:
        address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        super().__init__(f"{address}/{ray.get_runtime_context().get_node_id()[:_NODE_CHARS]}")

    def take(self, command: bytes, *others: bytes) -> None:
        """Give the worker a command of `pack_command`."""
        number, line, parts, data = unpack_command(command, others)
        self.deliver(number, line, parts, *data)


class RemoteHost:
    """An actor with one worker. `read` and `deliver` may be called in two threads."""

    def __init__(self, actor: Any, launch: bytes) -> None:
        self._actor = actor
        self._items = actor.serve.options(num_returns="streaming", concurrency_group="reports").remote(launch)
        # Nothing reads what a call returns, or the record of it.
        self._take = actor.take.options(concurrency_group="commands", num_returns=0, enable_task_events=False)
        self._number = 0

    def read(self, timeout_s: float) -> bytes | None:
        """Return the next item of records, or None at the timeout.

        Raises:
            LaunchError: the actor has ended or cannot be placed; the message is the reason.
        """
        try:
            # `next` would wait without an end, and ray.wait before it costs as much again.
            reference = self._items._next_sync(timeout_s)
            if reference.is_nil():
                return None
            item: bytes = ray.get(reference, timeout=_FETCH_TIMEOUT_S)
        except StopIteration:
            raise LaunchError("the actor has ended") from None
        except GetTimeoutError:
            raise LaunchError(f"a report could not be fetched within {_FETCH_TIMEOUT_S:g} s") from None
        except RayError as error:
            raise LaunchError(_reason(error)) from None
        return item

    def deliver(self, line: bytes, parts: Sequence[Part], data: Sequence[Any]) -> None:
        """Send a command. Its failure shows in `read`."""
        command, others = pack_command(self._number, line, parts, data)
        self._take.remote(command, *others)
        self._number += 1

    def log_stacks(self) -> None:
        """Make the worker write the stacks of its threads into its log. Does not wait."""
        self._actor.log_stacks.options(concurrency_group="commands").remote()

    def kill(self) -> None:
        """Begin to end the actor, and with it its worker. Does not wait: without the cluster's head, Ray does."""
        threading.Thread(target=self._kill, name="kill", daemon=True).start()

    def _kill(self) -> None:
        with contextlib.suppress(RayError, ValueError):
            ray.kill(self._actor, no_restart=True)


class Cluster:
    """A connection to a cluster.

    Args:
        address: `local`: a cluster of this machine alone, that ends with the connection; else as ray.init takes it.
    """

    def __init__(self, address: str) -> None:
        self._is_local = address == "local"
        self._address = address
        self._folder = ""
        # Actors are found by name only within a namespace, and this one cannot be guessed.
        self._namespace = f"ovserve-{secrets.token_hex(16)}"

    def connect(self) -> None:
        """Connect. Raises whatever ray.init raises."""
        known: dict[str, Any] = {"address": self._address}
        if self._is_local:
            self._folder = tempfile.mkdtemp(prefix="ovserve-ray-")
            known = {
                "address": "local",
                "object_store_memory": _LOCAL_STORE_BYTES,
                "include_dashboard": False,
                "_temp_dir": self._folder,
            }
        try:
            ray.init(namespace=self._namespace, log_to_driver=False, logging_level=logging.ERROR, **known)
        except BaseException:
            self.disconnect()
            raise

    def draining(self) -> set[str] | None:
        """Return the nodes that are being drained, as the ends of their workers' names of nodes.

        None: the node of this machine is no longer one of the cluster, as when the cluster was created anew.

        Raises:
            LaunchError: the head does not answer.
        """
        try:
            own = ray.get_runtime_context().get_node_id()
            if not any(node["NodeID"] == own and node["Alive"] for node in ray.nodes()):  # type: ignore[no-untyped-call]
                return None
            return {node[:_NODE_CHARS] for node in state.get_draining_nodes()}
        except Exception as error:  # noqa: BLE001 - Ray raises many kinds
            if _OTHER_CLUSTER in str(error):
                return None
            raise LaunchError(_reason(error)) from None

    def ask_for_room(self, bundles: Sequence[Mapping[str, float]]) -> None:
        """Ask the cluster's autoscaler, if it has one, for nodes that together have room for all of these resources.

        Ray keeps the newest request for the whole cluster, so it replaces what another front end has asked for.

        Raises:
            LaunchError: the head does not answer.
        """
        try:
            request_resources(bundles=[dict(bundle) for bundle in bundles])
        except Exception as error:  # noqa: BLE001 - Ray raises many kinds
            raise LaunchError(_reason(error)) from None

    def disconnect(self) -> None:
        """End the connection, its actors, and a cluster that was started for it."""
        ray.shutdown()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def put(self, data: bytes) -> Any:
        """Put bytes into the object store; return the reference."""
        return ray.put(data)

    def start(
        self, name: str, launch: bytes, cpus: float, memory_bytes: int, resources: Mapping[str, float]
    ) -> RemoteHost:
        """Create an actor, and have it start a worker as soon as a node has room for it.

        Raises LaunchError and ClusterLost.

        Args:
            name: of the worker; shown by Ray's own tools.
            launch: a Launch.
            cpus: processors that a node must have free.
            memory_bytes: memory that a node must have free; 0: any.
            resources: custom resources that a node must have free.
        """
        try:
            actor = (
                ray.remote(concurrency_groups=_GROUPS)(_NodeHost)  # type: ignore[call-overload]
                .options(
                    name=f"{name}-{secrets.token_hex(8)}",
                    num_cpus=cpus,
                    memory=memory_bytes or None,
                    resources=dict(resources) or None,
                    max_restarts=0,
                    scheduling_strategy="SPREAD",
                )
                .remote()
            )
            return RemoteHost(actor, launch)
        except (RayError, ValueError) as error:
            if _OTHER_CLUSTER in str(error):
                raise ClusterLost("another cluster has come in the place of this one") from None
            raise LaunchError(_reason(error)) from None


def _reason(error: BaseException) -> str:
    """Return what an error of Ray says, on one line, or the error of the actor's own code that it stands for."""
    if isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    return f"{type(error).__name__}: {' '.join(str(error).split())[:_REASON_CHARS]}"
