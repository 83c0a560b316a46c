"""The engine `genai` on small random models of each family."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino_genai as og
import pytest
from numpy.typing import NDArray

from ovserve.engines.genai import GenaiEngine, generation_options
from ovserve.engines.protocol import Work
from ovserve.errors import InternalError, InvalidValue, ModelError
from ovserve.models.profile import ModelProfile, read_profile
from ovserve.settings.options import ModelSettings
from ovserve.wire.request import ImageRequest
from ovserve.worker.prepare import check_steps

pytestmark = pytest.mark.engine

MODELS = Path(__file__).parent.parent / "fixtures" / "models"
NOISE: NDArray[np.uint8] = np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8)
HALF = np.zeros((64, 64), np.uint8)
HALF[:, 32:] = 255


def settings_of(kind: str, **values: Any) -> ModelSettings:
    return ModelSettings(name=kind, path=MODELS / kind, engine="genai", **values)


def work(mode: str, **values: Any) -> Work:
    standard: dict[str, Any] = {
        "job": "a",
        "picture": 0,
        "mode": mode,
        "prompt": "a red cat",
        "negative_prompt": "",
        "width": 64,
        "height": 64,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "strength": 1.0,
        "seed": 1,
        "initial_image": None if mode == "text2image" else NOISE,
        "mask_image": HALF if mode == "inpainting" else None,
    }
    return Work(**{**standard, **values})


class Loaded:
    """The loaded engine of one family's model, and the heartbeats of its load."""

    def __init__(self, kind: str) -> None:
        self.beats: list[str] = []
        self.profile: ModelProfile = read_profile(settings_of(kind))
        self.engine = GenaiEngine(self.profile, settings_of(kind))
        self.engine.load(self.beats.append)

    @property
    def is_unet(self) -> bool:
        return not self.profile.traits.is_transformer

    def make(self, mode: str, **values: Any) -> NDArray[np.uint8]:
        piece = work(mode, **values)
        self.engine.admit(piece)
        assert self.engine.phase() == "encode"
        [outcome] = self.engine.turn()
        assert outcome.work is piece
        assert outcome.error is None, outcome.error
        assert outcome.pixels is not None
        assert outcome.pixels.dtype == np.uint8
        assert self.engine.phase() == "idle"
        return outcome.pixels

    def steps_reported(self, mode: str, **values: Any) -> set[int]:
        found: set[int] = set()
        self.make(mode, on_step=lambda _step, steps: found.add(steps), **values)
        return found

    def reject(self, mode: str, **values: Any) -> str | None:
        self.engine.admit(work(mode, **values))
        [outcome] = self.engine.turn()
        assert outcome.pixels is None
        assert isinstance(outcome.error, InvalidValue)
        return outcome.error.param


@pytest.fixture(scope="module", params=["sd", "lcm", "sdxl", "inpaint", "sd3", "flux"])
def loaded(request: pytest.FixtureRequest) -> Iterator[Loaded]:
    found = Loaded(request.param)
    yield found
    found.engine.close()


@pytest.fixture(scope="module")
def sd() -> Iterator[Loaded]:
    found = Loaded("sd")
    yield found
    found.engine.close()


def modes(loaded: Loaded) -> list[str]:
    return sorted(loaded.profile.tasks)


def test_heartbeats_are_sent_during_load_and_warm_up(loaded: Loaded) -> None:
    assert loaded.beats.count("load") >= 3
    assert loaded.beats[-1] == "warm-up"
    assert loaded.engine.capacity == 1
    assert loaded.engine.name == "genai"


def test_every_mode_makes_a_picture_of_the_requested_size(loaded: Loaded) -> None:
    for mode in modes(loaded):
        assert loaded.make(mode).shape == (64, 64, 3)
        tall: dict[str, Any] = {"width": 48, "height": 80}
        if mode != "text2image":
            tall["initial_image"] = np.zeros((80, 48, 3), np.uint8)
        if mode == "inpainting":
            tall["mask_image"] = np.full((80, 48), 255, np.uint8)
        assert loaded.make(mode, **tall).shape == (80, 48, 3)


