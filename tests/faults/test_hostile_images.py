"""Hostile image files sent by one client, beside another client's ordinary edits, with the real engine."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests import imagefiles as files
from tests.faultserver import FaultServer, picture_of
from tests.imagefiles import png_chunk
from tests.live import children_of

PROMPT = "a green circle on a blue background"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    tuning = ("--threads", "1", "--streams", "1", "--max_batch", "2")
    with FaultServer(tmp_path_factory.mktemp("spool"), *tuning, real=True) as server:
        server.until(lambda: server.model_status()["workers"] == 1, patience_s=60)
        yield server
        assert server.stop() == 0
        assert not server.logged("Traceback")


def edit(live: FaultServer, image: bytes, address: str = "127.0.0.1", mask: bytes | None = None) -> httpx.Response:
    parts = {"image": ("image", image)} | ({} if mask is None else {"mask": ("mask", mask)})
    transport = httpx.HTTPTransport(local_address=address)
    with httpx.Client(base_url=f"http://127.0.0.1:{live.port}", transport=transport, timeout=120) as client:
        values = {"prompt": PROMPT, "strength": "0.7", "seed": "1", "num_inference_steps": "2"}
        return client.post("/v1/images/edits", data=values, files=parts)


def test_hostile_files_cost_their_sender_an_error_and_others_nothing(live: FaultServer, data: Path) -> None:
    ordinary = (data / "red_circle.png").read_bytes()
    undisturbed = picture_of(edit(live, ordinary))
    workers = live.workers()
    hostile = [
        (data / "bombs" / "scan100.jpg").read_bytes(),
        files.png(between=png_chunk(b"IDAT") * 100_000),
        files.png(before=png_chunk(b"iCCP", b"a\0\0" + bytes(8)) * 1000),
        files.tiff({273: (4, [16] * 250_000), 279: (4, [1] * 250_000), 278: (4, [1])}),
        files.bmp_rle(b"\xff\5" * 5 + b"\0\2\0\0" * 500_000),
        files.gif(before=b"\x21\xfe" + b"\1a" * 100_000 + b"\0"),
    ]
    replies: list[httpx.Response] = []

    def attack(content: bytes) -> None:
        replies.extend([edit(live, content, "127.0.0.2"), edit(live, ordinary, "127.0.0.2", mask=content)])

    attackers = [threading.Thread(target=attack, args=(content,)) for content in hostile]
    for attacker in attackers:
        attacker.start()
    innocent = [edit(live, ordinary) for _ in range(3)]
    for attacker in attackers:
        attacker.join()
    assert [picture_of(reply) for reply in innocent] == [undisturbed] * 3
    assert {reply.status_code for reply in replies} == {400}
    assert {reply.json()["error"]["code"] for reply in replies} == {"invalid_image_file"}
    assert sorted(reply.json()["error"]["param"] for reply in replies) == ["image"] * 6 + ["mask"] * 6
    assert live.workers() == workers


def test_messages_of_a_fax_decoder_do_not_fill_the_log(live: FaultServer, data: Path) -> None:
    fax = (data / "bombs" / "g3.tif").read_bytes()
    before = len(live.logged("Fax3Decode1D"))
    edit(live, fax, mask=fax)
    lines = live.logged("Fax3Decode1D")[before:]
    assert 1 <= len(lines) <= 2
    assert all("job=" in line and "lines=16185" in line for line in lines)


def test_killing_the_decoding_process_costs_no_request(live: FaultServer) -> None:
    image = files.encoded("GIF")
    assert edit(live, image).status_code == 200
    workers = live.workers()
    (decoder,) = children_of(workers[0])
    os.kill(decoder, signal.SIGKILL)
    assert edit(live, image).status_code == 200
    assert live.workers() == workers
    assert children_of(workers[0]) != [decoder]
