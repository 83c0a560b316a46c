"""TLS over a real listener: versions, handshakes, renewal of the certificate, and every call of the transport."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovserve.errors import ClientGone, SettingsError
from ovserve.front import tls as tls_module
from ovserve.front.tls import Certificates, TlsSocket
from ovserve.front.transport import Transport
from tests.certificates import Pair, client_context, make_pair
from tests.rawclient import RawClient
from tests.sockets import connected_pair
from tests.toyapi import serving

DESCRIBE = b"GET /describe HTTP/1.1\r\nHost: a.test\r\n\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the module's certificates."""
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    """Return the certificate of the servers."""
    return make_pair(folder, "first")


@contextmanager
def tls_pair(pair: Pair) -> Iterator[tuple[ssl.SSLSocket, Transport]]:
    """Yield a client's end, and the transport of the server's end, after the handshake."""
    with connected_pair() as (ours, theirs):
        transport = Transport(Certificates(*pair).wrap(theirs), 2.0)
        worker = threading.Thread(target=transport.handshake, args=(10,))
        worker.start()
        with client_context(pair).wrap_socket(ours, server_hostname="a.test") as client:
            worker.join()
            client.settimeout(10)
            yield client, transport


def get(port: int, context: ssl.SSLContext, path: str = "/describe") -> tuple[int, bytes]:
    """Return status and content of a GET on a connection of its own."""
    client = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=30)
    try:
        client.request("GET", path)
        answer = client.getresponse()
        return answer.status, answer.read()
    finally:
        client.close()


def assert_closed(client: RawClient) -> None:
    """Check that the server closes the connection; an alert may come before."""
    with suppress(ConnectionResetError):
        while client.socket.recv(65536):
            pass


def serial_at(port: int, context: ssl.SSLContext) -> str:
    """Return the name in the certificate that a server presents."""
    with (
        socket.create_connection(("127.0.0.1", port), 10) as raw,
        context.wrap_socket(raw, server_hostname="a.test") as client,
    ):
        found = client.getpeercert()
        assert found
        return dict(part[0] for part in found["subject"])["commonName"]


# --- the socket calls -------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(pieces=st.lists(st.binary(min_size=1, max_size=40_000), min_size=1, max_size=6), size=st.integers(1, 50_000))
def test_bytes_arrive_in_order_whatever_call_receives_them(pair: Pair, pieces: list[bytes], size: int) -> None:
    with tls_pair(pair) as (client, transport):
        sender = threading.Thread(target=lambda: [client.sendall(piece) for piece in pieces])
        sender.start()
        expected, received, turn = b"".join(pieces), b"", 0
        while len(received) < len(expected):
            turn += 1
            view = memoryview(bytearray(min(size, len(expected) - len(received))))
            if transport.has_pending:
                received += transport.take_pending()
            elif turn % 3 == 0:
                transport.wait_readable(10, lambda: None)
                received += transport.receive(10)
            elif turn % 3 == 1:
                received += view[: transport.fill(view, 10)]
            else:
                received += view[: transport.receive_beyond(view, 10)]
        sender.join()
        assert received == expected


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(1, 300_000), min_size=1, max_size=5), pause=st.sampled_from([0.0, 0.05]), data=st.data()
)
def test_sent_buffers_arrive_though_the_reader_is_slow(
    pair: Pair, sizes: list[int], pause: float, data: st.DataObject
) -> None:
    buffers = [os.urandom(size) for size in sizes]
    small = data.draw(st.booleans())
    with tls_pair(pair) as (client, transport):
        if small:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # a smaller one waits for TCP timers
        received = bytearray()

        def read() -> None:
            time.sleep(pause)
            while len(received) < sum(sizes):
                received.extend(client.recv(65536))

        reader = threading.Thread(target=read)
        reader.start()
        assert transport.send(buffers) == sum(sizes)
        reader.join()
        assert received == b"".join(buffers)


