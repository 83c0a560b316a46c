"""The table of pipeline classes, and what is read from a model's directory by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.api.replies import model_object
from ovserve.engines.families.lookup import DRIVEN_FAMILIES
from ovserve.errors import ModelError, SettingsError
from ovserve.models.catalog import ServedModel
from ovserve.models.classes import CLASSES, class_named, plan_engine
from ovserve.models.families import CLASSIFIER_FREE, EMBEDDED, FAMILIES, NO_GUIDANCE
from ovserve.models.profile import ModelProfile, read_profile, served_by
from ovserve.models.steps import default_strength
from ovserve.settings.options import ModelSettings, Resolution
from tests.modelfiles import EULER_TRAILING, QWEN_VAE, write_model

SERVED = sorted(name for name, row in CLASSES.items() if row.engines)
ALL = {"text2image", "image2image", "inpainting"}


def profile_of(directory: Path, class_name: str, settings: dict[str, Any] | None = None, **files: Any) -> ModelProfile:
    return read_profile(
        ModelSettings(
            name="m", path=write_model(directory, class_name, **files), **{"engine": "auto", **(settings or {})}
        )
    )


def test_the_table_names_only_known_families_and_every_family_has_a_class() -> None:
    assert {row.family for row in CLASSES.values()} == FAMILIES.keys()


def test_stepwise_serves_the_families_that_have_a_module() -> None:
    assert {row.family for row in CLASSES.values() if row.stepwise} == DRIVEN_FAMILIES


@pytest.mark.parametrize("class_name", SERVED)
def test_every_served_class_has_a_profile_for_each_of_its_engines(tmp_path: Path, class_name: str) -> None:
    write_model(tmp_path / "m", class_name)
    row = CLASSES[class_name]
    for engine in row.engines:
        profile = read_profile(ModelSettings(name="m", path=tmp_path / "m", engine=engine))
        serving = row.serving(engine)
        assert serving is not None
        assert (profile.family, profile.tasks, profile.references) == (row.family, serving.tasks, serving.references)
        assert served_by(profile, engine) == profile


@pytest.mark.parametrize(
    "class_name",
    [
        "FluxControlPipeline",
        "FluxPipelineOfMine",
        "Flux2Pipeline",
        "SanaPipeline",
        "StableDiffusionUpscalePipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLKDiffusionPipeline",
        "QwenImageEditPipeline",
        "stablediffusionpipeline",
        "",
    ],
)
def test_class_that_no_engine_serves_is_refused_in_one_line_that_names_those_served(
    tmp_path: Path, class_name: str
) -> None:
    with pytest.raises(ModelError) as caught:
        profile_of(tmp_path / "m", class_name)
    message = str(caught.value)
    assert "\n" not in message
    assert repr(class_name) in message
    for served in SERVED:
        assert served in message


@given(name=st.text(max_size=40))
def test_only_exact_names_are_served(name: str) -> None:
    for candidate in (name, f"FluxPipeline{name}", f"{name}FluxPipeline"):
        if candidate not in CLASSES:
            with pytest.raises(ModelError):
                class_named(candidate, Path("/m"))


def test_refiner_is_refused_with_what_to_serve_instead(tmp_path: Path) -> None:
    (tmp_path / "text_encoder_2").mkdir()
    with pytest.raises(ModelError, match=r"SDXL refiner.*Set model_path to the base model"):
        class_named("StableDiffusionXLImg2ImgPipeline", tmp_path)
    (tmp_path / "text_encoder").mkdir()
    assert class_named("StableDiffusionXLImg2ImgPipeline", tmp_path).family == "sdxl"


def test_engine_that_does_not_serve_the_class_is_refused_with_one_that_does(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="engine genai does not serve class StableDiffusionImg2ImgPipeline"):
        profile_of(tmp_path / "m", "StableDiffusionImg2ImgPipeline", {"engine": "genai"})


def test_engine_of_a_class_that_only_stepwise_serves_is_stepwise_even_on_an_npu() -> None:
    assert plan_engine("StableDiffusionImg2ImgPipeline", "auto", "NPU", Path("/m"))[0] == "stepwise"


@pytest.mark.parametrize(
    ("class_name", "files", "steps", "guidance_scale", "guidance", "is_distilled"),
    [
        ("StableDiffusionPipeline", {}, 50, 7.5, CLASSIFIER_FREE, False),
        ("StableDiffusionPipeline", {"scheduler": EULER_TRAILING}, 4, 0.0, CLASSIFIER_FREE, True),
        ("StableDiffusionXLPipeline", {"scheduler": EULER_TRAILING}, 4, 0.0, CLASSIFIER_FREE, True),
        (
            "StableDiffusionXLPipeline",
            {"scheduler": {**EULER_TRAILING, "timestep_spacing": "leading"}},
            50,
            5.0,
            CLASSIFIER_FREE,
            False,
        ),
        ("LatentConsistencyModelPipeline", {}, 4, 8.5, EMBEDDED, True),
        ("StableDiffusion3Pipeline", {}, 28, 7.0, CLASSIFIER_FREE, False),
        (
            "StableDiffusion3Pipeline",
            {"index": {"_name_or_path": "stabilityai/stable-diffusion-3.5-large-turbo"}},
            4,
            0.0,
            CLASSIFIER_FREE,
            True,
        ),
        ("FluxPipeline", {"denoiser": {"guidance_embeds": True}}, 28, 3.5, EMBEDDED, False),
        ("FluxPipeline", {"denoiser": {"guidance_embeds": False}}, 4, 0.0, NO_GUIDANCE, True),
        ("FluxFillPipeline", {"denoiser": {"guidance_embeds": True}}, 50, 30.0, EMBEDDED, False),
        ("Flux2KleinPipeline", {"index": {"is_distilled": True}}, 4, 1.0, NO_GUIDANCE, True),
        ("Flux2KleinPipeline", {"index": {"is_distilled": False}}, 50, 4.0, CLASSIFIER_FREE, False),
        ("ZImagePipeline", {"scheduler": {"shift": 3.0}}, 9, 0.0, CLASSIFIER_FREE, True),
        ("ZImagePipeline", {"scheduler": {"shift": 6.0}}, 50, 4.0, CLASSIFIER_FREE, False),
        ("QwenImagePipeline", {"vae": QWEN_VAE}, 50, 4.0, CLASSIFIER_FREE, False),
    ],
)
def test_defaults_are_those_of_the_variant_that_the_files_name(
    tmp_path: Path,
    class_name: str,
    files: dict[str, Any],
    steps: int,
    guidance_scale: float,
    guidance: str,
    is_distilled: bool,
) -> None:
    profile = profile_of(tmp_path / "m", class_name, **files)
    assert (profile.defaults.num_inference_steps, profile.defaults.guidance_scale) == (steps, guidance_scale)
    assert (profile.guidance, profile.is_distilled) == (guidance, is_distilled)
    assert profile.preset("high").num_inference_steps == steps
    for quality in ("low", "medium"):
        preset = profile.preset(quality)
        has_less_to_do = preset.num_inference_steps < steps or "denoise_every" in preset.shortcuts
        assert has_less_to_do == (not is_distilled)
        assert bool(preset.scheduler or preset.shortcuts) == (not is_distilled)


@pytest.mark.parametrize(
    ("steps", "engine", "low", "medium"),
    [
        (19, "stepwise", (6, "dpmpp_2m", "guidance_until=0.6"), (10, "dpmpp_2m", "")),
        (20, "stepwise", (6, "dpmpp_2m", "guidance_until=0.6"), (20, "", "denoise_every=2")),
        (30, "stepwise", (30, "", "denoise_every=4,guidance_until=0.6"), (30, "", "denoise_every=2")),
        (30, "genai", (9, "dpmpp_2m", "guidance_until=0.6"), (15, "dpmpp_2m", "")),
    ],
)
def test_presets_of_many_steps_forecast_some_where_the_engine_can(
    tmp_path: Path, steps: int, engine: str, low: tuple[int, str, str], medium: tuple[int, str, str]
) -> None:
    directory = write_model(tmp_path / "m", "StableDiffusionPipeline")
    settings = ModelSettings(name="m", path=directory, engine=engine, default_num_inference_steps=steps)
    profile = read_profile(settings)
    for quality, expected in (("low", low), ("medium", medium)):
        preset = profile.preset(quality)
        assert (preset.num_inference_steps, preset.scheduler, preset.shortcuts) == expected
    noisy = profile.preset("medium", scheduler="euler_ancestral")  # its predictions cannot be forecast
    assert (noisy.num_inference_steps, noisy.shortcuts) == (round(steps / 2), "")
    (directory / "ovserve.json").write_text('{"presets": {"medium": {"guidance_scale": 2.0}}}')
    declared = read_profile(settings).preset("medium")
    assert (declared.num_inference_steps, declared.shortcuts) == (round(steps / 2), "")


def test_declared_defaults_and_presets_override_those_of_a_distilled_model(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "m", "Flux2KleinPipeline", index={"is_distilled": True})
    (directory / "ovserve.json").write_text(
        '{"defaults": {"num_inference_steps": 6}, "presets": {"low": {"num_inference_steps": 2}}}'
    )
    profile = read_profile(ModelSettings(name="m", path=directory))
    assert (profile.preset("low").num_inference_steps, profile.preset("medium").num_inference_steps) == (2, 6)


@pytest.mark.parametrize(
    ("class_name", "files", "tokens"),
    [
        ("StableDiffusionPipeline", {}, 77),
        ("StableDiffusion3Pipeline", {}, 256),
        ("FluxPipeline", {}, 512),
        ("FluxFillPipeline", {}, 512),
        ("Flux2KleinPipeline", {}, 512),
        ("ZImagePipeline", {}, 512),
        ("QwenImagePipeline", {"vae": QWEN_VAE}, 512),
    ],
)
def test_window_is_that_of_the_family_and_not_max_position_embeddings_of_a_language_model(
    tmp_path: Path, class_name: str, files: dict[str, Any], tokens: int
) -> None:
    assert profile_of(tmp_path / "m", class_name, **files).prompt_tokens == tokens


@pytest.mark.parametrize(
    ("class_name", "files", "native", "multiple"),
    [
        ("StableDiffusionPipeline", {"denoiser": {"sample_size": 96}}, 768, 8),
        ("StableDiffusionXLPipeline", {"denoiser": {"sample_size": 128}}, 1024, 8),
        ("StableDiffusion3Pipeline", {"denoiser": {"sample_size": 128}}, 1024, 16),
        ("FluxPipeline", {}, 1024, 16),
        ("Flux2KleinPipeline", {}, 1024, 16),
        ("ZImagePipeline", {}, 1024, 16),
        ("QwenImagePipeline", {"vae": QWEN_VAE}, 1024, 16),
    ],
)
def test_sizes_come_from_the_denoiser_and_the_vae(
    tmp_path: Path, class_name: str, files: dict[str, Any], native: int, multiple: int
) -> None:
    profile = profile_of(tmp_path / "m", class_name, **files)
    assert (profile.native, profile.side_multiple_px) == (Resolution(native, native), multiple)


@pytest.mark.parametrize(
    ("class_name", "index", "tasks", "negative_prompt"),
    [
        ("FluxPipeline", {}, ALL, False),
        ("FluxInpaintPipeline", {}, {"inpainting"}, False),
        ("FluxFillPipeline", {}, {"inpainting"}, False),
        ("StableDiffusion3InpaintPipeline", {}, {"inpainting"}, True),
        ("Flux2KleinPipeline", {"is_distilled": True}, {"text2image", "image2image"}, False),
        ("Flux2KleinPipeline", {"is_distilled": False}, {"text2image", "image2image"}, False),
        ("ZImagePipeline", {}, {"text2image", "image2image"}, True),
        ("QwenImagePipeline", {}, {"text2image", "image2image"}, True),
    ],
)
def test_tasks_of_genai(
    tmp_path: Path, class_name: str, index: dict[str, Any], tasks: set[str], negative_prompt: bool
) -> None:
    profile = profile_of(tmp_path / "m", class_name, {"engine": "genai"}, index=index)
    assert (profile.tasks, profile.takes_negative_prompt) == (tasks, negative_prompt)


def test_inpainting_class_without_a_vae_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'vae_encoder' is missing"):
        profile_of(tmp_path / "m", "FluxFillPipeline", has_encoder=False)


def test_model_that_edits_by_reference_has_no_strength(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "m", "Flux2KleinPipeline", index={"is_distilled": True})
    profile = read_profile(ModelSettings(name="m", path=directory, max_strength=0.5))
    assert not profile.takes_strength
    for preferred in (None, 0.5):
        strength = default_strength(profile, is_masked=False, is_variation=False, preferred=preferred)
        assert strength == 1.0
    with pytest.raises(SettingsError, match=r"default_strength is 0\.5, but this model's edits have no strength"):
        read_profile(ModelSettings(name="m", path=directory, default_strength=0.5))


def test_profile_of_another_engine_has_that_engines_tasks(tmp_path: Path) -> None:
    profile = profile_of(tmp_path / "m", "StableDiffusionImg2ImgPipeline")
    with pytest.raises(ModelError, match="engine genai does not serve class StableDiffusionImg2ImgPipeline"):
        served_by(profile, "genai")
    klein = profile_of(tmp_path / "k", "Flux2KleinPipeline")
    assert (klein.tasks, klein.references) == (ALL, 16)
    narrowed = served_by(klein, "genai")
    assert (narrowed.tasks, narrowed.references) == ({"text2image", "image2image"}, 1)


def test_model_object_shows_class_and_features(tmp_path: Path) -> None:
    profile = profile_of(tmp_path / "m", "Flux2KleinPipeline", index={"is_distilled": True})
    shown = model_object(ServedModel(profile, ModelSettings()), "m", 0, {})
    assert shown["pipeline_class"] == "Flux2KleinPipeline"
    assert shown["tasks"] == ["image2image", "inpainting", "text2image"]
    assert shown["prompt_tokens"] == 512
    assert shown["features"] == {
        "reference_images": 16,
        "masks": True,
        "negative_prompt": False,
        "strength": False,
        "guidance": "none",
        "distilled": True,
    }
