"""The head of a cluster is replaced by that of another one: what Ray says, and what the bridge makes of it."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest

from ovserve.errors import ClusterLost, LaunchError
from ovserve.wire.local.pipes import open_link
from ovserve.wire.local.spool import Spool
from ovserve.wire.ray.bridge import Bridge, Order
from ovserve.wire.ray.launcher import RayProcess

pytestmark = pytest.mark.processes

OTHER = "RPC error: failed with WrongClusterID: expected ab, got cd"


class Replaced:
    """A connection to a cluster in whose place another one has come."""

    def start(self, *_: object) -> NoReturn:
        raise ClusterLost("another cluster has come in the place of this one")


def test_worker_that_another_cluster_refuses_ends_the_bridge_and_is_no_crash(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, leak_guard: None
) -> None:
    caplog.set_level(logging.ERROR)
    spool = Spool(tmp_path, 1 << 20)
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    own, status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link, end = open_link(multiprocessing.get_context("spawn"), "toy", 0, 0)
    order = Order("toy/0#0", b"", 1.0, 0, {}, 60.0)
    ends = [end.commands.fileno(), end.reports.fileno(), status.fileno()]
    socket.send_fds(control, [pickle.dumps(order)], ends)
    end.close()
    status.close()
    process = RayProcess("toy/0#0", own)
    bridge = Bridge(theirs, "10.0.0.1:6379", spool.worker_blobs())
    bridge._cluster = Replaced()  # type: ignore[assignment]
    assert not all(bridge._turn() for _ in range(60)), "it serves on"  # a turn takes a second at most
    lost = [record for record in caplog.records if record.getMessage() == "Ray cluster lost"]
    assert [vars(record)["fields"]["why"] for record in lost] == ["another cluster has come in the place of this one"]
    workers = list(bridge._workers.values())
    bridge._end()
    for worker in workers:
        worker.join(30)
        assert worker.has_ended
        worker.status.close()
    assert not process.is_alive()
    assert process.was_lost(), "a model must not fail for it"
    del bridge, workers, worker
    for each in (link, process, control, spool):
        each.close()


def test_error_that_names_another_cluster_is_told_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from ovserve.wire.ray import cluster

    answer: dict[str, Exception] = {}

    def fail(*_: object, **__: Mapping[str, Any]) -> NoReturn:
        raise answer["error"]

    monkeypatch.setattr(cluster.ray, "remote", fail)
    monkeypatch.setattr(cluster.ray, "get_runtime_context", fail)
    connection = cluster.Cluster("10.0.0.1:6379")
    answer["error"] = cluster.RayError(OTHER)
    with pytest.raises(ClusterLost, match="another cluster has come in the place of this one"):
        connection.start("toy", b"", 1.0, 0, {})
    assert connection.draining() is None
    answer["error"] = cluster.RayError("the head is away")
    with pytest.raises(LaunchError, match="RayError: the head is away") as caught:
        connection.start("toy", b"", 1.0, 0, {})
    assert not isinstance(caught.value, ClusterLost)
    with pytest.raises(LaunchError, match="the head is away"):
        connection.draining()
