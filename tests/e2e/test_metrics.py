"""What operators see of a server that has served a few requests: metrics, usage log, log lines, stacks."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.live import BUILTIN_NAME, LiveServer
from tests.promtext import Samples, await_samples, sample

DATA = Path(__file__).parents[1] / "data"
ROUTE = "/images/generations"
PROMPT = "a very secret prompt"


class Served:
    """A server that has served two pictures in one request, a refused request, a stream and a wrong one."""

    def __init__(self, folder: Path) -> None:
        self.usage, keys = folder / "usage.jsonl", folder / "keys.toml"
        limited, self.unlimited_key = (
            subprocess.run(
                [sys.executable, "-m", "ovserve", "key", "add", *words, "--file", str(keys)],
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
            ).stdout.strip()
            for words in (("design", "--pictures_per_minute", "3"), ("unlimited",))
        )
        options = ["--named_keys_file", str(keys), "--usage_log", str(self.usage), "--admin_key", "operator"]
        self.server = LiveServer(*options)
        authorized = {"Authorization": f"Bearer {limited}"}
        self.client = httpx.Client(base_url=self.server.url, timeout=60, headers=authorized)

    def ask(self, **fields: object) -> httpx.Response:
        body = {"prompt": PROMPT, "size": "64x64", "steps": 2, **fields}
        return self.client.post(f"/v1{ROUTE}", json=body)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("served"))
    with made.server, made.client:
        assert made.ask(n=2).status_code == 200
        assert made.ask(n=2).status_code == 429
        assert "completed" in made.ask(stream=True).text
        assert made.ask(size="x").status_code == 400
        yield made


@pytest.fixture(scope="module")
def samples(served: Served) -> Samples:
    last = sample("ovserve_request_seconds_count", route=ROUTE, model="", outcome="client_error")
    rows = sample("ovserve_device_rows_total", model=BUILTIN_NAME)
    return await_samples(served.client, lambda found: found.get(last) == 1 and found.get(rows, 0) >= 12)


def test_requests_are_observed_by_route_model_and_outcome(samples: Samples) -> None:
    for name in ("ovserve_request_seconds_count", "ovserve_headers_seconds_count"):
        assert samples[sample(name, route=ROUTE, model=BUILTIN_NAME, outcome="ok")] == 2
        assert samples[sample(name, route=ROUTE, model=BUILTIN_NAME, outcome="rate_limited")] == 1
        assert samples[sample(name, route=ROUTE, model="", outcome="client_error")] == 1
    bounds = {dict(labels)["le"] for name, labels in samples if name == "ovserve_request_seconds_bucket"}
    assert {"0.01", "600.0", "+Inf"} <= bounds
    assert samples[sample("ovserve_received_bytes_total", route=ROUTE)] > 4 * len(PROMPT)
    assert samples[sample("ovserve_sent_bytes_total", route=ROUTE)] > 2000


def test_jobs_are_observed_by_stage(samples: Samples) -> None:
    for stage in ("queue", "prepare", "denoise", "finish"):
        key = sample("ovserve_stage_seconds_count", model=BUILTIN_NAME, stage=stage, route=ROUTE, state="done")
        assert samples[key] == 2
    assert samples[sample("ovserve_denoise_step_seconds_count", model=BUILTIN_NAME)] == 2
    steps = samples[sample("ovserve_denoise_step_seconds_sum", model=BUILTIN_NAME)]
    denoise = sample("ovserve_stage_seconds_sum", model=BUILTIN_NAME, stage="denoise", route=ROUTE, state="done")
    assert steps == pytest.approx(samples[denoise] / 2)
    assert samples[sample("ovserve_pictures_total", model=BUILTIN_NAME)] == 3
    assert samples[sample("ovserve_pixels_total", model=BUILTIN_NAME)] == 3 * 64 * 64


def test_workers_are_observed(samples: Samples) -> None:
    calls = samples[sample("ovserve_device_calls_total", model=BUILTIN_NAME)]
    assert 2 <= calls <= samples[sample("ovserve_device_rows_total", model=BUILTIN_NAME)]
    hits = samples[sample("ovserve_cache_lookups_total", model=BUILTIN_NAME, cache="prompt", result="hits")]
    assert hits >= 1  # the stream has the prompt of the request before it
    assert samples[sample("ovserve_job_retries_total", model=BUILTIN_NAME)] == 0
    assert samples[sample("ovserve_worker_deaths_total", model=BUILTIN_NAME, cause="crash")] == 0
    assert samples[sample("ovserve_process_memory_bytes", process="server")] > 1 << 20
    assert samples[sample("ovserve_process_memory_bytes", process=f"{BUILTIN_NAME}/0")] > 1 << 20
    assert samples[sample("process_open_fds")] > 5
    assert any(name == "ovserve_build_info" and dict(labels)["version"] for name, labels in samples)


def test_keys_are_observed(samples: Samples) -> None:
    assert samples[sample("ovserve_key_requests_total", key="design", outcome="ok")] == 2
    assert samples[sample("ovserve_key_requests_total", key="design", outcome="rate_limited")] == 1
    assert samples[sample("ovserve_key_pictures_total", key="design")] == 3
    assert samples[sample("ovserve_key_pixels_total", key="design")] == 3 * 64 * 64


@pytest.mark.usefixtures("samples")
def test_usage_log_has_one_line_for_each_request_with_a_model(served: Served) -> None:
    text = served.usage.read_text("utf-8")
    first, refused, stream = map(json.loads, text.splitlines())
    assert (first["key"], first["model"], first["outcome"], first["job"]) == ("design", BUILTIN_NAME, "ok", "done")
    assert (first["pictures"], first["pixels"], first["steps"], first["status"]) == (2, 2 * 64 * 64, 2, 200)
    assert 0 < first["denoise_ms"] <= first["total_ms"]
    assert (refused["outcome"], refused["pictures"], refused["status"]) == ("rate_limited", 0, 429)
    assert (stream["pictures"], stream["route"]) == (1, ROUTE)
    assert PROMPT not in text


@pytest.mark.usefixtures("samples")
def test_access_line_has_the_times_of_the_stages(served: Served) -> None:
    line = next(line for line in list(served.server.log) if f"POST /v1{ROUTE} 200" in line)
    for name in ("queue_ms=", "prepare_ms=", "denoise_ms=", "finish_ms=", "pictures=2", "key_name=design"):
        assert name in line
    assert PROMPT not in "\n".join(served.server.log)


def test_sigusr1_writes_the_stacks_of_all_threads_of_all_processes(served: Served) -> None:
    def stacks(process: str) -> list[str]:
        return [line for line in list(served.server.log) if " WARNING stacks: stack " in line and process in line]

    # A WebP file is decoded in a process of its own, which stays.
    files = {"image": ("a.webp", (DATA / "pair.webp").read_bytes(), "image/webp")}
    key = {"Authorization": f"Bearer {served.unlimited_key}"}
    made = served.client.post("/v1/images/edits", data={"prompt": PROMPT}, files=files, headers=key)
    assert made.status_code == 200
    served.server.signal(signal.SIGUSR1)
    until = time.monotonic() + 30
    worker = f'process="worker of {BUILTIN_NAME}" pid={served.server.workers()[0]}'
    while not (any("thread=device" in line for line in stacks(worker)) and stacks("process=server")):
        assert time.monotonic() < until
        time.sleep(0.02)
    while not stacks(f'process="decoder of worker {served.server.workers()[0]}"'):
        assert time.monotonic() < until
        time.sleep(0.02)
    decoder = "\n".join(stacks('process="decoder of'))
    assert re.search(r"thread=MainThread stack=.*pixels/decoder_process.py:\d+ main", decoder), decoder
    front = "\n".join(stacks("process=server"))
    for thread, where in (
        ("MainThread", "server.py:"),
        ("dispatcher", "dispatch/dispatcher.py:"),
        ("accept", "front/listener.py:"),
    ):
        assert re.search(rf"thread={thread} stack=.*{where}\d+ \w", front), front
    assert served.ask(n=1).status_code in (200, 429)


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_promtool_accepts_the_page(served: Served) -> None:
    page = served.client.get("/metrics").text
    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
