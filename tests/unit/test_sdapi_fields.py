"""AUTOMATIC1111's fields, one by one: what each becomes in the validated request, or how it is ignored or refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.api.parameters.params import Parameters, parse_parameters
from ovserve.api.sdapi.details import as_detail_error, detail_document
from ovserve.api.sdapi.fields import FIELDS, IGNORED, IMG2IMG, INERT, REFUSED, TXT2IMG, USED, fields_of
from ovserve.api.sdapi.translate import Translation, checkpoint_name, translate
from ovserve.errors import ApiError, NotFound, UnsupportedParameter
from ovserve.models.profile import ModelProfile
from ovserve.settings.options import ModelSettings, Settings
from tests.forms import FakeForm, FakeUpload, catalog, encoded

SETTINGS = Settings()
CATALOG = catalog(ModelSettings(name="m", aliases=("other",)))
IMAGE = FakeUpload("init_images[0]", encoded(), None)
MASK = FakeUpload("mask", encoded(mode="L"), None)


def sent(
    task: str = TXT2IMG, uploads: tuple[FakeUpload, ...] | None = None, **fields: Any
) -> tuple[Parameters, Translation]:
    """Translate and validate a body; img2img has an image, and with a field of masks a mask."""
    if uploads is None:
        uploads = () if task == TXT2IMG else (IMAGE, MASK) if "mask_blur" in fields else (IMAGE,)
    form = FakeForm(list({"prompt": "a circle", **fields}.items()), uploads, is_json=True)
    translation = translate(form, task, CATALOG, SETTINGS)
    found = parse_parameters(translation.form, translation.endpoint, None, CATALOG, SETTINGS, requires_prompt=False)
    return found, translation


def with_mask(**fields: Any) -> Parameters:
    return sent(IMG2IMG, (IMAGE, MASK), **fields)[0]


def detail(task: str = TXT2IMG, uploads: tuple[FakeUpload, ...] | None = None, **fields: Any) -> tuple[int, Any]:
    """Return status and `detail` of the error for a body."""
    with pytest.raises(ApiError) as caught:
        sent(task, uploads, **fields)
    error = as_detail_error(caught.value)
    document = detail_document(error)
    assert document["errors"] == error.message
    return error.status, document["detail"]


# --- field by field: value, then attribute of the record and its value ------------------------------------------------

CASES: dict[str, tuple[str, Any, str, Any]] = {
    "prompt": (TXT2IMG, "a star", "prompt", "a star"),
    "negative_prompt": (TXT2IMG, "blue", "negative_prompt", "blue"),
    "denoising_strength": (IMG2IMG, 0.5, "strength", 0.5),
    "width": (TXT2IMG, 64, "width", 64),
    "height": (TXT2IMG, "64", "height", 64),
    "steps": (TXT2IMG, 7.0, "num_inference_steps", 7),
    "cfg_scale": (TXT2IMG, "4.5", "guidance_scale", 4.5),
    "seed": (TXT2IMG, 12, "seed", 12),
    "batch_size": (TXT2IMG, 3, "n", 3),
    "n_iter": (TXT2IMG, 2, "n", 2),
    "sampler_name": (TXT2IMG, "Euler a", "scheduler", "euler_ancestral"),
    "sampler_index": (TXT2IMG, "DDIM", "scheduler", "ddim"),
    "resize_mode": (IMG2IMG, 2, "resize_mode", "pad"),
    "init_images": (IMG2IMG, None, "task", "edit"),  # an upload, see IMAGE
}
MASK_CASES: dict[str, tuple[Any, str, Any]] = {
    "mask": (None, "mask_mode", "stencil"),  # an upload, see MASK
    "mask_blur": (9, "mask_blur", 9),
    "mask_blur_x": (3, "mask_blur", 3),
    "mask_blur_y": (5, "mask_blur", 5),
    "inpainting_mask_invert": (1, "mask_invert", True),
    "inpainting_fill": (1, "mask_fill", "original"),
    "inpaint_full_res": (False, "mask_area", "whole"),
    "inpaint_full_res_padding": (32, "mask_padding", 32),
}
ELSEWHERE = {"scheduler", "override_settings", "send_images"}  # tests of their own, below
ASKING: dict[str, Any] = {  # values that ask for something, of fields for which 1 does not
    "subseed_strength": 0.5, "firstpass_image": "x", "refiner_checkpoint": "x", "script_name": "x", "infotext": "x",
    "latent_mask": "x", "alwayson_scripts": {"ControlNet": {"args": [{"model": "canny"}]}}, "enable_hr": True,
    "tiling": True, "seed_resize_from_w": 512, "seed_resize_from_h": 512, "mask_round": False,
    "image_cfg_scale": 2.5, "initial_noise_multiplier": 0.5, "styles": ["one"], "comments": {"a": 1}, "eta": 0.5,
    "s_noise": 1.1, "save_images": True, "include_init_images": True, "restore_faces": True,
    "disable_extra_networks": True,
}  # fmt: skip


def test_every_field_has_a_case() -> None:
    of_use = {use: {name for name, field in FIELDS.items() if field.use == use} for use in (USED, IGNORED, REFUSED)}
    assert CASES.keys() | MASK_CASES.keys() | ELSEWHERE == of_use[USED]
    numbers = {name for name in of_use[IGNORED] if name.startswith("s_")}
    assert ASKING.keys() | numbers == of_use[IGNORED] | of_use[REFUSED]


@pytest.mark.parametrize("name", CASES)
def test_used_field_fills_the_record(name: str) -> None:
    task, value, attribute, expected = CASES[name]
    found, translation = sent(task, **({} if value is None else {name: value}))
    assert getattr(found.request, attribute) == expected
    assert translation.ignored == ()
    assert found.request.progress
    assert found.request.partial_images == 3


@pytest.mark.parametrize("name", MASK_CASES)
def test_used_field_of_masks_fills_the_record(name: str) -> None:
    value, attribute, expected = MASK_CASES[name]
    found = with_mask(**({} if value is None else {name: value}))
    assert getattr(found.request, attribute) == expected
    assert found.request.mask


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.use == REFUSED])
def test_refused_field_is_422_and_its_neutral_values_are_accepted(name: str) -> None:
    task = next(task for task in (TXT2IMG, IMG2IMG) if task in FIELDS[name].endpoints)
    status, found = detail(task, **{name: ASKING[name]})
    assert status == 422
    assert found[0]["loc"] == ["body", name]
    assert found[0]["type"] == "unsupported_parameter"
    for neutral in (FIELDS[name].default, None, 0, "", False):
        assert sent(task, **{name: neutral})[1].ignored == ()


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.use == IGNORED])
def test_ignored_field_is_listed_if_it_asks_for_something(name: str) -> None:
    task = next(task for task in (TXT2IMG, IMG2IMG) if task in FIELDS[name].endpoints)
    plain = replace(sent(task, seed=1)[0].request)
    found, translation = sent(task, seed=1, **{name: ASKING.get(name, 0.5)})
    assert translation.ignored == (name,)
    assert found.request == plain
    for neutral in (FIELDS[name].default, None):
        assert sent(task, **{name: neutral})[1].ignored == ()


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.use == INERT])
def test_field_without_effect_is_not_listed(name: str) -> None:
    found, translation = sent(seed=1, **{name: 5})
    assert translation.ignored == ()
    assert found.request == sent(seed=1)[0].request


def test_unknown_fields_are_listed() -> None:
    _, translation = sent(controlnet_units=[], nonsense={"a": [1]}, uploads=(FakeUpload("mask", b"x"),))
    assert set(translation.ignored) == {"controlnet_units", "nonsense", "mask"}
    _, translation = sent(**{f"x{number}": 1 for number in range(500)}, **{"y" * 5000: 1})
    assert len(translation.ignored) == 100


def test_scripts_without_arguments_are_accepted() -> None:
    for scripts in ({}, {"ADetailer": {"args": [False]}}, {"ControlNet": {"args": []}}, {"x": {}}):
        sent(alwayson_scripts=scripts)
    status, found = detail(alwayson_scripts={"ADetailer": {"args": [True, {}]}})
    assert (status, found[0]["msg"][:35]) == (422, "always on script ADetailer not foun")
    assert "Script 'x' not found" in detail(script_name="x")[1][0]["msg"]


# --- combinations -----------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_other_routes_except_for_masks() -> None:
    request = sent()[0].request
    profile = CATALOG.models["m"].profile
    assert request.num_inference_steps == profile.preset("high").num_inference_steps
    assert (request.width, request.scheduler, request.n) == (0, "", 1)
    masked = with_mask().request
    assert (masked.mask_blur, masked.mask_fill, masked.mask_area) == (4, "surroundings", "masked")
    assert (masked.resize_mode, masked.mask_padding, masked.strength) == ("stretch", 0, None)
    plain = sent(IMG2IMG)[0].request
    assert (plain.mask_mode, plain.mask_blur, plain.mask_area) == ("none", 0, "whole")


def test_fields_of_masks_have_no_effect_without_a_mask() -> None:
    fields = {"inpaint_full_res": True, "inpaint_full_res_padding": 32, "inpainting_fill": 0, "mask_blur_x": 8}
    assert sent(IMG2IMG, seed=1, **fields)[0].request == sent(IMG2IMG, seed=1)[0].request


def test_padding_without_full_resolution_has_no_effect() -> None:
    assert with_mask(inpaint_full_res=False, inpaint_full_res_padding=32).request.mask_padding == 0


def test_product_of_batches_is_limited() -> None:
    assert sent(batch_size=2, n_iter=3)[0].request.n == 6
    status, found = detail(batch_size=4, n_iter=5)
    assert (status, found[0]["loc"]) == (422, ["body", "batch_size"])
    assert found[0]["msg"] == "batch_size x n_iter is 20; this model allows at most 10."
    assert detail(n_iter=0)[1][0]["loc"] == ["body", "n_iter"]


def test_single_side_is_completed_as_there() -> None:
    assert (sent(width=64)[0].request.width, sent(width=64)[0].request.height) == (64, 512)


@pytest.mark.parametrize("seed", [-1, "-1", None, ""])
def test_seed_may_be_random(seed: Any) -> None:
    assert sent(seed=seed)[0].request.seed != sent(seed=seed)[0].request.seed


def test_negative_prompt_without_guidance_is_ignored() -> None:
    found, translation = sent(negative_prompt="blue", cfg_scale=1)
    assert (found.request.negative_prompt, translation.ignored) == ("", ("negative_prompt",))


def test_strength_of_a_model_without_one_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelProfile, "takes_strength", False)
    found, translation = sent(IMG2IMG, denoising_strength=0.75)
    assert (found.request.strength, translation.ignored) == (None, ("denoising_strength",))


def test_prompt_may_be_empty_and_null() -> None:
    assert sent(prompt="")[0].request.prompt == ""
    assert sent(prompt=None)[0].request.prompt == ""


def test_checkpoint_is_the_model() -> None:
    assert sent(override_settings={"sd_model_checkpoint": "other"})[0].model.name == "m"
    for title in ("m", "m.safetensors", "m [0123456789]", "m.ckpt [abcdef0123]"):
        assert checkpoint_name(title, CATALOG) == "m"
        assert sent(override_settings={"sd_model_checkpoint": title})[0].model.name == "m"
    for empty in ({}, None, {"sd_model_checkpoint": ""}, {"sd_model_checkpoint": None}):
        assert sent(override_settings=empty)[0].model.name == "m"
    status, found = detail(override_settings={"sd_model_checkpoint": "sdxl"})
    assert status == 404
    assert found.startswith("The model 'sdxl' does not exist")
    assert detail(override_settings={"sd_model_checkpoint": 5})[1][0]["loc"] == [
        "body", "override_settings", "sd_model_checkpoint",
    ]  # fmt: skip
    assert detail(override_settings=[1])[0] == 422


def test_other_settings_are_ignored_and_listed() -> None:
    found, translation = sent(override_settings={"CLIP_stop_at_last_layers": 2, "samples_format": "jpg"})
    assert translation.ignored == ("override_settings.CLIP_stop_at_last_layers",)
    assert found.request.output_format == "jpeg"
    assert detail(override_settings={"samples_format": "avif"})[0] == 422


def test_images_may_be_left_out_of_the_reply() -> None:
    assert sent()[1].sends_images
    assert not sent(send_images=False)[1].sends_images
    assert not sent(send_images="false")[1].sends_images


@pytest.mark.parametrize(
    ("uploads", "fields", "status"),
    [
        ((), {}, 404),
        ((), {"init_images": []}, 404),
        ((), {"init_images": None}, 404),
        ((MASK,), {}, 404),
        ((), {"init_images[0]": "nonsense"}, 422),
        ((), {"init_images[0]": "http://127.0.0.1/a.png"}, 422),
        ((IMAGE,), {"mask": "nonsense"}, 422),
        ((replace(IMAGE, data=b"no image"),), {}, 422),
        ((IMAGE, replace(IMAGE, name="init_images[1]")), {}, 422),
    ],
)
def test_pictures_that_cannot_be_used(uploads: tuple[FakeUpload, ...], fields: dict[str, Any], status: int) -> None:
    found, detailed = detail(IMG2IMG, uploads, **fields)
    assert found == status
    if status == 422:
        assert detailed[0]["loc"][1] in ("init_images", "mask")
        assert detailed[0]["msg"].startswith(("init_images", "mask"))
    else:
        assert detailed.startswith("Init image not found")


def test_mask_may_be_empty_text() -> None:
    assert sent(IMG2IMG, mask="")[0].request.mask is None


@pytest.mark.parametrize(
    ("fields", "loc"),
    [
        ({"steps": "many"}, "steps"), ({"steps": 0}, "steps"), ({"steps": 1.5}, "steps"), ({"width": "x"}, "width"),
        ({"cfg_scale": []}, "cfg_scale"), ({"cfg_scale": "nan"}, "cfg_scale"), ({"seed": "one"}, "seed"),
        ({"prompt": 5}, "prompt"), ({"sampler_name": 5}, "sampler_name"), ({"batch_size": {}}, "batch_size"),
        ({"scheduler": "karras"}, "scheduler"), ({"scheduler": "beta"}, "scheduler"), ({"width": 10**50}, "width"),
        ({"send_images": "maybe"}, "send_images"),
    ],
)  # fmt: skip
def test_wrong_value_is_422_with_the_field(fields: dict[str, Any], loc: str) -> None:
    status, found = detail(**fields)
    assert (status, found[0]["loc"]) == (422, ["body", loc])
    assert found[0]["msg"].startswith(loc)


def test_wrong_value_of_a_mask_is_422() -> None:
    for fields in ({"inpainting_fill": 2}, {"resize_mode": 3}, {"mask_blur": -1}, {"inpaint_full_res_padding": -1}):
        status, found = detail(IMG2IMG, (IMAGE, MASK), **fields)
        assert (status, found[0]["loc"]) == (422, ["body", *fields])
    assert detail(IMG2IMG, denoising_strength=2)[1][0]["loc"] == ["body", "denoising_strength"]


def test_parameters_have_every_field_and_no_picture() -> None:
    _, translation = sent(IMG2IMG, (IMAGE, MASK), steps=4, unknown=1)
    assert translation.values.keys() == fields_of(IMG2IMG).keys()
    assert (translation.values["steps"], translation.values["init_images"], translation.values["mask"]) == (
        4,
        None,
        None,
    )


def test_worker_errors_get_the_names_of_this_api() -> None:
    error = as_detail_error(UnsupportedParameter("strength: 0.01 of 20 steps", param="strength"))
    assert error.message == "denoising_strength: 0.01 of 20 steps"
    chosen = UnsupportedParameter("scheduler: 'unipc' is not served; expected one of dpmpp_2m, lcm", param="scheduler")
    assert as_detail_error(chosen).message == "sampler_name: 'UniPC' is not served; expected one of DPM++ 2M, LCM"
    assert as_detail_error(NotFound("x", param="model")).status == 404


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(max_size=5), x, max_size=2),
)


@given(
    fields=st.dictionaries(st.sampled_from([*FIELDS, "init_images[0]", "x"]), JSON, max_size=8),
    task=st.sampled_from([TXT2IMG, IMG2IMG]),
    uploads=st.sampled_from([(), (IMAGE,), (IMAGE, MASK), (MASK,)]),
)
def test_any_body_is_accepted_or_rejected_with_its_field(
    fields: dict[str, Any], task: str, uploads: tuple[FakeUpload, ...]
) -> None:
    try:
        sent(task, uploads, **fields)
    except ApiError as caught:
        error = as_detail_error(caught)
        assert error.status in (404, 422)
        assert error.param
        assert detail_document(error)["detail"]
