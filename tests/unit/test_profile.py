"""Model profiles, read from the directory without loading the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.errors import ModelError, SettingsError
from ovserve.models.profile import builtin_directory, read_profile
from ovserve.settings.options import ModelSettings, Resolution
from tests.live import BUILTIN_PATH


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of the built-in model's directory with empty weight files."""
    target = tmp_path / "m"
    for source in builtin_directory().rglob("*"):
        copy = target / source.relative_to(builtin_directory())
        if source.is_dir():
            copy.mkdir(parents=True)
        else:
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix == ".json":
                shutil.copy(source, copy)
            else:
                copy.touch()
    return target


def test_profile_of_the_builtin_model() -> None:
    profile = read_profile(ModelSettings(name="b", path=Path(BUILTIN_PATH)))
    assert profile.family == "stable-diffusion"
    assert profile.tasks == {"text2image", "image2image", "inpainting"}
    assert (profile.native, profile.side_multiple_px) == (Resolution(256, 256), 16)
    assert profile.prompt_tokens == 32
    assert profile.scheduling.name == "DDIM"


def test_prompt_rules_in_ovserve_json_are_used(directory: Path) -> None:
    (directory / "ovserve.json").write_text("{}")
    plain = read_profile(ModelSettings(name="m", path=directory))
    assert (plain.cuts_prompt, plain.drops_unknown_words) == (False, False)
    (directory / "ovserve.json").write_text('{"prompts": {"too_long": "cut", "unknown_words": "drop"}}')
    found = read_profile(ModelSettings(name="m", path=directory))
    assert (found.cuts_prompt, found.drops_unknown_words) == (True, True)
    (directory / "ovserve.json").write_text('{"prompts": {"too_long": "shorten"}}')
    with pytest.raises(ModelError, match=r"prompts.too_long is 'shorten'; expected one of refuse, cut"):
        read_profile(ModelSettings(name="m", path=directory))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model_index.json", "model index"),
        ("unet/openvino_model.xml", "'unet'"),
        ("unet/openvino_model.bin", "'unet'"),
        ("unet/config.json", "denoiser's configuration"),
        ("vae_decoder", "'vae_decoder'"),
        ("text_encoder", "'text_encoder'"),
        ("tokenizer/openvino_tokenizer.xml", "'tokenizer'"),
        ("scheduler/scheduler_config.json", "scheduler"),
        ("vae_encoder/openvino_model.bin", "'vae_encoder'"),
    ],
)
def test_missing_component_is_named(directory: Path, missing: str, message: str) -> None:
    target = directory / missing
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    with pytest.raises(ModelError, match=message):
        read_profile(ModelSettings(name="m", path=directory))


def test_missing_directory_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        read_profile(ModelSettings(name="m", path=tmp_path / "nowhere"))


def test_symlink_loop_is_reported_as_missing_directory(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ModelError, match="no such directory"):
        read_profile(ModelSettings(name="m", path=tmp_path / "a"))


@pytest.mark.parametrize("text", ["[" * 100_000, f'{{"sample_size": 1{"0" * 5000}}}', '{"sample_size": 1e999}'])
def test_hostile_json_raises_model_error(directory: Path, text: str) -> None:
    (directory / "unet" / "config.json").write_text(text)
    with pytest.raises(ModelError):
        read_profile(ModelSettings(name="m", path=directory))


def test_unsupported_pipeline_class_is_rejected(directory: Path) -> None:
    index = json.loads((directory / "model_index.json").read_text())
    (directory / "model_index.json").write_text(json.dumps({**index, "_class_name": "AudioLDMPipeline"}))
    with pytest.raises(ModelError, match="AudioLDMPipeline"):
        read_profile(ModelSettings(name="m", path=directory))


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_unreadable_json_names_the_file(directory: Path, text: str) -> None:
    (directory / "model_index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model_index\.json"):
        read_profile(ModelSettings(name="m", path=directory))


def test_model_without_vae_encoder_supports_only_text2image(directory: Path) -> None:
    shutil.rmtree(directory / "vae_encoder")
    assert read_profile(ModelSettings(name="m", path=directory)).tasks == {"text2image"}


def test_unet_with_nine_channels_supports_only_inpainting(directory: Path) -> None:
    config = json.loads((directory / "unet/config.json").read_text())
    (directory / "unet/config.json").write_text(json.dumps({**config, "in_channels": 9}))
    profile = read_profile(ModelSettings(name="m", path=directory))
    assert profile.inpainting_unet
    assert profile.tasks == {"inpainting"}


def test_sizes_in_ovserve_json_are_used(directory: Path) -> None:
    sizes = {"native": "128x64", "min_side_px": 64, "max_side_px": 256, "side_multiple_px": 32}
    (directory / "ovserve.json").write_text(json.dumps({"sizes": sizes}))
    profile = read_profile(ModelSettings(name="m", path=directory))
    assert (profile.native, profile.side_multiple_px) == (Resolution(128, 64), 32)
    assert profile.working_size(100, 70) == Resolution(128, 96)


def test_operator_defaults_override_the_directory(directory: Path) -> None:
    settings = ModelSettings(
        name="m", path=directory, default_num_inference_steps=7, default_guidance_scale=1.5, default_strength=0.4
    )
    defaults = read_profile(settings).defaults
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.strength) == (7, 1.5, 0.4)


def test_default_outside_the_limits_raises_settings_error(directory: Path) -> None:
    with pytest.raises(SettingsError, match="num_inference_steps"):
        read_profile(ModelSettings(name="m", path=directory, max_num_inference_steps=3))
    with pytest.raises(SettingsError, match="strength"):
        read_profile(ModelSettings(name="m", path=directory, max_strength=0.2))


@given(width=st.integers(1, 5000), height=st.integers(1, 5000))
def test_working_size_is_always_in_the_native_range(width: int, height: int) -> None:
    profile = read_profile(ModelSettings(name="b", path=Path(BUILTIN_PATH)))
    size = profile.working_size(width, height)
    for side in (size.width, size.height):
        assert profile.min_side_px <= side <= profile.max_side_px
        assert side % profile.side_multiple_px == 0


def test_operator_default_overrides_the_preset_high() -> None:
    settings = ModelSettings(
        name="b", path=Path(BUILTIN_PATH), default_num_inference_steps=5, max_num_inference_steps=6
    )
    presets = read_profile(settings).presets
    assert "num_inference_steps" not in presets["high"]
    assert all(preset.get("num_inference_steps", 0) <= 6 for preset in presets.values())


def test_default_strengths_without_an_option_are_clamped() -> None:
    defaults = read_profile(ModelSettings(name="b", path=Path(BUILTIN_PATH), max_strength=0.75)).defaults
    assert (defaults.strength, defaults.strength_inpainting) == (0.7, 0.75)


@pytest.mark.parametrize(
    "text",
    [
        '{"sizes": {"native": "128"}}',
        '{"sizes": []}',
        '{"defaults": 1}',
        '{"presets": {"low": 1}}',
        '{"presets": {"lowest": {}}}',
        '{"defaults": {"steps": 4}}',
        '{"sizes": {"min_size_px": 64}}',
        '{"default": {}}',
        '{"sizes": {"side_multiple_px": 0}}',
        '{"sizes": {"min_side_px": "64"}}',
        '{"presets": {"low": {"steps": 4}}}',
    ],
)
def test_wrong_value_in_ovserve_json_is_reported(directory: Path, text: str) -> None:
    (directory / "ovserve.json").write_text(text)
    with pytest.raises(ModelError, match="wrong value"):
        read_profile(ModelSettings(name="m", path=directory))
