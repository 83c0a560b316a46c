"""Request framing over real connections: valid messages are served, malformed ones end the connection with an error.

Each `corpus/invalid/RULE__CASE.http` has the bytes of one request. The `.json` file beside it has the expected result:

    rule             the rule that the case breaks; no rule has more than five cases
    status, code     of the answer; status 0: the connection is closed without one
    settings         limits that differ from the defaults
    half_close       the client closes its writing side after the bytes
    keeps_connection the framing is valid, so the next request on the connection is served

Each `corpus/valid/NAME.http` has one request. Its `.json` file has the expected head, content and status of the answer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ovserve.front.http1.chunks import ChunkDecoder
from ovserve.front.http1.head import Head, HeadParser
from ovserve.front.listener import Listener
from ovserve.settings.options import Settings
from tests.rawclient import RawClient
from tests.toyapi import ToyApi, serving

CORPUS = Path(__file__).parent / "corpus"
NEXT = b"GET /next HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n"


def cases(folder: str) -> list[Any]:
    paths = sorted((CORPUS / folder).glob("*.http"))
    assert {path.stem for path in paths} == {path.stem for path in (CORPUS / folder).glob("*.json")}
    return [pytest.param(path, id=path.stem) for path in paths]


def expectation(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


class Servers:
    """Starts one listener for each set of limits."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._running: dict[str, tuple[Listener, ToyApi]] = {}

    def port(self, settings: dict[str, Any]) -> int:
        return self._get(settings)[0].port

    def seen(self, settings: dict[str, Any]) -> list[str]:
        """Return the paths that reached the API since the last call."""
        seen = self._get(settings)[1].seen
        return [seen.get() for _ in range(seen.qsize())]

    def _get(self, settings: dict[str, Any]) -> tuple[Listener, ToyApi]:
        key = json.dumps(settings, sort_keys=True)
        if key not in self._running:
            self._running[key] = self._stack.enter_context(serving(**settings, linger_s=0.2))
        return self._running[key]


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with ExitStack() as stack:
        yield Servers(stack)


def test_corpus_has_enough_rules_and_cases() -> None:
    rules = Counter(expectation(path)["rule"] for path in (CORPUS / "invalid").glob("*.http"))
    for rule, number in sorted(rules.items()):
        print(f"{rule}: {number}")
    print(f"{len(rules)} rules, {rules.total()} cases")
    assert rules.total() >= 120
    assert max(rules.values()) <= 5
    assert len(cases("valid")) >= 50


@pytest.mark.parametrize("size", [None, 1], ids=["whole", "by byte"])
@pytest.mark.parametrize("path", cases("invalid"))
def test_malformed_framing_is_rejected(path: Path, size: int | None, servers: Servers) -> None:
    expected = expectation(path)
    settings = expected.get("settings", {})
    data = path.read_bytes()
    servers.seen(settings)
    with RawClient(servers.port(settings)) as client:
        if size is not None and len(data) > 400:
            size = len(data) // 400
        client.send(data, size)
        if expected.get("half_close"):
            client.half_close()
        elif not expected["status"]:
            pytest.fail("a case without an answer needs half_close")
        if expected["status"]:
            response = client.read_response()
            assert (response.status, response.code) == (expected["status"], expected["code"])
            assert response.fields["x-request-id"].startswith("req_")
        if expected.get("keeps_connection"):
            return
        # Bytes after a rejected request are not parsed as another one.
        assert expected["status"] == 0 or response.fields["connection"] == "close"
        if not expected.get("half_close"):
            client.send(NEXT).half_close()
        assert client.read_rest() == b""
    assert "/next" not in servers.seen(settings)


@pytest.mark.parametrize("how", ["whole", "by byte", "with the next"])
@pytest.mark.parametrize("path", cases("valid"))
def test_well_formed_framing_is_served(path: Path, how: str, servers: Servers) -> None:
    expected = expectation(path)
    data = path.read_bytes()
    method, keeps = expected["head"]["method"], expected["head"]["keep_alive"]
    with RawClient(servers.port({})) as client:
        client.send(
            data + NEXT if how == "with the next" else data, 1 if how == "by byte" and len(data) < 2000 else None
        )
        response = client.read_response(method)
        assert response.status == expected.get("status", 200)
        if expected["head"]["path"] == "/echo":
            assert response.json["fields"] == [list(pair) for pair in json.loads(expected["content"]).items()]
        elif response.status == 200 and method == "GET":
            description = response.json
            assert (description["method"], description["path"]) == (method, expected["head"]["path"])
            fields = expected["head"]["fields"]
            assert {name: description["fields"].get(name, value) for name, value in fields.items()} == fields
        if keeps:
            if how != "with the next":
                client.send(NEXT)
            assert client.read_response().status == 404  # the answer to /next: its first byte was found
        assert client.read_rest() == b""


@pytest.mark.parametrize("path", cases("valid"))
def test_well_formed_framing_parses_as_expected(path: Path) -> None:
    expected = expectation(path)
    data = path.read_bytes()
    for size in (len(data), 7, 1):
        head, content, rest = read_message(data, size, Settings())
        parsed = {**head._asdict(), "fields": {name: head.fields.get(name) for name in expected["head"]["fields"]}}
        assert {name: parsed[name] for name in expected["head"]} == expected["head"]
        assert content == expected["content"].encode()
        assert rest == b""


def read_message(data: bytes, size: int, settings: Settings) -> tuple[Head, bytes, bytes]:
    """Parse a message in pieces of `size` bytes; return its head, its content and what follows."""
    parser = HeadParser(settings)
    head, end = None, 0
    while head is None:
        end = min(end + size, len(data))
        head = parser.parse(data[:end])
        assert head or end < len(data), "the head has no end"
    rest = data[head.size :]
    if not head.is_chunked:
        length = head.content_length or 0
        return head, rest[:length], rest[length:]
    decoder, content, position = ChunkDecoder(settings), b"", 0
    while not decoder.is_done:
        assert position < len(rest), "the body has no end"
        piece = rest[position : position + size]
        taken = min(decoder.remaining, len(piece))
        if taken:
            content += piece[:taken]
            decoder.take(taken)
        else:
            taken = decoder.feed(piece, 0)
        position += taken
    return head, content, rest[position:]
