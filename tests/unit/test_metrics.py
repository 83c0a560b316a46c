"""Metrics: labels are bounded; outcomes of status codes."""

from __future__ import annotations

import pytest

from ovserve.api.record import OUTCOMES, outcome_of
from ovserve.metrics import MAX_KEYS, Metrics


def test_keys_beyond_the_limit_share_a_label() -> None:
    metrics = Metrics()
    names = [f"key{number}" for number in range(MAX_KEYS + 10)]
    labels = [metrics.key_label(name, is_verified=True) for name in names]
    assert labels == [*names[:MAX_KEYS], *["(other)"] * 10]
    assert metrics.key_label("key0", is_verified=True) == "key0"
    assert metrics.key_label("", is_verified=True) == "(unnamed)"
    assert metrics.key_label("", is_verified=False) == "(none)"


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(200, "ok"), (304, "ok"), (400, "client_error"), (404, "client_error"), (429, "rate_limited"), (499, "gone"),
     (500, "server_error"), (503, "server_error"), (504, "server_error")],
)  # fmt: skip
def test_outcome_of_a_status(status: int, outcome: str) -> None:
    assert outcome_of(status) == outcome
    assert outcome in OUTCOMES
