"""A Ray cluster on this machine, in a process of its own: `with RayCluster() as cluster: cluster.add(cpus=2)`.

`python -m tests.raycluster` is that process: it starts the head, then takes one command a line, and answers each with
one line. It ends, and every node with it, when its standard input is closed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["RayCluster", "three_nodes"]

STORE_BYTES = 100 << 20
STOP_TIMEOUT_S = 60.0
_SCALED = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}


class RayCluster:
    """A cluster with a head that has this many processors; 0: it places nothing.

    Args:
        cpus: of the head.
        port: of the head; 0: any.
        environment: of an earlier cluster in whose place this one comes.
        host: address that the head listens on; empty: that of all nodes is 127.0.0.1.
        grows_to: nodes with one processor that Ray's autoscaler may add, with its fake provider. Needs a port.

    Attributes:
        address: of the head.
        environment: variables that processes need which connect to it.
    """

    def __init__(
        self, cpus: int = 2, port: int = 0, environment: dict[str, str] | None = None, host: str = "", grows_to: int = 0
    ) -> None:
        self._folder = tempfile.mkdtemp(prefix="ovs-ray-")  # short: Ray's sockets are in it
        self.environment = environment or {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1" if host else "0",  # 0: its nodes are 127.0.0.1
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "tests.raycluster",
                self._folder,
                str(cpus),
                str(port),
                host,
                str(grows_to),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | self.environment | {"RAY_TMPDIR": self._folder} | (_SCALED if grows_to else {}),
            start_new_session=True,
        )
        self.address = self._answer()

    def add(self, cpus: int = 2, **resources: float) -> str:
        """Add a node; return its id."""
        return self._ask("add", cpus, resources)

    def remove(self, node: str) -> None:
        """Kill a node with everything on it."""
        self._ask("remove", node)

    def actors(self) -> list[int]:
        """Return the process ids of the actors on this cluster, which are known by its token."""
        return self._processes(b"ray::_NodeHost")

    def _processes(self, words: bytes) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                is_named = words in path.joinpath("cmdline").read_bytes().partition(b"\0")[0]
                if is_named and self.environment["RAY_AUTH_TOKEN"].encode() in path.joinpath("environ").read_bytes():
                    found.append(int(path.name))
            except OSError:
                continue
        return found

    def _of_folder(self) -> list[int]:
        """Return the ids of processes whose arguments name this cluster's folder, such as those that read its logs."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self._folder.encode() in path.joinpath("cmdline").read_bytes():
                    found.append(int(path.name))
        return found

    def nodes(self) -> list[int]:
        """Return the process ids of all nodes of this cluster, the head's included."""
        return self._processes(b"/raylet/raylet")

    def autoscaler_log(self) -> str:
        """Return what the autoscaler has logged."""
        return Path(self._folder, "session_latest", "logs", "monitor.log").read_text("utf-8")

    def stop(self) -> None:
        """End all nodes. Idempotent."""
        if self._process.poll() is None and self._process.stdin:
            self._process.stdin.close()
            self._process.wait(STOP_TIMEOUT_S)
        if self._process.stdout:
            self._process.stdout.close()
        for pid in {*self.nodes(), *self._of_folder()}:  # of nodes that the autoscaler has added
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ask(self, *command: object) -> str:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("answer "):  # Ray prints too
                return line.removeprefix("answer ").strip()
        raise AssertionError(f"the cluster has ended: {self._process.wait()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _autoscaling(folder: str, port: int, nodes: int) -> dict[str, Any]:
    """Write the configuration of an autoscaler whose nodes are processes of this machine; return the head's options."""
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    path = os.path.join(folder, "autoscaler.json")
    types = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "added": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": nodes},
    }
    known = {
        "cluster_name": "fake",
        "max_workers": nodes,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"127.0.0.1:{port}",
            "disable_launch_config_check": True,
            "disable_node_updaters": True,
            "use_node_id_as_ip": True,  # all nodes have the same address
        },
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
    }
    lists = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    known |= {f"{name}_commands": [] for name in lists} | {"cluster_synced_files": []}
    with open(path, "w", encoding="ascii") as file:
        json.dump(known, file)
    return {"autoscaling_config": path, "env_vars": {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID}}


@contextmanager
def three_nodes() -> Iterator[RayCluster]:
    """Run a cluster with three nodes, and a head that places nothing."""
    with RayCluster(cpus=0) as cluster:
        for _ in range(3):
            cluster.add(cpus=1)
        yield cluster


def _serve(folder: str, cpus: int, port: int, host: str, grows_to: int) -> None:
    from ray.cluster_utils import Cluster

    # Ray writes the address of the newest cluster there, and makes the directory only where it is its own default.
    os.mkdir(os.path.join(os.environ["RAY_TMPDIR"], "ray"))

    known: dict[str, Any] = {"object_store_memory": STORE_BYTES, "include_dashboard": False}
    head = {"num_cpus": cpus, "temp_dir": folder} | ({"gcs_server_port": port} if port else {})
    head |= {"node_ip_address": host} if host else {}
    if grows_to:
        head |= _autoscaling(folder, port, grows_to)
    cluster = Cluster(initialize_head=True, head_node_args=head | known)
    nodes: dict[str, Any] = {}
    print("answer", cluster.address, flush=True)
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        if verb == "add":
            node = cluster.add_node(num_cpus=arguments[0], resources=arguments[1], temp_dir=folder, **known)
            nodes[node.node_id] = node
            print("answer", node.node_id, flush=True)
        else:
            cluster.remove_node(nodes.pop(arguments[0]), allow_graceful=False)
            print("answer", "removed", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
