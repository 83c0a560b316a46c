"""A client whose jobs kill workers, or take long to prepare, beside other clients."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import httpx
from PIL import Image

from tests.faultserver import FaultServer, picture_of

HOSTILE, INNOCENT = "127.0.0.2", "127.0.0.3"
TUNING = ("--threads", "1", "--streams", "1", "--max_batch", "2")


def client_at(server: FaultServer, address: str) -> httpx.Client:
    transport = httpx.HTTPTransport(local_address=address)
    return httpx.Client(base_url=f"http://127.0.0.1:{server.port}", transport=transport, timeout=120)


def test_client_that_kills_workers_is_slowed_down_and_the_model_serves_the_others(tmp_path: Path) -> None:
    with FaultServer(tmp_path, "--crash_loop_limit", "3") as server:

        def kill() -> None:
            with client_at(server, HOSTILE) as client:
                statuses.append(server.generate(client, "exit 9").status_code)

        statuses: list[int] = []
        attackers = [threading.Thread(target=kill) for _ in range(4)]
        for attacker in attackers:
            attacker.start()
        server.until(lambda: bool(server.logged("its next job is delayed", f"client={HOSTILE}")))
        with client_at(server, INNOCENT) as client:
            for number in range(5):
                assert picture_of(server.generate(client, f"echo {number}"))
        for attacker in attackers:
            attacker.join()
        assert statuses == [500] * 4
        # Each job twice, the second time alone; the first times may have been one.
        assert 5 <= len(server.logged("fleet.supervisor: worker died")) <= 8
        assert not server.logged("model failed")


def flat(pixels: tuple[int, int], colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", pixels, colour).save(buffer, "JPEG")
    return buffer.getvalue()


def test_heavy_edits_run_beside_small_ones_of_others_and_not_before_them(tmp_path: Path, data: Path) -> None:
    heavy = {"image": ("image", flat((3000, 3000), (9, 99, 9))), "mask": ("mask", flat((3000, 3000), (255, 255, 255)))}
    small = {"image": ("image", (data / "red_circle.png").read_bytes())}
    values = {"prompt": "a red circle", "num_inference_steps": "2", "strength": "0.7"}
    done: list[str] = []
    with FaultServer(tmp_path, *TUNING, real=True) as server:

        def edit(name: str, address: str, files: dict[str, tuple[str, bytes]]) -> None:
            with client_at(server, address) as client:
                assert picture_of(client.post("/v1/images/edits", data=values, files=files))
                done.append(name)

        edit("warm", INNOCENT, small)
        senders = [threading.Thread(target=edit, args=("heavy", f"127.0.0.{4 + number}", heavy)) for number in range(3)]
        for sender in senders:
            sender.start()
        server.until(lambda: server.model_status()["running"] >= 2)
        for _ in range(2):
            edit("small", INNOCENT, small)
        for sender in senders:
            sender.join()
    # By turns and without a thread of its own, the last small edit would be done after all of the heavy ones.
    assert done[1:].index("small") <= 1
    assert done[1:4].count("small") == 2
    assert done.count("heavy") == 3
