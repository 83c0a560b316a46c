"""The built-in model: complete, small, with the profile that its files declare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ovserve.errors import ModelError
from ovserve.models.profile import builtin_directory, read_profile
from ovserve.settings.options import ModelSettings
from tests.live import BUILTIN_PATH

MAX_BYTES = 15_000_000


MODELS = ("shapes", "things")
FILES = {"shapes": (), "things": ("NOTICE",)}  # beside the model: the licence of what it was trained on


@pytest.mark.parametrize("name", MODELS)
def test_package_contains_every_component_within_the_size_limit(name: str) -> None:
    directory = builtin_directory(name)
    present = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    graphs = {f"{part}/openvino_model" for part in ("text_encoder", "unet", "vae_encoder", "vae_decoder")}
    graphs.add("tokenizer/openvino_tokenizer")
    configs = {"model_index.json", "ovserve.json", "scheduler/scheduler_config.json", "MODEL_CARD.md", *FILES[name]}
    configs |= {f"{part}/config.json" for part in ("text_encoder", "unet", "vae_encoder", "vae_decoder")}
    assert present == {f"{graph}.{suffix}" for graph in graphs for suffix in ("xml", "bin")} | configs
    assert sum((directory / file).stat().st_size for file in present) < MAX_BYTES


@pytest.mark.parametrize("name", MODELS)
def test_scheduler_spacing_does_not_run_an_extra_timestep(name: str) -> None:
    config = json.loads((builtin_directory(name) / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    assert config["timestep_spacing"] == "leading"
    assert config["clip_sample"] is False  # OpenVINO GenAI rejects DDIM otherwise


@pytest.mark.parametrize(("name", "tokens"), [("shapes", 32), ("things", 77)])
def test_profile_has_the_defaults_of_the_model_and_not_of_its_family(name: str, tokens: int) -> None:
    profile = read_profile(ModelSettings(name=name, path=Path(f"builtin:{name}")))
    assert (profile.family, profile.tasks) == (
        "stable-diffusion",
        frozenset({"text2image", "image2image", "inpainting"}),
    )
    assert (profile.native.width, profile.native.height) == (256, 256)
    assert (profile.min_side_px, profile.max_side_px) == (256, 256)
    assert profile.defaults.num_inference_steps == 12
    assert profile.defaults.guidance_scale == 3.0
    assert profile.defaults.strength == 0.7
    assert profile.defaults.strength_inpainting == 1.0
    assert profile.prompt_tokens == tokens


def test_presets_order_steps_by_quality_and_high_equals_the_default() -> None:
    profile = read_profile(ModelSettings(name="shapes", path=Path(BUILTIN_PATH)))
    steps = [profile.presets[name]["num_inference_steps"] for name in ("low", "medium", "high")]
    assert steps == sorted(set(steps))
    assert steps[-1] == profile.defaults.num_inference_steps


def test_path_builtin_shapes_is_the_default_model() -> None:
    named = read_profile(ModelSettings(name="shapes", path=Path(BUILTIN_PATH)))
    assert named == read_profile(ModelSettings(name="shapes"))
    assert named.directory == builtin_directory() == builtin_directory("shapes")


@pytest.mark.parametrize("name", ["", "other", "Shapes", "shapes/unet", "../front"])
def test_unknown_builtin_model_is_an_error_with_the_known_names(name: str) -> None:
    with pytest.raises(
        ModelError, match=f"^builtin:{name}: not one of the built-in models: builtin:shapes, builtin:things$"
    ):
        read_profile(ModelSettings(name="b", path=Path(f"builtin:{name}")))


def test_absolute_path_is_a_directory_whatever_its_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        read_profile(ModelSettings(name="b", path=tmp_path / "builtin:shapes"))
