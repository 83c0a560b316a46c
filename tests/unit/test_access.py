"""Access from bytes: Host, Origin, admin routes, forwarded fields, and what each listener serves."""

from __future__ import annotations

import logging
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovserve.errors import StartupError
from ovserve.front.listener import Listener
from ovserve.settings.access import ListenAddress
from ovserve.settings.options import Settings
from ovserve.wire.local.spool import Spool
from tests.rawclient import RawClient, Response
from tests.toyapi import ToyApi, serving

PORTS: list[int] = []  # of the shared server
FOREIGN = "Origin: https://evil.test\r\n"


@contextmanager
def checking(**settings: Any) -> Iterator[RawClient]:
    """Serve with the rules for browsers, and yield a client."""
    settings.setdefault("allowed_hosts", None)
    with serving(**settings) as (listener, _), RawClient(listener.port) as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def _shared() -> Iterator[None]:
    """Serve for the property test, which cannot start a server for each example."""
    with serving(allowed_hosts=None) as (listener, _):
        PORTS[:] = [listener.port]
        yield


def ask(client: RawClient, path: str, fields: str = "", method: str = "GET", host: str = "127.0.0.1:8000") -> Response:
    """Send a request and return the response. The connection persists."""
    length = "Content-Length: 0\r\n" if method == "POST" else ""
    client.send(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{length}{fields}\r\n".encode("latin-1"))
    return client.read_response(method)


def test_foreign_host_name_is_421_that_names_the_option() -> None:
    with checking() as client:
        answer = ask(client, "/describe", host="evil.test:8000")
        assert (answer.status, answer.code) == (421, "misdirected_request")
        assert "allowed_hosts" in answer.json["error"]["message"]
        # Also where a page would be its own origin, and for the page and kept pictures.
        assert ask(client, "/describe", "Origin: http://evil.test:8000\r\n", host="evil.test:8000").status == 421
        assert ask(client, "/file", host="evil.test").status == 421
        assert ask(client, "/health", host="evil.test").status == 200
        for host in ("localhost:1", "127.0.0.1", "[::1]:80", "host.docker.internal", "my.localhost"):
            assert ask(client, "/describe", host=host).status == 200


def test_absolute_target_replaces_host() -> None:
    with checking() as client:
        assert ask(client, "http://evil.test/describe", host="localhost").status == 421
        assert ask(client, "http://localhost/describe", host="evil.test").status == 200


def test_http_1_0_without_host_is_served() -> None:
    with checking() as client:
        assert client.send(b"GET /describe HTTP/1.0\r\n\r\n").read_response().status == 200


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({"host": "127.0.0.1"}, 421),
        ({"host": "localhost"}, 421),
        ({"host": "127.0.0.1", "admin_listen": "127.0.0.1:1"}, 421),
        ({"host": "127.0.0.1", "admin_listen": "/run/x.sock"}, 421),
        ({"host": "127.0.0.1", "api_key": "k"}, 200),
        ({"host": "127.0.0.1", "admin_listen": "0.0.0.0:1"}, 200),
        ({"host": "127.0.0.1", "admin_listen": "0.0.0.0:1", "allowed_hosts": "a.test"}, 421),
        ({"host": "127.0.0.1", "api_key": "k", "allowed_hosts": "a.test"}, 421),
        ({"host": "127.0.0.1", "allowed_hosts": "a.test, evil.test"}, 200),
        ({"host": "127.0.0.1", "allowed_hosts": "*"}, 200),
        ({"host": "127.0.0.1", "public_url": "http://evil.test"}, 200),
    ],
)
def test_host_is_checked_only_on_a_keyless_loopback_server(settings: dict[str, Any], status: int) -> None:
    # An admin listener on another address stands for any bind that is not loopback; this listener does not open it.
    with checking(**settings) as client:
        assert ask(client, "/describe", "api-key: k\r\n", host="evil.test").status == status


def test_foreign_origin_is_403_before_the_key_and_the_body() -> None:
    with checking(api_key="k") as client:
        client.send(b"POST /echo HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\n" + FOREIGN.encode() + b"\r\n")
        answer = client.read_response()
        assert (answer.status, answer.code) == (403, "forbidden")
        assert "access-control-allow-origin" not in answer.fields


@pytest.mark.parametrize("settings", [{}, {"api_key": "k"}, {"admin_listen": "0.0.0.0:1"}])
def test_origin_is_checked_with_every_bind_address_and_key(settings: dict[str, Any]) -> None:
    with checking(**settings) as client:
        for method, path in (("POST", "/describe"), ("GET", "/describe"), ("OPTIONS", "/describe"), ("POST", "/file")):
            assert ask(client, path, f"api-key: k\r\n{FOREIGN}", method).status == 403, (method, path)
        assert ask(client, "/describe", "api-key: k\r\nOrigin: null\r\n").status == 403
        assert (
            ask(client, "/describe", "api-key: k\r\nOrigin: http://a.test\r\nOrigin: http://b.test\r\n").status == 403
        )
        for path in ("/file", "/health"):
            assert ask(client, path, f"api-key: k\r\n{FOREIGN}").status == 200
            assert ask(client, path, f"api-key: k\r\n{FOREIGN}", "HEAD").status == 200
        for own in ("http://127.0.0.1:8000", "https://127.0.0.1:8000", "http://localhost:3000"):
            assert ask(client, "/describe", f"api-key: k\r\nOrigin: {own}\r\n").status == 200


