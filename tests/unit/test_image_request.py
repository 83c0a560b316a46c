"""ImageRequest: every request survives JSON; other data raises LinkGarbage."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.errors import LinkGarbage
from ovserve.wire.blobs import Blob
from ovserve.wire.request import ImageRequest

short = st.text(max_size=60)
whole = st.integers(min_value=-1, max_value=2**40)
requests = st.builds(
    ImageRequest,
    task=st.sampled_from(["edit", "generation", "variation"]),
    prompt=st.text(),
    negative_prompt=st.text(),
    images=st.lists(st.builds(Blob, short, whole, whole), max_size=3).map(tuple),
    mask=st.one_of(st.none(), st.builds(Blob, short, whole, whole)),
    n=st.integers(1, 10),
    seed=st.integers(0, 2**32 - 1),
    strength=st.one_of(st.none(), st.floats(0, 1)),
    metadata=st.booleans(),
)


@given(requests)
def test_every_request_survives_json(request: ImageRequest) -> None:
    assert ImageRequest.from_json(request.to_json()) == request


def test_json_has_only_fields_that_differ_from_their_defaults() -> None:
    assert json.loads(ImageRequest(task="edit", prompt="a cat").to_json()) == {"task": "edit", "prompt": "a cat"}


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"task":"edit"}', b'{"task":"edit","prompt":"x","extra":1}', b"[" * 5000, b"\xff"]
)
def test_data_that_is_not_a_request_raises_link_garbage(data: bytes) -> None:
    with pytest.raises(LinkGarbage):
        ImageRequest.from_json(data)
