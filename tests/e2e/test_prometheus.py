"""Prometheus scrapes a server under load, with the rules of scripts/deploy."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live import BUILTIN_NAME, LiveServer
from tests.proxies import free_port

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(
        not shutil.which("prometheus"), reason="prometheus is not installed: scripts/test-all extracts it"
    ),
]

RULES = Path(__file__).parents[2] / "scripts" / "deploy" / "alerts.yml"
LOAD_S = 60.0
START_S = 30.0
_CONFIG = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: ovserve
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""


@contextmanager
def prometheus(folder: Path, port: int) -> Iterator[httpx.Client]:
    """Run Prometheus; yield a client of its API."""
    own, config = free_port(), folder / "prometheus.yml"
    config.write_text(_CONFIG.format(rules=RULES, port=port))
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    process = subprocess.Popen(
        [*command, f"--web.listen-address=127.0.0.1:{own}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{own}", timeout=30) as client:
            until = time.monotonic() + START_S
            while True:
                try:
                    if client.get("/-/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.1)
            yield client
    finally:
        process.terminate()
        process.wait(START_S)


def test_scrapes_and_rules_work_under_load(tmp_path: Path) -> None:
    with LiveServer() as server, prometheus(tmp_path, server.port) as api:

        def value(query: str) -> float:
            found: Any = api.get("/api/v1/query", params={"query": query}).json()["data"]["result"]
            assert len(found) == 1, (query, found)
            return float(found[0]["value"][1])

        ending, served = threading.Event(), [0, 0, 0, 0]

        def load(number: int) -> None:
            with httpx.Client(base_url=server.url, timeout=60) as client:
                while not ending.is_set():
                    fields = {"prompt": "a red star", "size": "64x64", "steps": 2}
                    assert client.post("/v1/images/generations", json=fields).status_code == 200
                    served[number] += 1

        threads = [threading.Thread(target=load, args=(number,)) for number in range(len(served))]
        for thread in threads:
            thread.start()
        time.sleep(LOAD_S)
        ending.set()
        for thread in threads:
            thread.join()
        time.sleep(3)  # for the scrapes after the last request
        scrapes, failed = value("count_over_time(up[5m])"), value("count_over_time(up[5m]) - sum_over_time(up[5m])")
        assert scrapes >= LOAD_S / 2
        assert failed == 0
        selector = f'model="{BUILTIN_NAME}",outcome="ok"'
        assert value(f"ovserve_request_seconds_count{{{selector}}}") == sum(served)
        assert value(f"ovserve_pictures_total{{model='{BUILTIN_NAME}'}}") == sum(served)
        slow = value(f"histogram_quantile(0.95, sum by (le) (rate(ovserve_request_seconds_bucket{{{selector}}}[1m])))")
        assert 0 < slow < 60
        groups = api.get("/api/v1/rules").json()["data"]["groups"]
        assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
        alerts = [alert["labels"]["alertname"] for alert in api.get("/api/v1/alerts").json()["data"]["alerts"]]
        assert alerts == []
        print(f"{scrapes:.0f} scrapes, {sum(served)} pictures, scrape {value('scrape_duration_seconds') * 1000:.1f} ms")
