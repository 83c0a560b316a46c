"""A soak of mixed edits: the memory of front end and worker has no slope."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.live import LiveServer

EDITS = 6000
WARM_UP = 2000  # until the caches of embeddings and encoded images, and the allocator's arenas, have their size
CLIENTS = 4
SAMPLE_EVERY = 20  # edits
LIMIT_BYTES = 300  # for each edit
PROMPTS = 50  # then they repeat, so that the worker's cache of embeddings stops growing

Kind = tuple[dict[str, str], dict[str, str]]  # the fields, and the sample files by field name
KINDS: tuple[Kind, ...] = (
    ({}, {"image": "red_circle.png"}),
    ({}, {"image": "red_circle.png", "mask": "mask_alpha.png"}),
    ({"mask_blur": "8"}, {"image": "red_circle.png", "mask": "mask_white.png"}),
    ({"size": "200x120", "output_format": "jpeg"}, {"image": "rotated_star.jpg"}),
    ({"n": "2", "output_format": "webp"}, {"image": "red_circle.png", "mask": "mask_alpha.png"}),
    ({"stream": "true", "partial_images": "2", "num_inference_steps": "4"}, {"image": "red_circle.png"}),
    ({"quality": "low", "size": "128x128"}, {"image": "pair.webp"}),
    ({"response_format": "url"}, {"image": "red_circle.png", "mask": "mask_white.png"}),
    ({"strength": "0"}, {"image": "rotated_star.jpg"}),
    ({"prompt": "too many words " * 60, "truncate_prompt": "false"}, {"image": "red_circle.png"}),  # refused
)
REFUSED = len(KINDS) - 1


def anonymous_bytes(pid: int) -> int:
    """Return the resident memory of a process without files and shared memory, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def soak(live: LiveServer, data: Path, edits: int, note: Callable[[int, dict[str, int]], None]) -> None:
    """Send mixed edits with CLIENTS clients; call `note` with the number of edits and the memory now and then."""
    files = {name: (data / name).read_bytes() for _, parts in KINDS for name in parts.values()}
    numbers = itertools.count()
    limits = httpx.Limits(max_connections=CLIENTS)
    with httpx.Client(base_url=live.url, timeout=120, limits=limits) as client:

        def send(_: int) -> None:
            number = next(numbers)
            kind = number % len(KINDS)
            fields, parts = KINDS[kind]
            prompt = f"a green circle on a blue background {number % PROMPTS}"
            reply = client.post(
                "/v1/images/edits",
                data={"prompt": prompt, "num_inference_steps": "2", **fields},
                files={field: (name, files[name]) for field, name in parts.items()},
            )
            assert reply.status_code == (400 if kind == REFUSED else 200), reply.text
            assert b'"type": "error"' not in reply.content
            if number % SAMPLE_EVERY == 0:
                (worker,) = live.workers()
                note(number, {"front end": anonymous_bytes(live.process.pid), "worker": anonymous_bytes(worker)})

        with ThreadPoolExecutor(CLIENTS) as pool:
            for _ in pool.map(send, range(edits)):
                pass


def slope(samples: list[tuple[int, int]]) -> float:
    """Return the bytes by which memory grows with each edit: the least-squares line through the samples."""
    numbers, sizes = np.array(samples, float).T
    return float(np.polyfit(numbers, sizes, 1)[0])


@pytest.mark.heavy
def test_memory_has_no_slope_over_many_mixed_edits(tmp_path: Path, data: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {"front end": [], "worker": []}

    def note(number: int, sizes: dict[str, int]) -> None:
        for name, size in sizes.items():
            seen[name].append((number, size))
        if number % 500 == 0:
            print(json.dumps({"edits": number, **sizes}), flush=True)

    # A small store, so that the front end's list of kept pictures stops growing before the measurement.
    arguments = ["--store_dir", str(tmp_path / "store"), "--store_bytes", str(1 << 20)]
    with LiveServer(*arguments, spool=tmp_path / "spool", environment=_environment()) as live:
        soak(live, data, EDITS, note)
    found: dict[str, Any] = {
        name: slope([each for each in samples if each[0] >= WARM_UP]) for name, samples in seen.items()
    }
    for name, value in found.items():
        print(f"{name}: {value:+.0f} bytes an edit from edit {WARM_UP} to {EDITS}")
    assert max(found.values()) <= LIMIT_BYTES, found


def _environment() -> dict[str, str]:
    """Return the variables of the server: MALLOC_ARENA_MAX and others may be set for a comparison by hand."""
    return {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
