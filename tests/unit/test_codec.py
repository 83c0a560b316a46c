"""Codec: every message survives encoding; every other line raises LinkGarbage."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.errors import LinkGarbage
from ovserve.wire.codec import MESSAGE_BYTES, decode, encode
from ovserve.wire.messages import (
    Cancel,
    Counts,
    Done,
    Failed,
    Grant,
    Heartbeat,
    LogLevel,
    Message,
    Need,
    Picture,
    Prepared,
    Progress,
    Ready,
    Run,
    Span,
    Stop,
)

short = st.text(max_size=60)
whole = st.integers(min_value=-1, max_value=2**40)
seconds = st.floats(min_value=0, max_value=1e9, allow_nan=False)
messages = st.one_of(
    st.builds(Run, short, short, seconds, st.booleans()),
    st.builds(Cancel, short),
    st.builds(Grant, short, whole, short),
    st.builds(Stop),
    st.builds(Ready, whole, short, short, st.dictionaries(short, whole, max_size=3)),
    st.builds(Heartbeat, short, seconds),
    st.builds(LogLevel, short),
    st.builds(Span, short, short, seconds, seconds, st.integers(-1, 99), st.integers(0, 99)),
    st.builds(Counts, *[st.integers(0, 10**15)] * 6),
    st.builds(Prepared, short, short, whole, whole, whole, whole, whole, whole, short),
    st.builds(Progress, short, whole, whole, whole),
    st.builds(Need, short, whole, whole, whole),
    st.builds(Picture, short, whole, whole, whole, whole),
    st.builds(Done, short, seconds, seconds, seconds),
    st.builds(Failed, short, st.dictionaries(short, st.one_of(short, whole, st.none()), max_size=3)),
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


@given(messages)
def test_every_message_survives_encoding(message: Message) -> None:
    line = encode(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert len(line) <= MESSAGE_BYTES
    assert decode(line) == message


@given(st.binary(max_size=300))
def test_random_bytes_raise_only_link_garbage(line: bytes) -> None:
    try:
        decode(line)
    except LinkGarbage:
        return
    pytest.fail("random bytes were decoded to a message")


@given(messages, st.data())
def test_mutated_messages_raise_link_garbage_or_are_well_typed(message: Message, data: st.DataObject) -> None:
    values: dict[str, Any] = json.loads(encode(message))
    key = data.draw(st.sampled_from(sorted(values)))
    values[key] = data.draw(json_values)
    try:
        found = decode(json.dumps(values).encode())
    except LinkGarbage:
        return
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        kinds = {"str": str, "int": int, "float": (int, float), "bool": bool, "dict[str, Any]": dict}
        assert isinstance(value, kinds[str(field.type)])
        if isinstance(value, int | float):
            assert math.isfinite(float(value))


@pytest.mark.parametrize(
    "line",
    [
        b"\x80\x04\x95",  # a pickle
        b"null",
        b"[]",
        b'"run"',
        b"{}",
        b'{"kind":"nothing"}',
        b'{"kind":["run"]}',
        b'{"kind":{}}',
        b'{"kind":"cancel"}',
        b'{"kind":"cancel","job":1}',
        b'{"kind":"cancel","job":"a","more":1}',
        b'{"kind":"ready","capacity":true,"engine":"x"}',
        b'{"kind":"heartbeat","phase":"idle","allow_s":NaN}',
        b'{"kind":"heartbeat","phase":"idle","allow_s":Infinity}',
        b'{"kind":"heartbeat","phase":"idle","allow_s":1e999}',
        b'{"kind":"heartbeat","phase":"idle","allow_s":1' + b"0" * 400 + b"}",
        b'{"kind":"need","job":"a","picture":0,"size":1' + b"0" * 40 + b"}",
        b"[" * 4000,
        b'{"a":' * 800,
        b"1" * 4095,
    ],
)
def test_line_that_is_not_a_message_raises_link_garbage(line: bytes) -> None:
    with pytest.raises(LinkGarbage):
        decode(line)


def test_encoding_a_message_longer_than_an_atomic_write_raises_value_error() -> None:
    with pytest.raises(ValueError, match="4096"):
        encode(Cancel("x" * MESSAGE_BYTES))