def test_the_announced_number_of_steps_is_run(loaded: Loaded) -> None:
    for mode in modes(loaded):
        for count, strength in ((5, 0.5), (4, 1.0)):
            strength = 1.0 if mode == "text2image" else strength  # noqa: PLW2901
            request = ImageRequest(task="edit", prompt="", num_inference_steps=count, guidance_scale=3.0)
            announced = check_steps(request, strength, loaded.profile)
            assert loaded.steps_reported(mode, num_inference_steps=count, strength=strength) == {announced}


def test_pictures_depend_on_seed_prompt_and_strength_and_repeat_exactly(loaded: Loaded) -> None:
    for mode in modes(loaded):
        first = loaded.make(mode)
        assert np.array_equal(loaded.make(mode), first)
        assert not np.array_equal(loaded.make(mode, seed=2), first)
        assert not np.array_equal(loaded.make(mode, prompt="a blue house"), first)
        if mode != "text2image":
            assert not np.array_equal(loaded.make(mode, strength=0.5), first)


def test_every_prompt_field_is_accepted_with_and_without_guidance(loaded: Loaded) -> None:
    texts = {
        "negative_prompt": "dog",
        "negative_prompt_2": "tree",
        "negative_prompt_3": "star",
        "prompt_2": "on",
        "prompt_3": "in",
    }
    for mode in modes(loaded):
        for scale in (7.0,) if loaded.profile.family == "sd3" else (0.0, 1.0, 7.0):
            assert loaded.make(mode, guidance_scale=scale, **texts).shape == (64, 64, 3)


def test_negative_prompt_changes_the_picture_where_the_model_takes_one(loaded: Loaded) -> None:
    mode = modes(loaded)[0]
    same = np.array_equal(loaded.make(mode), loaded.make(mode, negative_prompt="dog"))
    assert same != loaded.profile.takes_negative_prompt


def test_offered_schedulers_work_and_do_not_change_the_models_own(loaded: Loaded) -> None:
    mode = modes(loaded)[0]
    before = loaded.make(mode)
    assert bool(loaded.engine.features.schedulers) == loaded.is_unet
    for name in sorted(loaded.engine.features.schedulers):
        assert loaded.make(mode, scheduler=name).shape == (64, 64, 3)
        assert np.array_equal(loaded.make(mode), before)


def test_lcm_offers_only_its_own_scheduler() -> None:
    assert Loaded("lcm").engine.features.schedulers == {"lcm"}


def test_values_that_must_not_reach_the_library_are_rejected(loaded: Loaded) -> None:
    mode = modes(loaded)[0]
    assert loaded.reject(mode, num_inference_steps=0) == "num_inference_steps"
    assert loaded.reject(mode, num_inference_steps=1001) == "num_inference_steps"
    assert loaded.reject(mode, strength=0.0) == "strength"
    assert loaded.reject(mode, strength=1.5) == "strength"
    assert loaded.reject(mode, strength=float("nan")) == "strength"
    assert loaded.reject(mode, scheduler="heun") == "scheduler"
    for missing in {"text2image", "image2image", "inpainting"} - loaded.profile.tasks:
        assert loaded.reject(missing) == "model"
    assert loaded.make(mode).shape == (64, 64, 3)


def test_invalid_working_size_is_an_internal_error(sd: Loaded) -> None:
    sd.engine.admit(work("text2image", width=60))
    [outcome] = sd.engine.turn()
    assert isinstance(outcome.error, InternalError)


# Only UNets: a transformer has no downsampled and upsampled sizes that can disagree.
@pytest.mark.parametrize("loaded", ["sd", "lcm", "sdxl", "inpaint"], indirect=True)
def test_size_that_breaks_a_network_does_not_break_later_pictures(loaded: Loaded) -> None:
    mode = modes(loaded)[0]
    before = loaded.make(mode)
    odd: dict[str, Any] = {"width": 56, "height": 72}  # these networks were traced at multiples of 16
    if mode != "text2image":
        odd["initial_image"] = np.zeros((72, 56, 3), np.uint8)
    if mode == "inpainting":
        odd["mask_image"] = np.full((72, 56), 255, np.uint8)
    loaded.engine.admit(work(mode, **odd))
    [outcome] = loaded.engine.turn()
    assert isinstance(outcome.error, InternalError)
    assert np.array_equal(loaded.make(mode), before)
    assert loaded.reject(mode, **odd) == "size"  # the engine remembers the size
    assert loaded.beats[-1] == "warm-up"


