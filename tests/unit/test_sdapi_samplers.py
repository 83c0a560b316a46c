"""Names of samplers and schedulers of AUTOMATIC1111's API, and ours."""

from __future__ import annotations

import pytest

from ovserve.api.parameters.fields import SCHEDULERS
from ovserve.api.sdapi.samplers import (
    resolve_scheduler,
    sampler_label,
    samplers_document,
    schedulers_document,
    with_labels,
)
from ovserve.errors import NotFound, Unprocessable


@pytest.mark.parametrize(
    ("sampler", "scheduler", "ours"),
    [
        ("", "", ""),
        ("", "automatic", ""),
        ("Automatic", "", ""),
        ("Euler", "", "euler"),
        ("euler A", "Automatic", "euler_ancestral"),
        ("k_euler_a", "uniform", "euler_ancestral"),
        ("DPM++ 2M", "", "dpmpp_2m_karras"),  # the default of this sampler there
        ("DPM++ 2M", "Karras", "dpmpp_2m_karras"),
        ("DPM++ 2M", "normal", "dpmpp_2m"),
        ("DPM++ 2M Karras", "", "dpmpp_2m_karras"),
        ("DDIM", "sgm_uniform", "ddim"),
        ("PLMS", "", "pndm"),
        ("UniPC", "simple", "unipc"),
        ("LCM", "", "lcm"),
    ],
)
def test_names_are_resolved(sampler: str, scheduler: str, ours: str) -> None:
    assert resolve_scheduler(sampler, scheduler) == ours


@pytest.mark.parametrize("sampler", ["Heun", "DPM++ SDE", "Euler b", "x" * 500])
def test_unknown_sampler_is_404_with_the_known_ones(sampler: str) -> None:
    with pytest.raises(NotFound, match=r"Sampler not found: .*DPM"):
        resolve_scheduler(sampler, "")


@pytest.mark.parametrize(("sampler", "scheduler"), [("Euler", "karras"), ("", "karras"), ("Euler", "exponential")])
def test_scheduler_that_does_not_exist_is_422(sampler: str, scheduler: str) -> None:
    with pytest.raises(Unprocessable) as caught:
        resolve_scheduler(sampler, scheduler)
    assert caught.value.param == "scheduler"


def test_lists_offer_every_scheduler_of_ours_under_names_that_work() -> None:
    found = set()
    for sampler in samplers_document():
        for name in (sampler["name"], *sampler["aliases"]):
            found |= {resolve_scheduler(name, spacing) for spacing in ("automatic", "uniform")}
    assert found == set(SCHEDULERS)
    for row in schedulers_document():
        for name in (row["name"], *(row["aliases"] or ())):
            resolve_scheduler("DPM++ 2M", name)


def test_labels_are_names_that_work() -> None:
    for ours in SCHEDULERS:
        label = sampler_label(ours, "")
        assert resolve_scheduler(label, "uniform") == ours
        assert with_labels(f"scheduler {ours} is") == f"scheduler {label} is"
    assert sampler_label("", "FlowMatchEulerDiscrete") == "Euler"
    assert sampler_label("", "SomethingNew") == "SomethingNew"
