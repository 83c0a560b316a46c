"""Memory of the front end and the worker over many edits."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest

from tests.live import LiveServer, resident_bytes

PROMPTS = 200  # then they repeat: the worker keeps 23 kB for each prompt until its cache of embeddings (64 MiB) is full
FREED_TIMEOUT_S = 20.0
SLACK_BYTES = 12 * 1024 * 1024  # for the allocator's variation; a leaked 128x128 picture for each edit would be 9 MB


# In the heavy case a leak of 4.5 kB for each edit exceeds the slack.
@pytest.mark.parametrize(("warm_up", "edits"), [(20, 200), pytest.param(PROMPTS, 3000, marks=pytest.mark.heavy)])
def test_memory_stays_flat_over_many_edits(warm_up: int, edits: int, tmp_path: Path, data: Path) -> None:
    with LiveServer(spool=tmp_path) as live, httpx.Client(base_url=live.url, timeout=60) as client:
        (worker,) = live.workers()
        processes = {"front end": live.process.pid, "worker": worker}
        image, mask = (data / "red_circle.png").read_bytes(), (data / "mask_alpha.png").read_bytes()
        seen: dict[str, list[int]] = {name: [] for name in processes}
        for number in range(edits):
            files = {"image": ("a.png", image), **({"mask": ("m.png", mask)} if number % 3 == 0 else {})}
            fields = {
                "prompt": f"a green circle on a blue background {number % PROMPTS}",
                "num_inference_steps": "4",
                "size": ("auto", "200x120")[number % 2],
            }
            assert client.post("/v3/images/edits", data=fields, files=files).status_code == 200
            for name, pid in processes.items():
                seen[name].append(resident_bytes(pid))
        for name, sizes in seen.items():
            grown = max(sizes[-20:]) - max(sizes[warm_up : warm_up + 20])
            print(
                f"{name}: {sizes[warm_up] / 1e6:.1f} MB after {warm_up} edits, "
                f"{sizes[-1] / 1e6:.1f} MB after {edits}, {grown / 1e6:+.1f} MB"
            )
            assert grown <= SLACK_BYTES, f"{name} grew by {grown} bytes"
        deadline = time.monotonic() + FREED_TIMEOUT_S
        while "\novserve_spool_bytes 0.0\n" not in client.get("/metrics").text:  # freed after the client has its reply
            assert time.monotonic() < deadline, "the spool is not freed"
        left = [
            path.name for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(("lock", "warm-"))
        ]
        assert not left, "segments left in the spool"
