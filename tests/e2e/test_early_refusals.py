"""A client that is refused while it uploads reads the refusal: 413 for a body over the limit, 401 for a wrong key."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.faultserver import FaultServer

ROOT = Path(__file__).parents[2]
NODE = ROOT / ".venv" / "node"  # made by scripts/test
KEY = "sk-right"
REFUSALS = {413: KEY, 401: "sk-wrong"}  # status to the key that is sent
MB = 1_000_000
PYTHONS = {"requests": ROOT / ".venv" / "litellm" / "bin" / "python", "httpx": Path(sys.executable)}
PYTHONS |= {"aiohttp": PYTHONS["requests"], "curl": PYTHONS["httpx"]}
CLIENTS = ("fetch", "openai-node", "requests", "httpx", "aiohttp", "curl")


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, str]]:
    """Start a server for each status, with an API key and toy workers; yield their URLs."""
    environment = {"OVSERVE_API_KEY": KEY}
    with ExitStack() as stack:
        found = {}
        for status, limit in ((413, MB), (401, 1000 * MB)):
            spool = tmp_path_factory.mktemp("spool")
            live = FaultServer(spool, "--max_body_bytes", str(limit), environment=environment)
            found[status] = stack.enter_context(live).url
        yield found


def upload(url: str, client: str, status: int, size: int, count: int) -> dict[str, Any]:
    """Upload `count` times with a client in its own process; return what it has counted."""
    arguments = [f"{url}/v1/images/edits", REFUSALS[status], str(size), str(count), str(status)]
    script = Path(__file__).with_name("refusals.py")
    command = [str(PYTHONS.get(client, "")), str(script), client]
    if client not in PYTHONS:
        node = NODE / "node_modules" / ".bin" / "node"
        script = Path(__file__).parent / "node" / "refusals.mjs"
        command = [str(node), str(script), str(NODE), client.removesuffix("-node")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("status", REFUSALS)
@pytest.mark.parametrize("client", ["fetch", "httpx"])
def test_no_refusal_of_an_upload_is_lost(urls: dict[int, str], client: str, status: int) -> None:
    assert upload(urls[status], client, status, 5 * MB, 20) == {"answered": 20, "lost": {}}


@pytest.mark.heavy
@pytest.mark.parametrize(("size", "count"), [(5 * MB, 250), (50 * MB, 25), (300 * MB, 5)])
@pytest.mark.parametrize("status", REFUSALS)
@pytest.mark.parametrize("client", CLIENTS)
def test_no_refusal_of_many_uploads_is_lost(
    urls: dict[int, str], client: str, status: int, size: int, count: int
) -> None:
    found = upload(urls[status], client, status, size, count)
    print(f"{client} {status}, {size // MB} MB: {found['answered']} of {count} answered, lost: {found['lost']}")
    assert found == {"answered": count, "lost": {}}
