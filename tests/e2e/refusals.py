"""Send uploads that are refused early, and count how often the client reads the answer.

Usage: python refusals.py CLIENT URL KEY BYTES COUNT STATUS, with CLIENT one of requests, httpx, aiohttp, curl. Writes
one JSON object to standard output: how many requests were `answered` with STATUS, and what came instead (`lost`). Needs
only the client that it is asked for.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable

TIMEOUT_S = 120


def with_requests(url: str, key: str, size: int) -> Callable[[], int]:
    """Return a function that uploads once and returns the status."""
    import requests

    def upload() -> int:
        files = {"image": ("a.png", bytes(size), "image/png")}
        headers = {"Authorization": f"Bearer {key}"}
        return requests.post(url, files=files, headers=headers, timeout=TIMEOUT_S).status_code

    return upload


def with_httpx(url: str, key: str, size: int) -> Callable[[], int]:
    """Return a function that uploads once and returns the status."""
    import httpx

    def upload() -> int:
        files = {"image": ("a.png", bytes(size), "image/png")}
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(url, files=files, headers=headers, timeout=TIMEOUT_S).status_code

    return upload


def with_aiohttp(url: str, key: str, size: int) -> Callable[[], int]:
    """Return a function that uploads once and returns the status."""
    import aiohttp

    async def upload() -> int:
        form = aiohttp.FormData()
        form.add_field("image", bytes(size), filename="a.png", content_type="image/png")
        timeout = aiohttp.ClientTimeout(TIMEOUT_S)
        headers = {"Authorization": f"Bearer {key}"}
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(url, data=form, headers=headers) as r,
        ):
            await r.read()
            return r.status

    return lambda: asyncio.run(upload())


def with_curl(url: str, key: str, size: int) -> Callable[[], int]:
    """Return a function that uploads once and returns the status."""
    file = tempfile.NamedTemporaryFile()  # noqa: SIM115 - it exists as long as this process
    file.truncate(size)
    # Without `Expect:`, curl would ask before it sends, and never send a refused body.
    command = ["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "-m", str(TIMEOUT_S), "-H", "Expect:"]
    command += ["-H", f"Authorization: Bearer {key}", "-F", f"image=@{file.name}", url]

    def upload() -> int:
        assert not file.closed
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(done.stderr.strip())
        return int(done.stdout)

    return upload


CLIENTS = {"requests": with_requests, "httpx": with_httpx, "aiohttp": with_aiohttp, "curl": with_curl}


def main(name: str, url: str, key: str, size: str, count: str, status: str) -> None:
    """Upload `count` times, one after the other, each on a new connection."""
    upload = CLIENTS[name](url, key, int(size))
    answered, lost = 0, Counter[str]()
    for _ in range(int(count)):
        try:
            found = upload()
        except Exception as error:  # noqa: BLE001 - whatever the client makes of a lost answer
            lost[f"{type(error).__name__}: {error}"[:200]] += 1
            continue
        if found == int(status):
            answered += 1
        else:
            lost[f"status {found}"] += 1
    print(json.dumps({"answered": answered, "lost": lost}))


if __name__ == "__main__":
    main(*sys.argv[1:])