def test_a_reader_that_stops_ends_the_write(pair: Pair) -> None:
    with tls_pair(pair) as (_, transport), pytest.raises(ClientGone, match="stopped reading"):
        transport.send([b"x" * 20_000_000])


def test_ends_of_the_stream_and_timeouts(pair: Pair) -> None:
    with tls_pair(pair) as (client, transport):
        with pytest.raises(TimeoutError):
            transport.receive(0.05)
        client.sendall(b"abc")
        transport.wait_readable(10, lambda: None)
        assert transport.has_unread_bytes()
        assert transport.receive(10) == b"abc"
        assert not transport.has_unread_bytes()
    for how in ("alert", "truncated"):
        with tls_pair(pair) as (client, transport):
            client.sendall(b"rest")
            if how == "alert":
                client.settimeout(0.1)
                with pytest.raises(
                    OSError, match=r"timed out|did not complete|EOF"
                ):  # the server does not answer the alert
                    client.unwrap()
            else:
                socket.socket.shutdown(client, socket.SHUT_WR)
            assert transport.receive(10) == b"rest"
            assert transport.receive(10) == b""
            assert transport.fill(memoryview(bytearray(3)), 10) == 0


def test_a_record_that_arrives_byte_by_byte_takes_no_longer_than_the_timeout(pair: Pair) -> None:
    with connected_pair() as (ours, theirs):
        server = TlsSocket(theirs, Certificates(*pair)._context)
        transport = Transport(server, 2.0)
        worker = threading.Thread(target=transport.handshake, args=(10,))
        worker.start()
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = client_context(pair).wrap_bio(incoming, outgoing, server_hostname="a.test")
        ours.settimeout(10)
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                ours.sendall(outgoing.read())
                incoming.write(ours.recv(65536))
        ours.sendall(outgoing.read())
        worker.join()
        client.write(b"x" * 100)
        record = outgoing.read()
        stop = threading.Event()

        def drip() -> None:
            for byte in record[:-1]:
                ours.sendall(bytes([byte]))
                if stop.wait(0.02):
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            transport.receive(0.3)
        assert time.monotonic() - started < 1.5  # the record takes about 2.4 s
        stop.set()
        dripping.join()


# --- the listener -----------------------------------------------------------------------------------------------------


def test_python_and_curl_and_openssl_are_served(pair: Pair) -> None:
    with serving(**pair.options()) as (listener, api):
        assert listener.url == f"https://127.0.0.1:{listener.port}"
        context = client_context(pair)
        assert get(listener.port, context)[0] == 200
        windows = [bytes([65 + number % 26]) * 100_000 for number in range(40)]
        assert get(listener.port, context, "/windowed-file?size=100000&count=40")[1] == b"".join(windows)
        curl = ["curl", "-sS", "--cacert", str(pair.certificate), f"https://localhost:{listener.port}/describe"]
        if shutil.which("curl"):
            asked = subprocess.run([*curl, "--ipv4"], capture_output=True, timeout=30, check=True)
            assert b"address" in asked.stdout
        shown = s_client(listener.port, pair, "-alpn", "h2,http/1.1")
        assert "ALPN protocol: http/1.1" in shown
        assert "Verify return code: 0 (ok)" in shown
        assert "TLSv1.3" in shown
        assert "TLSv1.2" in s_client(listener.port, pair, "-tls1_2")
        assert "Cipher is (NONE)" in s_client(listener.port, pair, "-tls1_1", "-cipher", "ALL:@SECLEVEL=0")
        # A client may change its keys, and ask the server to.
        request = b"K\nk\nGET /describe HTTP/1.1\nHost: a.test\n\n"
        assert "KEYUPDATE" in s_client(listener.port, pair, "-crlf", request=request).upper()
        with RawClient(listener.port) as client:
            answer = client.send(DESCRIBE).read_response()
            assert (answer.status, answer.code) == (400, "malformed_request")
            assert "HTTPS" in answer.json["error"]["message"]
        assert get(listener.port, context)[0] == 200
        assert api.gone.empty()