def test_error_of_the_library_ends_only_that_picture(sd: Loaded) -> None:
    sd.engine.admit(work("image2image", initial_image=np.zeros((64, 64, 4), np.uint8)))
    [outcome] = sd.engine.turn()
    assert isinstance(outcome.error, InternalError)
    assert sd.make("image2image").shape == (64, 64, 3)


def test_exception_of_the_binding_ends_only_that_picture(sd: Loaded) -> None:
    sd.engine.admit(work("text2image", seed="one"))
    [outcome] = sd.engine.turn()
    assert isinstance(outcome.error, InternalError)
    assert outcome.error.message.startswith("the engine failed: ")
    assert sd.make("text2image").shape == (64, 64, 3)


def test_second_admission_before_a_turn_is_an_internal_error(sd: Loaded) -> None:
    sd.engine.admit(work("text2image"))
    with pytest.raises(InternalError):
        sd.engine.admit(work("text2image"))
    sd.engine.turn()
    assert sd.engine.turn() == ()


def test_cancelled_picture_is_not_started(sd: Loaded) -> None:
    piece = work("text2image", on_step=lambda step, steps: pytest.fail("it was started"))
    piece.cancelled.set()
    sd.engine.admit(piece)
    [outcome] = sd.engine.turn()
    assert (outcome.pixels, outcome.error) == (None, None)


def test_clip_tokens_are_counted_with_clips_tokenizer(loaded: Loaded) -> None:
    engine, long = loaded.engine, "cat " * 300
    clip = og.Tokenizer(str(loaded.profile.directory / "tokenizer"))
    assert engine.count_tokens(long, clip=True) == clip.encode(long).input_ids.shape[1]
    assert engine.count_tokens(engine.cut_prompt(long, clip=True), clip=True) <= 77
    counts = {engine.count_tokens(long), engine.count_tokens(long, clip=True)}
    assert len(counts) == (2 if loaded.profile.family in ("sd3", "flux") else 1)


def test_all_tokens_are_counted_and_prompts_are_cut_between_words(sd: Loaded) -> None:
    assert sd.engine.count_tokens("") == 2
    assert sd.engine.count_tokens("a red cat") == 5
    assert sd.engine.count_tokens("cat " * 300) == 302
    cut = sd.engine.cut_prompt("cat\n " * 300)
    assert cut.split() == ["cat"] * 75
    assert sd.engine.count_tokens(cut) == 77
    cut = sd.engine.cut_prompt("x" * 1000)
    assert 38 < sd.engine.count_tokens(cut) <= 77


def test_options_contain_only_what_the_model_accepts() -> None:
    sd, lcm = (read_profile(settings_of(kind)) for kind in ("sd", "lcm"))
    full = work("text2image", negative_prompt="n", prompt_2="p2", negative_prompt_2="n2", prompt_3="p3")
    assert generation_options(full, sd)["negative_prompt"] == "n"
    assert "prompt_2" not in generation_options(full, sd)
    assert "negative_prompt" not in generation_options(full, lcm)
    assert "strength" not in generation_options(full, sd)
    assert generation_options(full, sd)["rng_seed"] == 1


@pytest.mark.parametrize(
    "values",
    [{"device": "TPU"}, {"device": "CPU CPU TPU"}, {"plugin_config": '{"NO_SUCH_PROPERTY": 1}'}],
    ids=["device", "one of three devices", "property"],
)
def test_load_failure_names_the_model(values: dict[str, Any]) -> None:
    settings = settings_of("sd", **values)
    with pytest.raises(ModelError, match="model sd: "):
        GenaiEngine(read_profile(settings), settings).load(lambda phase: None)


def test_devices_threads_properties_and_cache_are_passed_to_the_library(tmp_path: Path) -> None:
    values = {
        "device": "CPU CPU CPU",
        "threads": 1,
        "plugin_config": '{"NUM_STREAMS": 1}',
        "cache_dir": tmp_path / "cache",
    }
    settings = settings_of("sd", **values)
    GenaiEngine(read_profile(settings), settings).load(lambda phase: None)
    assert any((tmp_path / "cache").iterdir())
