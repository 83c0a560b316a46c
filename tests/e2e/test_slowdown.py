"""The comparison of two benchmark results finds a real slowdown of a live server."""

from __future__ import annotations

from pathlib import Path

from benchmarks import compare
from benchmarks.edits import parse_kind
from benchmarks.load import Load, Target, apply_load
from benchmarks.results import Result
from tests.live import LiveServer


def test_a_sleep_in_the_hot_path_of_the_server_is_a_regression(tmp_path: Path) -> None:
    kind = parse_kind("edit:num_inference_steps=2;strength=0.7")
    paths = []
    for label, module in (("old", ("ovserve",)), ("new", ("benchmarks.slowed", "0.3"))):
        with LiveServer(module=module) as server:
            report = apply_load(
                Target(server.url), Load(clients=1, seconds=30, warm_up_s=0.5, requests=20, kinds=[kind])
            )
        assert report.outcomes() == {"200": len(report.samples)}
        result = Result(label, {"date": "2026-01-02T00:00:00+00:00", "commit": "0123456789", "busy": False})
        result.add("latency", report.latencies(), unit="s", better="lower", case={"server": "a"})
        paths.append(str(result.save(tmp_path / f"{label}.json")))
    assert compare.main(paths) == 1
    assert compare.main([paths[0], paths[0]]) == 0
