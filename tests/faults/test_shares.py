"""Clients that hold connections and spool space, beside another client that wants some: it gets its share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ovserve.front import listener as listener_module
from ovserve.front.listener import Listener
from tests.faultserver import TINY_PNG, FaultServer, picture_of
from tests.rawclient import RawClient, Response
from tests.toyapi import ToyApi, serving

HOSTILE, INNOCENT = [f"127.0.0.{number}" for number in range(2, 18)], "127.0.0.99"
DESCRIBE = b"GET /describe HTTP/1.1\r\nHost: a.test\r\n\r\n"
WAIT = b"GET /wait HTTP/1.1\r\nHost: a.test\r\n\r\n"
MIB = 1 << 20
EDGE = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n', b"\r\n--b--\r\n"


def upload(size: int) -> tuple[bytes, bytes]:
    """Return a request with an upload of this size, without its last byte, and that byte."""
    body = EDGE[0] + b"x" * (size - len(EDGE[0]) - len(EDGE[1])) + EDGE[1]
    head = b"POST /echo HTTP/1.1\r\nHost: a.test\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % size + body[:-1], body[-1:]


def eventually(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


def connect(stack: ExitStack, listener: Listener, address: str, **known: int) -> RawClient:
    return stack.enter_context(RawClient(listener.port, address=address, **known))


def ask(listener: Listener, request: bytes, address: str = INNOCENT) -> Response:
    """Send a request on a connection of its own; if it is served, return when the server has closed it too."""
    with RawClient(listener.port, address=address) as client:
        response = client.send(request).read_response()
    if response.status == 200:
        eventually(lambda: listener.open_connections < listener.settings.max_connections)
    return response


def closed(clients: list[RawClient]) -> list[int]:
    """Return the positions of the connections that the server has closed or answered."""
    return [number for number, client in enumerate(clients) if client.has_answer(0)]


# --- connections ------------------------------------------------------------------------------------------------------


def test_silent_connections_give_way_after_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "MIN_QUIET_S", 0.2)
    with serving(max_connections=16, overflow_connections=16) as (listener, _), ExitStack() as stack:
        silent = [connect(stack, listener, address) for address in HOSTILE]  # each one its share
        eventually(lambda: listener.open_connections == 16)
        time.sleep(0.25)
        assert ask(listener, DESCRIBE).status == 200
        eventually(lambda: len(closed(silent)) == 1)
        assert closed(silent) == [0]


def wait_in_all_places(stack: ExitStack, listener: Listener, api: ToyApi, addresses: list[str]) -> list[RawClient]:
    """Send a request that waits from each address, one after the other."""
    clients = []
    for address in addresses:
        clients.append(connect(stack, listener, address).send(WAIT))
        assert api.seen.get(timeout=10) == "/wait"
    return clients


def test_client_with_all_places_loses_its_newest_request_to_another_and_no_more() -> None:
    with serving(max_connections=8) as (listener, api), ExitStack() as stack:
        clients = wait_in_all_places(stack, listener, api, HOSTILE[:1] * 8)
        assert ask(listener, DESCRIBE, HOSTILE[0]).status == 503
        assert closed(clients) == []
        for number in range(5):  # one after another: each needs one place
            assert ask(listener, DESCRIBE).status == 200, number
        eventually(lambda: closed(clients) == [7])
        refused = clients[7].read_response()
        assert (refused.status, refused.code) == (503, "too_many_connections")
        assert (refused.fields["retry-after"], refused.fields["connection"]) == ("1", "close")
        api.release(7)
        assert [client.read_response().status for client in clients[:7]] == [200] * 7


def test_clients_within_their_shares_keep_their_places() -> None:
    with serving(max_connections=4) as (listener, api), ExitStack() as stack:
        clients = wait_in_all_places(stack, listener, api, [HOSTILE[0], INNOCENT] * 2)
        for address in (HOSTILE[0], HOSTILE[1], HOSTILE[2]):
            assert ask(listener, DESCRIBE, address).status == (503 if address == HOSTILE[0] else 200)
        # The share of three clients is one place: the newest of one of those with two has made way.
        eventually(lambda: len(closed(clients)) == 1)
        assert closed(clients)[0] in (2, 3)
        api.release(4)


def test_forwarded_addresses_have_shares_behind_a_trusted_proxy() -> None:
    with serving(max_connections=4, trusted_proxies="127.0.0.1") as (listener, api), ExitStack() as stack:
        forwarded = [line.replace(b"Host", b"X-Forwarded-For: %b\r\nHost") for line in (WAIT, DESCRIBE)]
        clients = []
        for _ in range(4):
            clients.append(connect(stack, listener, "127.0.0.1").send(forwarded[0] % b"192.0.2.1"))
            assert api.seen.get(timeout=10) == "/wait"
        assert ask(listener, forwarded[1] % b"192.0.2.2", "127.0.0.1").status == 200
        eventually(lambda: closed(clients) == [3])
        assert clients[3].read_response().status == 503
        api.release(4)


def test_verified_keys_of_one_address_have_shares(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    keys.chmod(0o600)
    with serving(max_connections=4, api_key_file=keys) as (listener, api), ExitStack() as stack:
        keyed = [line.replace(b"Host", b"Authorization: Bearer %b\r\nHost") for line in (WAIT, DESCRIBE)]
        clients = []
        for _ in range(4):
            clients.append(connect(stack, listener, INNOCENT).send(keyed[0] % b"one"))
            assert api.seen.get(timeout=10) == "/wait"
        assert ask(listener, keyed[1] % b"two").status == 200
        eventually(lambda: closed(clients) == [3])
        api.release(4)


# --- the spool --------------------------------------------------------------------------------------------------------


def test_slow_uploads_above_a_share_give_way_and_the_others_are_completed() -> None:
    with serving(spool_bytes=8 * MIB) as (listener, _), ExitStack() as stack:
        begin, end = upload(2 * MIB)
        clients = []
        for number in range(4):
            clients.append(connect(stack, listener, HOSTILE[0]).send(begin))
            eventually(lambda number=number: listener.spool.used_bytes == 2 * MIB * (number + 1))  # type: ignore[misc]
        assert ask(listener, b"".join(upload(MIB)), HOSTILE[0]).status == 503  # it has its share
        assert closed(clients) == []
        for _ in range(3):
            assert ask(listener, b"".join(upload(MIB))).status == 200
        assert closed(clients) == [3]
        refused = clients[3].read_response()
        assert (refused.status, refused.code, refused.fields["retry-after"]) == (503, "spool_full", "2")
        assert listener.spool.used_bytes == 6 * MIB
        assert [client.send(end).read_response().status for client in clients[:3]] == [200] * 3


def test_sixteen_addresses_of_slow_uploads_leave_a_small_one_its_share() -> None:
    with serving(spool_bytes=32 * MIB) as (listener, _), ExitStack() as stack:
        begin, _ = upload(2 * MIB)
        clients = [connect(stack, listener, address).send(begin) for address in HOSTILE]
        eventually(lambda: listener.spool.used_bytes == 32 * MIB)
        for _ in range(3):
            assert ask(listener, b"".join(upload(MIB))).status == 200
        assert len(closed(clients)) == 1
        assert listener.spool.used_bytes == 30 * MIB


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    """Start a server with toy workers and a small spool."""
    options = ("--spool_bytes", str(32 * MIB), "--spool_warm_bytes", "0", "--log_level", "warning")
    with FaultServer(tmp_path_factory.mktemp("spool"), *options, toy_options={"capacity": 4}) as server:
        yield server
        assert not server.logged("Traceback")


def generation(prompt: str, **fields: object) -> bytes:
    content = json.dumps({"prompt": prompt, **fields}).encode()
    head = b"POST /v3/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(content) + content


def spool_bytes(live: FaultServer) -> int:
    return sum(path.stat().st_blocks * 512 for path in live.spool.rglob("*") if path.is_file())


def test_results_that_are_read_slowly_give_way_to_those_of_another(live: FaultServer) -> None:
    with ExitStack() as stack:
        readers = []
        for number in range(4):
            reader = RawClient(live.port, address=HOSTILE[0], receive_buffer=65536)
            readers.append(stack.enter_context(reader).send(generation(f"bytes {7 * MIB}", seed=number)))
            assert reader.read_head()[0] == 200
        with RawClient(live.port, address=INNOCENT) as client:
            for _ in range(2):
                assert client.send(generation(f"bytes {7 * MIB}", seed=9)).read_response().status == 200
        whole = []
        for reader in readers:
            try:
                reader.read_exactly(9 * MIB)  # of the 9.3 MiB of base64
                whole.append(True)
            except ConnectionError:
                whole.append(False)
        assert whole == [True, True, True, False]
    live.until(lambda: live.segments() == [])


def test_queued_jobs_above_a_share_give_way_to_an_upload(live: FaultServer) -> None:
    with live.client() as client, ExitStack() as stack:
        waiting = []
        body = b"--b\r\nContent-Disposition: form-data; name=prompt\r\n\r\nsleep 30\r\n" + EDGE[0]
        body += TINY_PNG + b"y" * (7 * MIB) + EDGE[1]  # the bytes after the picture are not read
        head = b"POST /v3/images/edits HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        request = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
        for number in range(4):
            waiting.append(stack.enter_context(RawClient(live.port, address=HOSTILE[0])).send(request))
            live.until(lambda number=number: live.model_status()["running"] == number + 1)  # type: ignore[misc]
        reply = client.post(
            "/v3/images/edits", data={"prompt": "echo"}, files={"image": ("a.png", TINY_PNG + b"z" * (5 * MIB))}
        )
        assert len(picture_of(reply)) > 5 * MIB
        live.until(lambda: len(closed(waiting)) == 1)
        refused = waiting[3].read_response()
        assert (refused.status, refused.code) == (503, "spool_full")
    live.until(lambda: live.segments() == [])


def edit_stream(prompt: str, image_bytes: int, **fields: object) -> bytes:
    values = {"prompt": prompt, "stream": "true", **fields}
    body = b"".join(
        b"--b\r\nContent-Disposition: form-data; name=%b\r\n\r\n%b\r\n" % (name.encode(), str(value).encode())
        for name, value in values.items()
    )
    body += EDGE[0] + TINY_PNG + b"y" * image_bytes + EDGE[1]
    head = b"POST /v3/images/edits HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def read_events(client: RawClient, number: int) -> None:
    """Read this many events with a picture."""
    while number:
        number -= len(client.read_chunk()) > MIB


def test_stream_releases_its_upload_and_each_picture_that_is_sent(live: FaultServer) -> None:
    with RawClient(live.port, receive_buffer=65536) as client:
        client.send(edit_stream(f"bytes {7 * MIB}", 4 * MIB, n=3))
        assert client.read_head()[0] == 200
        live.until(lambda: live.model_status()["running"] == 0)
        for left in (2, 1):
            read_events(client, 1)
            live.until(lambda left=left: spool_bytes(live) < (7 * left + 1) * MIB)  # type: ignore[misc]
        read_events(client, 1)
    live.until(lambda: live.segments() == [])


def test_prepared_stream_gives_its_upload_to_another_client_and_goes_on(live: FaultServer) -> None:
    with RawClient(live.port, address=HOSTILE[0]) as client, RawClient(live.port, address=INNOCENT) as other:
        client.send(edit_stream("bytes 9 3", 20 * MIB))
        assert client.read_head()[0] == 200
        assert spool_bytes(live) > 20 * MIB
        # 13 MiB are within its share of 16.
        assert other.send(edit_stream("bytes 9", 13 * MIB)).read_response().status == 200
        assert spool_bytes(live) < 20 * MIB
        events = b"".join(iter(client.read_chunk, b""))
        assert b"event: image_edit.completed" in events
        assert b"error" not in events
    live.until(lambda: live.segments() == [])