def test_a_client_cannot_renegotiate(pair: Pair) -> None:
    with serving(**pair.options()) as (listener, _):
        shown = s_client(listener.port, pair, "-tls1_2", "-crlf", request=b"R\n")
        assert "RENEGOTIATING" in shown
        assert "no renegotiation" in shown, shown
        assert get(listener.port, client_context(pair))[0] == 200


def s_client(port: int, pair: Pair, *options: str, request: bytes = b"") -> str:
    """Return what `openssl s_client` reports."""
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-CAfile", str(pair.certificate), *options]
    done = subprocess.run(command, input=request, capture_output=True, timeout=30, check=False)
    return (done.stdout + done.stderr).decode("latin-1")


def test_large_uploads_and_pipelined_requests(pair: Pair) -> None:
    body = os.urandom(3_000_000)
    boundary = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + body + b"\r\n--b--\r\n"
    with serving(**pair.options()) as (listener, _):
        client = http.client.HTTPSConnection("127.0.0.1", listener.port, context=client_context(pair), timeout=30)
        client.request("POST", "/echo", boundary, {"Content-Type": "multipart/form-data; boundary=b"})
        answer = client.getresponse()
        assert answer.status == 200
        assert str(len(body)).encode() in answer.read()
        client.close()
        with (
            socket.create_connection(("127.0.0.1", listener.port), 10) as raw,
            client_context(pair).wrap_socket(raw, server_hostname="a.test") as pipelining,
        ):
            pipelining.sendall(DESCRIBE * 20)
            received = b""
            while received.count(b"HTTP/1.1 200 ") < 20:
                received += pipelining.recv(65536)


def test_a_client_that_leaves_cancels_its_request(pair: Pair) -> None:
    with (
        serving(**pair.options()) as (listener, api),
        socket.create_connection(("127.0.0.1", listener.port), 10) as raw,
    ):
        client = client_context(pair).wrap_socket(raw, server_hostname="a.test")
        client.sendall(b"GET /wait HTTP/1.1\r\nHost: a.test\r\n\r\n")
        assert api.seen.get(timeout=10) == "/wait"
        client.close()
        assert api.gone.get(timeout=10) == "/wait"


def test_slow_and_failed_handshakes_delay_no_other_client(pair: Pair) -> None:
    with serving(**pair.options(), tls_handshake_timeout_s=1.0) as (listener, _):
        context = client_context(pair)
        slow = [RawClient(listener.port) for _ in range(20)]
        try:
            for number, client in enumerate(slow):
                client.send([b"", b"\x16\x03\x01\x02\x00\x01", b"\x16", bytes(100)][number % 4])
            started = time.monotonic()
            assert get(listener.port, context)[0] == 200
            assert time.monotonic() - started < 1.0 or listener.open_connections <= 1
            for client in slow:
                assert_closed(client)
        finally:
            for client in slow:
                client.close()
        assert get(listener.port, context)[0] == 200


@settings(max_examples=30)
@given(
    hello=st.binary(max_size=300), prefix=st.sampled_from([b"", b"\x16\x03\x01", b"\x16\x03\x01\x00\x10\x01", b"GET "])
)
def test_any_bytes_in_place_of_a_handshake_end_only_their_connection(pair: Pair, hello: bytes, prefix: bytes) -> None:
    with connected_pair() as (ours, theirs):
        ours.sendall(prefix + hello)
        ours.shutdown(socket.SHUT_WR)
        transport = Transport(Certificates(*pair).wrap(theirs), 1)
        with pytest.raises((ssl.SSLError, ClientGone)):
            transport.handshake(10)
        transport.end()


