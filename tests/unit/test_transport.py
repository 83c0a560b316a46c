"""Transport over a real connection: receiving, sending, waiting, and the time limit of each."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable

import pytest

from ovserve.deadline import Deadline
from ovserve.errors import ClientGone
from ovserve.front import transport as transport_module
from ovserve.front.transport import Transport
from tests.sockets import connected_pair, sending


def test_received_bytes_can_be_unread_and_taken_in_part() -> None:
    with connected_pair() as (ours, theirs):
        transport = Transport(theirs, 5)
        ours.sendall(b"head body")
        data = transport.receive(5)
        assert data == b"head body"
        assert not transport.has_pending
        transport.unread(data, 5)
        view = memoryview(bytearray(3))
        assert transport.take_into(view) == 3
        assert bytes(view) == b"bod"
        assert transport.has_pending
        assert transport.take_pending() == b"y"
        assert transport.take_pending() == b""
        assert transport.take_into(view) == 0


def test_fill_fills_the_view_whatever_the_pieces() -> None:
    data = os.urandom(300_000)
    pieces = [data[start : start + 7777] for start in range(0, len(data), 7777)]
    with connected_pair() as (ours, theirs), sending(ours, pieces):
        view = memoryview(bytearray(len(data)))
        assert Transport(theirs, 5).fill(view, 5) == len(data)
        assert view == data


def test_fill_stops_at_end_of_file() -> None:
    with connected_pair() as (ours, theirs):
        transport, view = Transport(theirs, 5), memoryview(bytearray(10))
        ours.sendall(b"abc")
        ours.shutdown(socket.SHUT_WR)
        assert transport.fill(view, 5) == 3
        assert transport.fill(view, 5) == 0


def test_fill_returns_received_bytes_at_the_timeout() -> None:
    with connected_pair() as (ours, theirs):
        transport, view = Transport(theirs, 5), memoryview(bytearray(10))
        ours.sendall(b"abc")
        assert transport.fill(view, 0.05) == 3
        with pytest.raises(TimeoutError):
            transport.fill(view, 0.05)
        with pytest.raises(TimeoutError):
            transport.receive(0)
        with pytest.raises(TimeoutError):
            transport.receive_beyond(view, 0.01)


def test_fill_in_parts_keeps_its_total_timeout() -> None:
    with connected_pair() as (ours, theirs):
        late = threading.Timer(1.5, ours.sendall, (b"a",))
        late.start()
        started = time.monotonic()
        assert Transport(theirs, 5).fill(memoryview(bytearray(4)), 3.0) == 1
        assert time.monotonic() - started < 4.4  # 4.5 s if the timeout began again at the first byte
        late.join()


def test_arrived_bytes_are_received_with_a_timeout_of_zero() -> None:
    with connected_pair() as (ours, theirs):
        ours.sendall(b"abc")
        theirs.recv(3, socket.MSG_PEEK | socket.MSG_WAITALL)
        assert Transport(theirs, 5).receive(0) == b"abc"


def test_receive_beyond_keeps_the_excess_pending() -> None:
    with connected_pair() as (ours, theirs):
        transport, view = Transport(theirs, 5), memoryview(bytearray(4))
        ours.sendall(b"abcdef")
        theirs.recv(6, socket.MSG_PEEK | socket.MSG_WAITALL)
        assert transport.receive_beyond(view, 5) == 4
        assert bytes(view) == b"abcd"
        assert transport.take_pending() == b"ef"
        ours.sendall(b"gh")
        assert transport.receive_beyond(view, 5) == 2
        assert bytes(view[:2]) == b"gh"
        assert not transport.has_pending


RECEIVING: dict[str, Callable[[Transport], object]] = {
    "receive": lambda transport: transport.receive(5),
    "fill": lambda transport: transport.fill(memoryview(bytearray(4)), 5),
    "receive_beyond": lambda transport: transport.receive_beyond(memoryview(bytearray(4)), 5),
    "send": lambda transport: [transport.send([b"x" * 100_000]) for _ in range(3)],
}


@pytest.mark.parametrize("way", RECEIVING)
def test_reset_raises_client_gone(way: str) -> None:
    with connected_pair() as (ours, theirs):
        transport = Transport(theirs, 5)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        ours.close()
        with pytest.raises(ClientGone):
            RECEIVING[way](transport)


def test_many_buffers_are_written_whole_and_in_order() -> None:
    buffers: list[bytes | memoryview] = [bytes([index % 251]) * (index % 7) for index in range(1500)]
    buffers += [b"", memoryview(os.urandom(3_000_000)), b"end"]
    expected = b"".join(buffers)
    with connected_pair() as (ours, theirs):
        received = bytearray()
        reader = threading.Thread(
            target=lambda: [received.extend(piece) for piece in iter(lambda: ours.recv(65536), b"")]
        )
        reader.start()
        assert Transport(theirs, 5).send(buffers) == len(expected)
        theirs.shutdown(socket.SHUT_WR)
        reader.join()
        assert received == expected


def test_client_that_stops_reading_raises_client_gone() -> None:
    with connected_pair() as (_, theirs), pytest.raises(ClientGone, match="stopped reading"):
        Transport(theirs, 0.1).send([b"x" * 1_000_000] * 20)


def test_reader_below_the_required_rate_raises_client_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "RATE_WINDOW_S", 0.2)
    monkeypatch.setattr(transport_module, "MAX_KERNEL_WAIT_S", 0.05)
    with connected_pair() as (_, theirs):
        transport = Transport(theirs, 60)
        transport.required_rate = lambda: 1.0
        with pytest.raises(ClientGone, match="fewer than 1 bytes a second, while another client waits"):
            transport.send([b"x" * 1_000_000] * 20)


def test_stop_ends_a_write_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "MAX_KERNEL_WAIT_S", 0.05)
    with connected_pair() as (_, theirs):
        transport = Transport(theirs, 60)
        stopping = threading.Timer(0.1, transport.stop)
        stopping.start()
        with pytest.raises(ClientGone, match="another client waits"):
            transport.send([b"x" * 1_000_000] * 20)
        stopping.join()


def test_wait_ends_with_the_descriptor_or_the_deadline() -> None:
    descriptor = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        with connected_pair() as (_, theirs):
            transport = Transport(theirs, 5)
            assert not transport.wait(descriptor, Deadline.after(0.02))
            assert not transport.wait(descriptor, Deadline.after(0))
            os.eventfd_write(descriptor, 1)
            assert transport.wait(descriptor, Deadline.after(5))
            assert transport.wait(descriptor, Deadline.after(0))
    finally:
        os.close(descriptor)


def test_wait_for_a_closed_descriptor_raises() -> None:
    with connected_pair() as (_, theirs), pytest.raises(ValueError, match="not open"):
        Transport(theirs, 5).wait(1_000_000, Deadline.after(5))


@pytest.mark.parametrize("how", ["close", "half-close", "reset", "half-close behind pipelined bytes"])
def test_wait_ends_as_soon_as_the_client_closes(how: str) -> None:
    descriptor = os.eventfd(0)
    try:
        with connected_pair() as (ours, theirs):
            transport = Transport(theirs, 5)
            leave = threading.Timer(0.05, lambda: leaving(ours, how))
            leave.start()
            started = time.monotonic()
            with pytest.raises(ClientGone):
                transport.wait(descriptor, Deadline.after(20))
            assert time.monotonic() - started < 10
            leave.join()
    finally:
        os.close(descriptor)


def leaving(ours: socket.socket, how: str) -> None:
    if how == "reset":
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    if "pipelined" in how:
        ours.sendall(b"GET / HTTP/1.1\r\n")
    if "half" in how:
        ours.shutdown(socket.SHUT_WR)
    else:
        ours.close()


def test_wait_longer_than_the_kernel_timeout_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovserve.front.transport.MAX_KERNEL_WAIT_S", 0.03)
    with connected_pair() as (ours, theirs):
        transport = Transport(theirs, 5)
        later = threading.Timer(0.15, ours.sendall, (b"late",))
        later.start()
        assert transport.receive(10) == b"late"
        later.join()
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            transport.receive(0.1)
        assert 0.05 < time.monotonic() - started < 5


def test_client_below_the_minimum_read_rate_raises_client_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "MIN_READ_BYTES_PER_S", 10**8)  # so that bytes in kernel buffers add no time
    ended = threading.Event()
    with connected_pair() as (ours, theirs):

        def read() -> None:  # more often than the write timeout, so that no single wait is too long
            while not ended.wait(0.01):
                ours.recv(200_000)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            with pytest.raises(ClientGone, match="fewer than"):
                Transport(theirs, 0.3).send([bytes(64 * 1024 * 1024)])
        finally:
            ended.set()
            reader.join()