def test_star_allows_every_origin_and_the_list_its_own() -> None:
    with checking(allowed_origins="*") as client:
        for origin in ("https://evil.test", "null"):
            answer = ask(client, "/describe", f"Origin: {origin}\r\n")
            assert (answer.status, answer.fields["access-control-allow-origin"]) == (200, "*")
        assert ask(client, "/describe", "Sec-Fetch-Site: cross-site\r\n").status == 200
    with checking(allowed_origins="app://notes, https://a.test") as client:
        for origin in ("app://notes", "https://a.test"):
            answer = ask(client, "/describe", f"Origin: {origin}\r\n")
            assert (answer.status, answer.fields["access-control-allow-origin"]) == (200, origin)
        assert ask(client, "/describe", FOREIGN).status == 403


field_text = st.text(st.characters(max_codepoint=255, exclude_categories=["Cc"]), max_size=60)


@settings(max_examples=200)
@given(field_text, field_text, field_text | st.sampled_from(["none", "same-origin", "same-site", "cross-site"]))
def test_any_fields_get_a_documented_answer(host: str, origin: str, site: str) -> None:
    head = f"GET /describe HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\nSec-Fetch-Site: {site}\r\n"
    head += "Connection: close\r\n\r\n"
    with RawClient(PORTS[0]) as client:
        answer = client.send(head.encode("latin-1")).read_response()
    assert (answer.status, answer.json.get("error", {}).get("code")) in {
        (200, None), (400, "malformed_request"), (403, "forbidden"), (421, "misdirected_request")
    }  # fmt: skip
    if answer.status != 200:
        assert "access-control-allow-origin" not in answer.fields


def test_sec_fetch_site_counts_only_without_origin() -> None:
    with checking() as client:
        assert ask(client, "/describe", "Sec-Fetch-Site: cross-site\r\n").status == 403
        assert ask(client, "/describe", "Sec-Fetch-Site: cross-site\r\nOrigin: http://127.0.0.1:8000\r\n").status == 200
        assert ask(client, "/describe", f"Sec-Fetch-Site: same-origin\r\n{FOREIGN}").status == 403
        assert ask(client, "/file", "Sec-Fetch-Site: cross-site\r\n").status == 200
        for site in ("none", "same-origin", "same-site"):
            assert ask(client, "/describe", f"Sec-Fetch-Site: {site}\r\n").status == 200


def test_foreign_origins_are_logged_once_each_with_the_option(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "ovserve")
    with checking() as client:
        for origin in ("https://a.test", "https://a.test", "https://b.test", "x\x1b[1m"[:1], "https://a.test"):
            ask(client, "/describe", f"Origin: {origin}\r\n")
    lines = [record for record in caplog.records if "allowed_origins" in record.getMessage()]
    assert [record.fields["origin"] for record in lines] == ["https://a.test", "https://b.test", "x"]  # type: ignore[attr-defined]


def test_invented_origins_do_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "ovserve")
    with checking() as client:
        for number in range(1100):
            ask(client, "/describe", f"Origin: https://a{number}.test\r\n")
    lines = [record for record in caplog.records if "allowed_origins" in record.getMessage()]
    suppressed = sum(r.fields["number"] for r in caplog.records if "suppressed" in r.getMessage())  # type: ignore[attr-defined]
    assert len(lines) < 100
    assert len(lines) + suppressed == 1100


# --- admin routes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"api_key": "k"}, {"admin_key": "root"}, {"api_key": "k", "admin_key": "root"}]
)
def test_admin_route_needs_an_admin_key(settings: dict[str, Any]) -> None:
    with checking(**settings) as client:
        for fields in ("", "api-key: k\r\n", "Authorization: Bearer k\r\n", "X-Forwarded-For: 127.0.0.1\r\n"):
            answer = ask(client, "/admin", fields, "POST")
            assert (answer.status, answer.code) == (403, "forbidden")
            assert "admin_key" in answer.json["error"]["message"]
            assert "admin_listen" in answer.json["error"]["message"]
        has_key = "admin_key" in settings
        for fields in ("Authorization: Bearer root\r\n", "api-key: root\r\nX-Forwarded-For: 192.0.2.1\r\n"):
            assert ask(client, "/admin", fields, "POST").status == (200 if has_key else 403)
        assert ask(client, "/admin", f"api-key: root\r\n{FOREIGN}", "POST").status == 403