def test_beyond_the_limit_health_checks_and_503_come_over_tls(pair: Pair) -> None:
    with serving(**pair.options(), max_connections=1) as (listener, api):
        context = client_context(pair)
        with (
            socket.create_connection(("127.0.0.1", listener.port), 10) as raw,
            context.wrap_socket(raw, server_hostname="a.test") as client,
        ):
            client.sendall(b"GET /wait HTTP/1.1\r\nHost: a.test\r\n\r\n")
            assert api.seen.get(timeout=10) == "/wait"
            assert get(listener.port, context, "/health")[0] == 200
            assert get(listener.port, context)[0] == 503
            with RawClient(listener.port) as plain:
                assert_closed(plain.send(DESCRIBE))
            api.release()
            assert client.recv(12) == b"HTTP/1.1 200"


def test_client_certificates_are_required(folder: Path, pair: Pair) -> None:
    authority = make_pair(folder, "authority")
    known, stranger = make_pair(folder, "known", authority), make_pair(folder, "stranger")
    with serving(**pair.options(), tls_client_ca=authority.certificate) as (listener, _):
        assert get(listener.port, client_context(pair, client=known))[0] == 200
        for context in (client_context(pair), client_context(pair, client=stranger)):
            with pytest.raises(OSError, match=r"alert|reset|closed|EOF|Remote"):
                get(listener.port, context)


# --- renewal ----------------------------------------------------------------------------------------------------------


def test_renewal_under_load_fails_no_request(
    tmp_path: Path, folder: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_module, "CHECK_S", 0.0)
    used = make_pair(tmp_path, "used")
    second = make_pair(folder, "second")
    context = client_context(used)
    context.load_verify_locations(pair.certificate)
    context.load_verify_locations(second.certificate)
    with serving(**used.options()) as (listener, _), ThreadPoolExecutor(4) as pool:
        is_over = threading.Event()

        def ask() -> int:
            count = 0
            while not is_over.is_set() or count < 3:
                assert get(listener.port, context)[0] == 200
                count += 1
            return count

        asked = [pool.submit(ask) for _ in range(4)]
        try:
            names = set()
            for other in (pair, second, pair, second):
                used.replace(other)
                names.add(serial_at(listener.port, context))
        finally:
            is_over.set()
        assert sum(each.result(60) for each in asked) >= 12
        assert names == {"first", "second"}


def test_files_that_do_not_fit_keep_the_old_certificate(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tls_module, "CHECK_S", 0.0)
    used, other = make_pair(tmp_path, "used"), make_pair(folder, "other")
    context = client_context(used)
    context.load_verify_locations(other.certificate)
    with serving(**used.options()) as (listener, _):
        used.key.write_bytes(other.key.read_bytes())
        assert serial_at(listener.port, context) == "used"
        assert "the old one stays" in caplog.text
        used.certificate.write_bytes(other.certificate.read_bytes())
        assert serial_at(listener.port, context) == "other"
        used.certificate.unlink()
        assert serial_at(listener.port, context) == "other"


def test_wrong_files_are_named(tmp_path: Path, pair: Pair) -> None:
    other = make_pair(tmp_path, "other")
    nothing = tmp_path / "nothing.pem"
    (empty := tmp_path / "empty.pem").touch()
    encrypted = tmp_path / "encrypted.key"
    subprocess.run(
        ["openssl", "ec", "-in", str(pair.key), "-aes256", "-passout", "pass:secret", "-out", str(encrypted)],
        check=True, capture_output=True,
    )  # fmt: skip
    for files, what in (
        ((nothing, pair.key), "tls_certificate .*nothing.pem: No such file"),
        ((pair.certificate, nothing), "tls_key .*nothing.pem: No such file"),
        ((pair.certificate, other.key), "key values mismatch"),
        ((empty, pair.key), "tls_certificate .*empty.pem"),
        ((pair.certificate, encrypted), "tls_key .*encrypted.key: "),
        ((*pair, empty), "tls_client_ca .*empty.pem"),
    ):
        with pytest.raises(SettingsError, match=what):
            Certificates(*files)
