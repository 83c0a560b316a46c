"""A node of a cluster behind a slow network: in a network namespace of its own, joined to this one packet by packet.

    this namespace ── TUN device ── thread: each packet waits `delay_s` ── TUN device ── namespace with the node

Every port of Ray is delayed, or cut off, without a filter in the kernel. Needs root, `ip` and /dev/net/tun.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.raycluster import RayCluster

__all__ = ["HEAD_HOST", "FarNode", "missing"]

HEAD_HOST, _NODE_HOST = "198.18.77.1", "198.18.77.2"  # RFC 2544: a network for measurements
_TUNSETIFF, _TUN_WITHOUT_HEADER = 0x400454CA, 0x1001
_PACKET_BYTES = 65536
_MOST_WAITING = 20000  # packets in one direction; a router with less drops them too
_STOP_TIMEOUT_S = 30.0


def missing() -> str:
    """Return why this machine cannot make namespaces, or ""."""
    if os.geteuid() or not shutil.which("ip"):
        return "needs root and the program ip"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        return f"/dev/net/tun: {error.strerror}"
    name = f"ovs-{secrets.token_hex(4)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return made.stderr.strip()
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


class FarNode:
    """The namespace and the network; `start` starts a node of a cluster in it.

    Make it before the cluster, whose head has to listen on HEAD_HOST.

    Attributes:
        delay_s: of each packet, in each direction.
        is_cut: packets are dropped.
    """

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.is_cut = False
        self._space = f"ovs-{secrets.token_hex(4)}"
        self._node: subprocess.Popen[bytes] | None = None
        _ip("netns", "add", self._space)
        self._near, near = _tun()
        self._far, far = _tun()
        _ip("address", "add", f"{HEAD_HOST}/24", "dev", near)
        _ip("link", "set", near, "up")
        _ip("link", "set", far, "netns", self._space)
        _ip("-n", self._space, "address", "add", f"{_NODE_HOST}/24", "dev", far)
        for name in (far, "lo"):
            _ip("-n", self._space, "link", "set", name, "up")
        self._ended = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._carry, name="far node", daemon=True)
        self._thread.start()

    def start(self, cluster: RayCluster, cpus: int = 2, own: Path | None = None, **variables: str) -> None:
        """Start the node, with the resource `far`. Returns at once.

        Args:
            cluster: that it joins.
            cpus: its processors.
            own: a directory that is empty on this node, and no other machine's.
            variables: of its environment.
        """
        command = ["ip", "netns", "exec", self._space]  # with a mount namespace of its own
        if own is not None:
            command += ["sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"', str(own)]
        command += [sys.executable, "-W", "ignore", "-m", "ray.scripts.scripts", "start"]
        command += ["--address", cluster.address, "--node-ip-address", _NODE_HOST, "--num-cpus", str(cpus)]
        command += ["--resources", '{"far": 10}', "--object-store-memory", str(100 << 20), "--block"]
        self._node = subprocess.Popen(
            [*command, "--disable-usage-stats"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | cluster.environment | variables,
            start_new_session=True,
        )

    def await_end(self, timeout_s: float) -> None:
        """Wait until the node has ended by itself, as one does that the head has given up."""
        assert self._node
        self._node.wait(timeout_s)

    def close(self) -> None:
        """End the node, the network and the namespace."""
        self._kill_node()
        os.eventfd_write(self._ended, 1)
        self._thread.join()
        for descriptor in (self._near, self._far, self._ended):
            os.close(descriptor)
        _ip("netns", "del", self._space)

    def _kill_node(self) -> None:
        """Kill what runs in the namespace: `ray start` does not end in time without the head of its cluster."""
        if self._node is None:
            return
        found = subprocess.run(["ip", "netns", "pids", self._space], check=True, capture_output=True, text=True)
        for pid in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        self._node.wait(_STOP_TIMEOUT_S)

    def _carry(self) -> None:
        """Carry packets both ways until the end."""
        others = {self._near: self._far, self._far: self._near}
        waiting: dict[int, deque[tuple[float, bytes]]] = {self._near: deque(), self._far: deque()}
        while True:
            dues = [packets[0][0] for packets in waiting.values() if packets]
            timeout_s = max(0.0, min(dues) - time.monotonic()) if dues else None
            ready = select.select([self._near, self._far, self._ended], [], [], timeout_s)[0]
            if self._ended in ready:
                return
            now = time.monotonic()
            for each in ready:
                packet = os.read(each, _PACKET_BYTES)
                if not self.is_cut and len(waiting[others[each]]) < _MOST_WAITING:
                    waiting[others[each]].append((now + self.delay_s, packet))
            for target, packets in waiting.items():
                while packets and packets[0][0] <= now:
                    packet = packets.popleft()[1]
                    if not self.is_cut:
                        with contextlib.suppress(OSError):  # the device's queue is full
                            os.write(target, packet)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _tun() -> tuple[int, str]:
    """Return a new TUN device: its descriptor and its name. It exists until the descriptor is closed."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    made = fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", b"ovs%d", _TUN_WITHOUT_HEADER))
    return descriptor, made[:16].rstrip(b"\0").decode()
