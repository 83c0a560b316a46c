"""Bytes over a real connection: received where they belong, written whole, waited for no longer than said."""

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


def test_received_bytes_can_be_given_back_and_taken_in_part() -> None:
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


def test_fill_fills_the_view_however_the_bytes_come() -> None:
    data = os.urandom(300_000)
    pieces = [data[start : start + 7777] for start in range(0, len(data), 7777)]
    with connected_pair() as (ours, theirs), sending(ours, pieces):
        view = memoryview(bytearray(len(data)))
        assert Transport(theirs, 5).fill(view, 5) == len(data)
        assert view == data


def test_fill_stops_at_the_end_of_the_stream() -> None:
    with connected_pair() as (ours, theirs):
        transport, view = Transport(theirs, 5), memoryview(bytearray(10))
        ours.sendall(b"abc")
        ours.shutdown(socket.SHUT_WR)
        assert transport.fill(view, 5) == 3
        assert transport.fill(view, 5) == 0


def test_fill_returns_what_there_is_when_the_time_is_over() -> None:
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


def test_fill_in_parts_takes_no_longer_than_was_said() -> None:
    with connected_pair() as (ours, theirs):
        late = threading.Timer(1.5, ours.sendall, (b"a",))
        late.start()
        started = time.monotonic()
        assert Transport(theirs, 5).fill(memoryview(bytearray(4)), 3.0) == 1
        assert time.monotonic() - started < 4.4  # 4.5 would be the whole time again from the first byte
        late.join()


def test_what_has_come_is_taken_when_the_time_is_over() -> None:
    with connected_pair() as (ours, theirs):
        ours.sendall(b"abc")
        theirs.recv(3, socket.MSG_PEEK | socket.MSG_WAITALL)
        assert Transport(theirs, 5).receive(0) == b"abc"


def test_receive_beyond_keeps_what_does_not_fit() -> None:
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
def test_a_reset_is_a_client_gone(way: str) -> None:
    with connected_pair() as (ours, theirs):
        transport = Transport(theirs, 5)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        ours.close()
        with pytest.raises(ClientGone):
            RECEIVING[way](transport)


def test_many_buffers_and_many_bytes_are_written_whole_and_in_order() -> None:
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


def test_a_client_that_stops_reading_is_given_up() -> None:
    with connected_pair() as (_, theirs), pytest.raises(ClientGone, match="stopped reading"):
        Transport(theirs, 0.1).send([b"x" * 1_000_000] * 20)


def test_wait_wakes_with_the_descriptor_and_ends_with_the_deadline() -> None:
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


def test_waiting_for_a_closed_descriptor_is_an_error_and_not_a_busy_loop() -> None:
    with connected_pair() as (_, theirs), pytest.raises(ValueError, match="not open"):
        Transport(theirs, 5).wait(1_000_000, Deadline.after(5))


@pytest.mark.parametrize("how", ["close", "half-close", "reset", "half-close behind pipelined bytes"])
def test_wait_ends_as_soon_as_the_client_goes(how: str) -> None:
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


def test_linger_reads_until_the_client_closes_or_a_limit_is_reached() -> None:
    with connected_pair() as (ours, theirs):
        ours.sendall(b"x" * 100_000)
        ours.shutdown(socket.SHUT_WR)
        Transport(theirs, 5).linger(1_000_000, 20)
        assert ours.recv(1) == b""
        assert theirs.recv(1) == b""  # nothing is left that would turn the close into a reset
    with connected_pair() as (ours, theirs):
        ours.sendall(b"x" * 100_000)
        Transport(theirs, 5).linger(10_000, 20)
        assert theirs.recv(1) == b"x"
    with connected_pair() as (_, theirs):
        started = time.monotonic()
        Transport(theirs, 5).linger(10_000, 0.05)
        assert time.monotonic() - started < 10


def test_a_wait_longer_than_a_tick_is_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_client_that_takes_a_few_bytes_now_and_then_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "MIN_READ_BYTES_PER_S", 10**8)  # so that what the kernel buffers buys no time
    ended = threading.Event()
    with connected_pair() as (ours, theirs):

        def read() -> None:  # always before the write timeout, so that no single wait is too long
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
