"""`ray_address = local`: a cluster for one server, on 127.0.0.1 alone, that ends with it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.faultserver import FaultServer, picture_of

LISTEN, LOOPBACK_4, LOOPBACK_6 = "0A", "0100007F", "0000000000000000FFFF00000100007F"


def descendants_of(pid: int) -> set[int]:
    """Return the ids of all processes below one, whatever started them."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def listening_addresses(pids: set[int]) -> set[str]:
    """Return the addresses, as the kernel writes them, on which these processes listen for TCP."""
    sockets = set()
    for pid in pids:
        for path in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(os.readlink(path))
            except OSError:
                continue
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == LISTEN and f"socket:[{row[9]}]" in sockets}


@pytest.mark.heavy
def test_cluster_of_one_server_is_on_loopback_and_ends_with_it(tmp_path: Path) -> None:
    with FaultServer(tmp_path, "--pool", "ray") as server, server.client() as client:
        assert picture_of(server.generate(client, "echo x")).startswith(b"echo x")
        processes = descendants_of(server.process.pid)
        found = listening_addresses(processes)
        assert found
        assert found <= {LOOPBACK_4, LOOPBACK_6}
        folders = list(Path(tempfile.gettempdir()).glob("ovserve-ray-*"))
        assert folders
    server.until(lambda: not any(os.path.exists(f"/proc/{pid}/exe") for pid in processes))
    assert not any(folder.exists() for folder in folders)
