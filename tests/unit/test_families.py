"""The families that engine `stepwise` drives: their inputs, guidance, schedulers, and which rows share a call."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ovserve.engines.families.guidance import RowGuidance
from ovserve.engines.families.lcm import EmbeddedGuidance, guidance_embedding
from ovserve.engines.families.lookup import DRIVEN_FAMILIES, family_for
from ovserve.engines.families.protocol import Conditions, DenoiserRow, Family, Start
from ovserve.engines.families.unet import run_unet
from ovserve.engines.protocol import Work
from ovserve.errors import ModelError
from ovserve.models.families import FAMILIES
from ovserve.models.profile import ModelProfile, read_profile
from tests.pictures import directory_of, settings_of, work_of

ENCODINGS = {"": 0.0, "a cat": 1.0, "a dog": 2.0, "more": 3.0}
TYPES = {"sample": np.float32, "timestep": np.int64, "encoder_hidden_states": np.float32}


def profile_of(model: str) -> ModelProfile:
    return read_profile(settings_of(directory_of(model)))


def family_of(model: str) -> Family:
    return family_for(profile_of(model))


def encode(index: int, prompts: Any) -> list[tuple[np.ndarray, ...]]:
    """Encode each prompt as its number in ENCODINGS, plus 10 for the second encoder; pooled: 100 more."""
    values = [ENCODINGS[prompt] + 10 * index for prompt in prompts]
    return [(np.full((77, 2), value, np.float32), np.full(3, value + 100, np.float32)) for value in values]


def work(model: str, **options: Any) -> Work:
    return work_of(profile_of(model), "text2image", prompt="a cat", **options)


def test_driven_families_are_in_the_table() -> None:
    assert FAMILIES.keys() >= DRIVEN_FAMILIES


def test_family_without_a_module_is_rejected_with_those_that_have_one() -> None:
    unknown = dataclasses.replace(profile_of("sd"), family="sana")
    with pytest.raises(ModelError, match=r"does not serve family sana, only flux, flux-fill, .*, stable-diffusion"):
        family_for(unknown)


@pytest.mark.parametrize(("model", "channels", "takes_mask"), [("sd", 4, False), ("inpaint", 9, True)])
def test_channels_are_those_of_the_latents_or_with_mask_and_masked_image(
    model: str, channels: int, takes_mask: bool
) -> None:
    family = family_of(model)
    assert (family.channels, family.takes_mask) == (channels, takes_mask)
    family.check_channels(4)
    with pytest.raises(ModelError, match=f"in_channels is {channels}; expected 3, or 7 for inpainting"):
        family.check_channels(3)


def test_guided_picture_has_a_row_for_each_prompt() -> None:
    found = family_of("sd").conditions(work("sd", negative_prompt="a dog"), encode)
    assert found.rows == 2
    assert found.arrays["encoder_hidden_states"][:, 0, 0].tolist() == [2.0, 1.0]
    assert family_of("sd").conditions(work("sd", guidance_scale=1.0), encode).rows == 1


def test_lcm_has_one_row_and_an_embedding_of_the_guidance_scale() -> None:
    family = family_of("lcm")
    assert isinstance(family.guidance, EmbeddedGuidance)
    found = family.conditions(work("lcm", guidance_scale=8.5), encode)
    assert found.rows == 1
    assert np.array_equal(found.arrays["timestep_cond"], guidance_embedding(8.5, 16))


@pytest.mark.parametrize(
    ("negative", "small", "large", "pooled"),
    [
        ({}, [0.0, 3.0], [0.0, 11.0], [0.0, 111.0]),  # force_zeros_for_empty_prompt
        ({"negative_prompt": "a dog"}, [2.0, 3.0], [12.0, 11.0], [112.0, 111.0]),
        ({"negative_prompt": "a dog", "negative_prompt_2": "more"}, [3.0, 3.0], [12.0, 11.0], [112.0, 111.0]),
    ],
)
def test_sdxl_concatenates_both_encoders_and_adds_pooled_embedding_and_size(
    negative: dict[str, str], small: list[float], large: list[float], pooled: list[float]
) -> None:
    found = family_of("sdxl").conditions(work("sdxl", prompt_2="more", **negative), encode).arrays
    assert found["encoder_hidden_states"][:, 0, 0].tolist() == small
    assert found["encoder_hidden_states"][:, 0, -1].tolist() == large
    assert found["text_embeds"][:, 0].tolist() == pooled
    assert found["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 2


def test_only_models_that_are_not_distilled_take_other_schedulers() -> None:
    document = {"num_train_timesteps": 1000, "clip_sample": False, "skip_prk_steps": True}
    own, offered = family_of("sd").schedulers(document, "PNDM")
    assert own == "pndm"
    assert {"ddim", "euler", "unipc"} <= offered.keys()
    assert family_of("lcm").schedulers(document, "LCM")[1].keys() == {"lcm"}


@pytest.mark.parametrize(("timestep_per_row", "timesteps"), [(True, [7, 7, 3]), (False, [7])])
def test_feed_has_the_sample_of_each_row_and_only_inputs_of_the_model(
    timestep_per_row: bool, timesteps: list[int]
) -> None:
    both = Conditions({"encoder_hidden_states": np.arange(2.0)[:, None, None], "time_ids": np.zeros((2, 6))}, 2)
    first, second = np.full((1, 4, 2, 2), 5.0, np.float32), np.full((1, 4, 2, 2), 6.0, np.float32)
    rows = [DenoiserRow(first, 7, both, 0), DenoiserRow(first, 7, both, 1), DenoiserRow(second, 3, both, 1)]
    feed = family_of("sd").feed(rows, TYPES, timestep_per_row=timestep_per_row)
    assert feed.keys() == TYPES.keys()
    assert feed["sample"][:, 0, 0, 0].tolist() == [5.0, 5.0, 6.0]
    assert feed["encoder_hidden_states"].ravel().tolist() == [0.0, 1.0, 1.0]
    assert feed["timestep"].tolist() == timesteps


class IdleRequest:
    """An infer request of which `infer` writes nothing."""

    def __init__(self, output: np.ndarray) -> None:
        self.tensor = SimpleNamespace(data=output, size=output.size)

    def infer(self, inputs: Any, **options: Any) -> None:
        pass

    def get_output_tensor(self, index: int) -> Any:
        return self.tensor


@pytest.mark.parametrize("shape", [(0, 4, 0, 0), (2, 4, 8, 8), (1, 4, 8, 8), (2, 4, 16, 16)])
def test_output_that_the_call_has_not_written_is_an_error(shape: tuple[int, ...]) -> None:
    feed = {"sample": np.zeros((2, 4, 8, 8), np.float32)}
    with pytest.raises(RuntimeError, match="cannot work on 8 x 8 latents"):
        run_unet(IdleRequest(np.ones(shape, np.float32)), feed)


def test_pictures_share_a_call_at_one_size_and_at_one_timestep_where_the_call_takes_only_one() -> None:
    family, small, wide = family_of("sd"), np.zeros((1, 4, 8, 8), np.float32), np.zeros((1, 4, 8, 16), np.float32)
    start = Start(Conditions({}, 1), small, lambda shape: np.zeros(shape, np.float32))

    def shares(other: np.ndarray, timestep: int, *, timestep_per_row: bool) -> bool:
        keys = [
            family.sharing_key(latents, start, at, timestep_per_row=timestep_per_row)
            for latents, at in ((small, 1), (other, timestep))
        ]
        return keys[0] == keys[1]

    assert shares(small, 2, timestep_per_row=True)
    assert not shares(wide, 1, timestep_per_row=True)
    assert shares(small, 1, timestep_per_row=False)
    assert not shares(small, 2, timestep_per_row=False)


def test_reused_difference_gives_the_guided_prediction() -> None:
    without, given = np.array([1.0, 2.0], np.float32), np.array([3.0, 1.0], np.float32)
    guided, difference = RowGuidance().combine([without, given], work("sd", guidance_scale=3.0))
    assert guided.tolist() == [7.0, -1.0]
    assert RowGuidance().reuse(given, difference, work("sd", guidance_scale=3.0)).tolist() == [7.0, -1.0]