def test_admin_key_is_no_api_key() -> None:
    with checking(api_key="k", admin_key="root") as client:
        assert ask(client, "/describe", "api-key: root\r\n").status == 401
        assert ask(client, "/operator", "api-key: root\r\n").status == 200
        assert ask(client, "/operator", "api-key: k\r\n").status == 200
        assert ask(client, "/operator").status == 401
    with checking() as client:
        assert ask(client, "/operator").status == 200


def test_with_an_admin_listener_operators_use_it() -> None:
    with checking(api_key="k", admin_key="root", admin_listen="127.0.0.1:1") as client:
        for fields in ("", "api-key: k\r\n"):
            assert ask(client, "/operator", fields).status == 403
            assert ask(client, "/admin", fields, "POST").status == 403
        assert ask(client, "/operator", "api-key: root\r\n").status == 200
        assert ask(client, "/describe", "api-key: k\r\n").status == 200


@contextmanager
def admin_listener(tmp_path: Path, address: ListenAddress, **settings: Any) -> Iterator[Listener]:
    api, spool = ToyApi(), Spool(tmp_path, 1_000_000)
    listener = Listener(Settings(**settings), api, spool, address)
    listener.start()
    try:
        yield listener
    finally:
        listener.stop(0)
        api.close()
        spool.close()


def test_admin_listener_needs_no_key_for_operators_only(tmp_path: Path) -> None:
    address = ListenAddress("127.0.0.1", 0)
    with admin_listener(tmp_path, address, api_key="k") as listener, RawClient(listener.port) as client:
        assert ask(client, "/admin", method="POST").status == 200
        assert ask(client, "/operator").status == 200
        assert ask(client, "/describe").status == 401  # the API's own keys are still needed
        assert ask(client, "/admin", method="POST", host="evil.test").status == 421  # DNS rebinding
        # A web page of this machine may read, and change nothing.
        for fields in ("Origin: http://localhost:3000\r\n", f"Origin: http://127.0.0.1:{listener.port}\r\n",
                       "Sec-Fetch-Site: none\r\n", FOREIGN):  # fmt: skip
            assert ask(client, "/admin", fields, "POST").status == 403
        assert ask(client, "/operator", "Sec-Fetch-Site: none\r\n").status == 200


def test_admin_socket_is_private_and_serves_every_host(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with admin_listener(tmp_path, ListenAddress("", 0, str(path))):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(path))
            connection.sendall(b"POST /admin HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            received = b"".join(iter(lambda: connection.recv(4096), b""))
        assert received.startswith(b"HTTP/1.1 200 ")
        with pytest.raises(StartupError, match=r"admin\.sock: Address already in use"):
            Listener(Settings(), ToyApi(), None, ListenAddress("", 0, str(path)))  # type: ignore[arg-type]
        assert path.exists()
    assert not path.exists()


def test_abandoned_socket_is_replaced_and_another_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with admin_listener(tmp_path, ListenAddress("", 0, str(path))):
        assert path.exists()
    path.write_text("mine")
    with pytest.raises(StartupError, match="exists and is not a socket"):
        Listener(Settings(), ToyApi(), None, ListenAddress("", 0, str(path)))  # type: ignore[arg-type]
    assert path.read_text() == "mine"


# --- forwarded fields and nosniff -------------------------------------------------------------------------------------


def test_forwarded_fields_of_a_trusted_proxy_give_the_address() -> None:
    with checking(trusted_proxies="127.0.0.1") as client:
        assert ask(client, "/describe", "X-Forwarded-For: 203.0.113.9\r\n").json["address"] == "203.0.113.9"
    with checking(trusted_proxies="192.0.2.1") as client:
        for fields in ("X-Forwarded-For: 203.0.113.9\r\n", "Forwarded: for=203.0.113.9\r\nX-Real-IP: ?\r\nVia: x\r\n"):
            answer = ask(client, "/describe", fields)
            assert (answer.status, answer.json["address"]) == (200, "127.0.0.1")


def test_every_answer_forbids_sniffing() -> None:
    with serving(max_connections=1, api_key="k") as (listener, _), RawClient(listener.port) as client:
        for path in ("/describe", "/file", "/nowhere", "/nothing", "/health"):
            assert ask(client, path, "api-key: k\r\n").fields["x-content-type-options"] == "nosniff"
        for path, fields in (("/describe", ""), ("/admin", "")):
            assert ask(client, path, fields).fields["x-content-type-options"] == "nosniff"
        with RawClient(listener.port) as beyond:  # the connection limit
            assert ask(beyond, "/describe").fields["x-content-type-options"] == "nosniff"
        client.send(b"GET /stream?do=3 HTTP/1.1\r\nHost: a\r\napi-key: k\r\n\r\n")
        assert client.read_head()[1]["x-content-type-options"] == "nosniff"
    with checking() as client:
        assert client.send(b"BAD\r\n\r\n").read_response().fields["x-content-type-options"] == "nosniff"
