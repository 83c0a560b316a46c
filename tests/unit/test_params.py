"""Validation: the fields and uploads of a form to one request."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ovserve.api.parameters.fields import EDIT, FIELDS, GENERATION, VARIATION
from ovserve.api.parameters.params import Parameters, parse_parameters
from ovserve.errors import (
    ApiError,
    BadRequest,
    InvalidType,
    InvalidValue,
    MissingParameter,
    ModelNotFound,
    UnknownParameter,
    UnsupportedParameter,
)
from ovserve.models.catalog import Catalog
from ovserve.settings.options import ModelSettings, Resolution, Settings
from tests.forms import IMAGE, FakeForm, FakeUpload, catalog, edit, encoded

MASK = FakeUpload("mask", encoded(mode="L"))
SETTINGS = Settings()
LCM = Path(__file__).parent.parent / "fixtures" / "models" / "lcm"


def as_json(endpoint: str, uploads: tuple[FakeUpload, ...] = (), **fields: Any) -> Parameters:
    form = FakeForm(list({"prompt": "a star", **fields}.items()), uploads, is_json=True)
    return parse_parameters(form, endpoint, None, catalog(), SETTINGS)


def test_plain_edit_uses_the_model_defaults() -> None:
    parameters = edit()
    request = parameters.request
    assert (request.task, request.prompt, request.n) == ("edit", "a green circle", 1)
    assert (request.num_inference_steps, request.guidance_scale, request.strength) == (12, 3.0, None)
    assert (request.width, request.height) == (0, 0)
    assert (parameters.quality, parameters.response_format, parameters.stream) == ("high", "b64_json", False)
    assert parameters.timeout_s == SETTINGS.default_timeout_s


def test_seed_is_random_when_left_out() -> None:
    assert len({edit().request.seed for _ in range(20)}) > 15


@pytest.mark.parametrize("name", ["seed", "rng_seed"])
def test_given_seed_is_used_modulo_2_32(name: str) -> None:
    assert edit((name, "7")).request.seed == 7
    assert edit((name, str(2**64 - 1))).request.seed == 2**32 - 1


@pytest.mark.parametrize("name", ["image", "image[]", "image[0]", "images", "images[0]"])
def test_every_spelling_of_image_is_accepted(name: str) -> None:
    assert len(edit(uploads=(FakeUpload(name, encoded()),)).request.images) == 1


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("True", True), ("1", True), ("FALSE", False), ("0", False)]
)
def test_booleans_are_accepted_in_any_case(text: str, value: bool) -> None:
    assert edit(("truncate_prompt", text)).request.truncate_prompt is value


@pytest.mark.parametrize("text", ["", "null", "None"])
@pytest.mark.parametrize("name", ["n", "size", "strength", "seed", "mask_mode", "quality", "mask"])
def test_empty_and_null_texts_are_absent_values(name: str, text: str) -> None:
    assert edit((name, text), ("rng_seed", "1")).request == edit(("rng_seed", "1")).request


def test_operator_and_model_choose_what_happens_to_a_long_prompt() -> None:
    assert edit().request.truncate_prompt is True  # the built-in model's own default
    assert edit(truncate_prompt="refuse").request.truncate_prompt is False
    assert edit(("truncate_prompt", "true"), truncate_prompt="refuse").request.truncate_prompt is True
    assert edit(("truncate_prompt", "false")).request.truncate_prompt is False


def test_operator_chooses_the_default_response_format_except_for_streams() -> None:
    assert edit(default_response_format="url").response_format == "url"
    assert edit(("response_format", "b64_json"), default_response_format="url").response_format == "b64_json"
    assert edit(("stream", "true"), default_response_format="url").response_format == "b64_json"
    with pytest.raises(InvalidValue, match="response_format = url cannot be combined with stream = true"):
        edit(("stream", "true"), ("response_format", "url"))


def test_default_response_format_of_openai_depends_on_the_name_of_the_request() -> None:
    models = catalog(ModelSettings(name="m", aliases=("*",), default_response_format="openai"))
    for named, in_path, expected in (
        ("dall-e-3", None, "url"),
        ("gpt-image-1", None, "b64_json"),
        (None, None, "b64_json"),
        (None, "dall-e-2", "url"),
    ):
        form = FakeForm([("prompt", "x"), *([("model", named)] if named else [])], (IMAGE,))
        assert parse_parameters(form, EDIT, in_path, models, SETTINGS).response_format == expected


@pytest.mark.parametrize(
    ("name", "value", "attribute", "expected"),
    [
        *((name, "7", "num_inference_steps", 7) for name in ("steps", "step", "num_steps")),
        *((name, "2.5", "guidance_scale", 2.5) for name in ("cfg_scale", "cfg", "guidance", "true_cfg_scale")),
        *((name, "euler", "scheduler", "euler") for name in ("sampler", "sample_method", "sampling_method")),
        *((name, "0.5", "strength", 0.5) for name in ("denoising_strength", "denoise")),
        ("num_images_per_prompt", "3", "n", 3),
        ("rng_seed", "4", "seed", 4),
    ],
)
def test_names_of_other_servers_are_accepted(name: str, value: str, attribute: str, expected: object) -> None:
    assert getattr(edit((name, value)).request, attribute) == expected
    own = FIELDS[name].same_as
    assert getattr(edit((name, value), (own, value)).request, attribute) == expected
    other = "ddim" if FIELDS[name].kind == "choice" else "1"
    with pytest.raises(InvalidValue, match=f"{own} is '?{other}'?, but {name} is"):
        edit((name, value), (own, other))


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("Euler a", "euler_ancestral"),
        ("euler_a", "euler_ancestral"),
        ("Euler", "euler"),
        ("k_euler", "euler"),
        ("DPM++ 2M Karras", "dpmpp_2m_karras"),
        ("dpm++2m", "dpmpp_2m"),
        ("UniPC", "unipc"),
        ("DDIM", "ddim"),
        ("PLMS", "pndm"),
    ],
)
def test_samplers_of_other_programs_are_accepted(sampler: str, scheduler: str) -> None:
    assert edit(("sampler", sampler)).request.scheduler == scheduler
    with pytest.raises(InvalidValue, match="choose one of: ddim"):
        edit(("sampler", sampler + "x"))


@pytest.mark.parametrize("text", ["64X32", "64*32", "64\u00d732"])
def test_sizes_of_other_servers_are_accepted(text: str) -> None:
    request = edit(("size", text)).request
    assert (request.width, request.height) == (64, 32)


def test_strength_zero_is_accepted_unless_the_operator_requires_more() -> None:
    assert edit(("strength", "0")).request.strength == 0
    assert edit(("strength", "0.0"), ("steps", "1")).request.num_inference_steps == 1
    with pytest.raises(InvalidValue, match=r"strength is 0; this model requires at least 0\.1"):
        edit(("strength", "0"), min_strength=0.1)


def test_browser_line_breaks_are_normalised() -> None:
    form = FakeForm([("prompt", "a\r\nb")], (IMAGE,))
    assert parse_parameters(form, EDIT, None, catalog(), SETTINGS).request.prompt == "a\nb"


@pytest.mark.parametrize(
    "fields",
    [
        (("n", "2"), ("num_images_per_prompt", "2")),
        (("size", "64x32"), ("width", "64"), ("height", "32")),
        (("seed", "5"), ("rng_seed", "5")),
        (("n", "2"), ("n", "2")),
    ],
)
def test_equal_duplicates_are_accepted(fields: tuple[tuple[str, str], ...]) -> None:
    edit(*fields)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ((("n", "2"), ("num_images_per_prompt", "3")), "num_images_per_prompt"),
        ((("size", "64x32"), ("width", "65")), "width"),
        ((("size", "64x32"), ("height", "33")), "height"),
        ((("seed", "5"), ("rng_seed", "6")), "rng_seed"),
        ((("n", "2"), ("n", "3")), "n"),
    ],
)
def test_different_duplicates_are_rejected(fields: tuple[tuple[str, str], ...], param: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        edit(*fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "value",
    [
        "512",
        "512x",
        "x512",
        "512XX512",
        "512**512",
        "512,512",
        " 512x512",
        "0x5",
        "-1x5",
        "1e3x5",
        "512x512x3",
        "AUTO",
        "9" * 30,
    ],
)
def test_malformed_size_is_rejected(value: str) -> None:
    with pytest.raises(InvalidValue, match="size") as caught:
        edit(("size", value))
    assert caught.value.param == "size"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", "two"), ("n", "1.0"), ("n", " 1"), ("n", "+1"), ("n", "01"), ("n", "[1]"), ("n", "{}"), ("n", "0"),
        ("n", "-1"), ("n", "11"), ("n", "9" * 50), ("strength", "nan"), ("strength", "inf"), ("strength", "1.01"),
        ("strength", "-0.1"), ("strength", "1e999"), ("strength", "0x1"), ("guidance_scale", "3.5e39"),
        ("guidance_scale", "1.2.3"), ("num_inference_steps", "101"), ("num_inference_steps", "0"), ("seed", "-2"),
        ("seed", str(2**64)), ("response_format", "base64"), ("output_format", "gif"), ("output_compression", "101"),
        ("quality", "ultra"), ("mask_mode", "white"), ("resize_mode", "fill"), ("mask_blur", "-1"),
        ("scheduler", "heun"), ("timeout_s", "0"), ("partial_images", "4"), ("stream", "yes"), ("background", "red"),
    ],
)  # fmt: skip
def test_invalid_value_names_the_field(name: str, value: str) -> None:
    with pytest.raises(BadRequest) as caught:
        edit((name, value))
    assert caught.value.status == 400
    assert caught.value.param == name
    assert caught.value.message.startswith(f"{name} is ")


@pytest.mark.parametrize(
    ("name", "value"),
    [("n", "1"), ("n", True), ("n", 1.5), ("n", [1]), ("strength", "0.5"), ("prompt", 5), ("prompt", ["a"]),
     ("stream", "true"), ("size", 512), ("seed", 1.0), ("quality", {"a": 1}), ("negative_prompt", True)],
)  # fmt: skip
def test_json_value_of_another_type_is_rejected(name: str, value: Any) -> None:
    endpoint = EDIT if name == "strength" else GENERATION
    uploads = (IMAGE,) if endpoint == EDIT else ()
    with pytest.raises(InvalidType) as caught:
        as_json(endpoint, uploads, **{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": "1"}, "n is '1', a string; expected a whole number."),
        ({"n": True}, "n is true; expected a whole number."),
        ({"n": 65}, "n is 65; this model allows at most 10."),
        ({"num_images_per_prompt": 65}, "num_images_per_prompt is 65; this model allows at most 10."),
        ({"n": 0}, "n is 0; the API requires at least 1."),
        ({"n": 11}, "n is 11; this model allows at most 10."),
        ({"seed": 1.0}, "seed is 1.0; expected a whole number."),
        ({"prompt": 10**5000}, "prompt is a number of more than 40 digits; expected a string."),
        ({"prompt": ["a"]}, "prompt is an array; expected a string."),
        ({"output_format": "gif"}, "output_format is 'gif'; choose one of: png, jpeg, webp."),
        ({"user": {"a": 1}}, "user is an object; expected a string."),
        ({"stream": "\n\ud800" + "y" * 99}, f"stream is '\\n\\ud800{'y' * 98}'..., a string; expected true or false."),
        ({"promt": "a"}, "Unknown parameter 'promt'; did you mean prompt?"),
        ({"clip_skip": 1}, "Unknown parameter 'clip_skip'; /openapi.json lists the known ones."),
        ({"prompt": ""}, "prompt is missing or empty; images/generations requires it."),
        (
            {"model": "ghost"},
            "The model 'ghost' does not exist; available: 'm'. The server's option aliases adds further names.",
        ),
        ({"mask_mode": "auto"}, "mask_mode is not supported by images/generations, only by images/edits; remove it."),
        ({"prompt_2": "a"}, "prompt_2 needs a second text encoder, which model 'm' does not have; remove it."),
        ({"n": 1, "num_images_per_prompt": 2}, "num_images_per_prompt is 2, but n is 1; send one of them."),
    ],
)  # fmt: skip
def test_messages_give_field_value_and_limit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError) as caught:
        as_json(GENERATION, **fields)
    assert caught.value.message == message


@pytest.mark.parametrize("name", ["prompt", "user", "quality", "model"])
def test_half_of_a_surrogate_pair_is_rejected(name: str) -> None:
    with pytest.raises(InvalidValue, match="surrogate") as caught:
        as_json(GENERATION, **{name: "a\ud800b"})
    assert caught.value.param == name


def test_json_null_is_an_absent_value() -> None:
    as_json(GENERATION, n=None, size=None, quality=None)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("num_inference_step", "num_inference_steps"), ("promt", "prompt"), ("clip_skip", None), ("image[0][x", None)],
)
def test_unknown_field_error_suggests_the_nearest_name(name: str, hint: str | None) -> None:
    with pytest.raises(UnknownParameter) as caught:
        edit((name, "1"))
    assert caught.value.param == name
    assert (hint or name) in caught.value.message


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if not field.served])
def test_field_that_no_model_supports_is_rejected(name: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        edit((name, "1"))
    assert caught.value.param == name


@pytest.mark.parametrize("name", ["prompt_2", "negative_prompt_2", "prompt_3", "max_sequence_length"])
def test_field_of_another_family_is_rejected(name: str) -> None:
    with pytest.raises(UnsupportedParameter, match="needs") as caught:
        edit((name, "1"))
    assert caught.value.param == name


def test_generations_reject_image_and_strength() -> None:
    with pytest.raises(UnsupportedParameter, match="images/edits"):
        edit(endpoint=GENERATION)
    with pytest.raises(UnsupportedParameter):
        edit(("strength", "0.5"), uploads=(), endpoint=GENERATION)


def test_variation_needs_no_prompt() -> None:
    form = FakeForm([], (IMAGE,))
    assert parse_parameters(form, VARIATION, None, catalog(), SETTINGS).request.prompt == ""


@pytest.mark.parametrize("endpoint", [EDIT, GENERATION])
def test_missing_prompt_is_rejected(endpoint: str) -> None:
    for fields in ([], [("prompt", "")]):
        with pytest.raises(MissingParameter) as caught:
            parse_parameters(FakeForm(fields, ()), endpoint, None, catalog(), SETTINGS)
        assert caught.value.param == "prompt"


def test_missing_image_is_rejected() -> None:
    with pytest.raises(MissingParameter) as caught:
        edit(uploads=())
    assert caught.value.param == "image"


@pytest.mark.parametrize("name", ["image", "mask", "image[]"])
def test_image_as_text_is_rejected(name: str) -> None:
    with pytest.raises(InvalidType, match=r"is a string; expected a file") as caught:
        edit((name, "aGVsbG8="))
    assert caught.value.param == name


def test_file_for_a_text_field_is_rejected() -> None:
    with pytest.raises(InvalidType, match="prompt is a file"):
        edit(uploads=(IMAGE, FakeUpload("prompt", b"x")))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"image_url": "https://example.org/a.png"}], "not fetched"),
        ([{"file_id": "file-1"}], "by id"),
        ("http://localhost/x", "not fetched"),
        ([{"image_url": 5}], "data URL"),
    ],
)
def test_unsupported_image_references_are_rejected(value: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        as_json(EDIT, images=value)


def test_several_images_are_rejected_for_a_model_that_takes_one() -> None:
    with pytest.raises(UnsupportedParameter, match="sent 2 times; model") as caught:
        edit(uploads=(FakeUpload("image[]", encoded()), FakeUpload("image[]", encoded())))
    assert caught.value.param == "image[]"


def test_two_masks_are_rejected() -> None:
    with pytest.raises(InvalidValue, match="mask was sent 2 times; send one mask"):
        edit(uploads=(IMAGE, MASK, MASK))


@pytest.mark.parametrize("bad", [b"", b"hello", encoded()[:20], b"\x00\x00\x00\x18ftypheic" + b"\0" * 40])
@pytest.mark.parametrize("name", ["image", "mask"])
def test_upload_that_is_not_an_image_names_the_field(name: str, bad: bytes) -> None:
    uploads = (FakeUpload("image", bad),) if name == "image" else (IMAGE, FakeUpload("mask", bad))
    with pytest.raises(BadRequest) as caught:
        edit(uploads=uploads)
    assert (caught.value.code, caught.value.param) == ("invalid_image_file", name)


def test_too_large_image_is_rejected_from_its_header() -> None:
    small = Settings(max_image_pixels=100)
    with pytest.raises(BadRequest, match="128x128"):
        parse_parameters(FakeForm([("prompt", "a")], (IMAGE,)), EDIT, None, catalog(), small)


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ({"max_num_images_per_prompt": 4}, ("n", "5"), "this model allows at most 4"),
        ({"max_num_inference_steps": 20}, ("num_inference_steps", "21"), "this model allows at most 20"),
        ({"max_resolution": Resolution(256, 256)}, ("size", "257x256"), "this model allows at most 256x256"),
        ({"max_resolution": Resolution(256, 256)}, ("width", "257"), "this model allows at most 256"),
        ({"min_strength": 0.3}, ("strength", "0.2"), "this model requires at least 0.3"),
        ({"max_guidance_scale": 10.0}, ("guidance_scale", "11"), "this model allows at most 10"),
    ],
)
def test_operator_limits_apply_to_each_request(model: dict[str, Any], fields: tuple[str, str], message: str) -> None:
    with pytest.raises(InvalidValue, match=rf"{message}\.$") as caught:
        edit(fields, **model)
    assert caught.value.param == fields[0]


def test_default_resolution_replaces_a_missing_side() -> None:
    model = {"default_resolution": Resolution(96, 64)}
    assert (edit(**model).request.width, edit(**model).request.height) == (96, 64)
    one = edit(("width", "32"), **model).request
    assert (one.width, one.height) == (32, 64)
    with pytest.raises(MissingParameter):
        edit(("width", "32"))


def test_strength_that_runs_no_step_names_the_smallest_that_does() -> None:
    with pytest.raises(InvalidValue, match=r"0\.09") as caught:
        edit(("strength", "0.05"), ("num_inference_steps", "12"))
    assert caught.value.param == "strength"
    edit(("strength", "0.09"), ("num_inference_steps", "12"))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ((("response_format", "url"), ("stream", "true")), "response_format"),
        ((("partial_images", "1"),), "partial_images"),
        ((("background", "transparent"), ("output_format", "jpeg")), "background"),
        ((("negative_prompt", "x"), ("guidance_scale", "1")), "negative_prompt"),
    ],
)
def test_excluded_combination_names_both_fields(fields: tuple[tuple[str, str], ...], param: str) -> None:
    with pytest.raises(InvalidValue, match="cannot be combined with") as caught:
        edit(*fields)
    assert caught.value.param == param
    for name, _ in fields:
        assert name in caught.value.message


def test_partial_images_zero_needs_no_stream() -> None:
    edit(("partial_images", "0"))


def test_only_model_needs_no_name() -> None:
    assert edit().model.name == "m"
    with pytest.raises(ModelNotFound, match="'m'"):
        edit(("model", "ghost"))


def test_one_of_several_models_needs_a_name_or_a_default() -> None:
    two = (ModelSettings(name="a"), ModelSettings(name="b"))
    form = FakeForm([("prompt", "x")], (IMAGE,))
    with pytest.raises(MissingParameter, match="'a', 'b'"):  # 400: the client left it out
        parse_parameters(form, EDIT, None, catalog(*two), SETTINGS)
    assert parse_parameters(form, EDIT, None, catalog(*two, default="b"), SETTINGS).model.name == "b"
    assert parse_parameters(form, EDIT, "a", catalog(*two), SETTINGS).model.name == "a"


def test_path_and_field_may_name_one_model_in_two_ways() -> None:
    models = catalog(ModelSettings(name="m", aliases=("x",)), ModelSettings(name="other"))
    form = FakeForm([("prompt", "a star"), ("model", "x")], (IMAGE,))
    assert parse_parameters(form, EDIT, "m", models, SETTINGS).model.name == "m"
    with pytest.raises(InvalidValue):
        parse_parameters(form, EDIT, "other", models, SETTINGS)


def test_path_and_field_must_name_the_same_model() -> None:
    form = FakeForm([("prompt", "x"), ("model", "m")], (IMAGE,))
    with pytest.raises(InvalidValue, match="model is 'm', but the path names 'other'"):
        parse_parameters(form, EDIT, "other", catalog(), SETTINGS)


def test_quality_presets_set_the_steps_unless_given() -> None:
    assert (
        edit(("quality", "low")).request.num_inference_steps < edit(("quality", "hd")).request.num_inference_steps == 12
    )
    assert edit(("quality", "low"), ("num_inference_steps", "11")).request.num_inference_steps == 11
    assert edit(("quality", "standard")).quality == "medium"


def test_quality_below_high_uses_scheduler_and_shortcuts_of_the_preset() -> None:
    low, high = edit(("quality", "low")).request, edit().request
    assert (low.scheduler, low.preferred_scheduler, low.shortcuts) == ("", "dpmpp_2m", "guidance_until=0.6")
    assert (high.preferred_scheduler, high.shortcuts) == ("", "")
    assert edit(("quality", "low"), ("scheduler", "ddim")).request.scheduler == "ddim"


def test_high_input_fidelity_lowers_the_default_strength() -> None:
    asked = edit(("input_fidelity", "high")).request
    assert asked.preferred_strength is not None
    assert asked.preferred_strength < 0.7
    assert asked.strength is None  # only the worker sees whether transparent pixels make it an inpainting
    assert edit(("input_fidelity", "low")).request.preferred_strength is None
    assert edit(("input_fidelity", "high"), ("strength", "0.9")).request.strength == 0.9


def test_high_input_fidelity_runs_at_least_one_step() -> None:
    asked = edit(("input_fidelity", "high"), ("num_inference_steps", "2")).request
    assert asked.preferred_strength == 0.5


def test_default_step_count_is_raised_until_an_edit_runs_one_step() -> None:
    low = edit(("quality", "low")).request.num_inference_steps
    assert low == 4
    assert edit(("quality", "low"), ("strength", "0.3")).request.num_inference_steps == low
    assert edit(("quality", "low"), ("strength", "0.1")).request.num_inference_steps == 10
    weak = edit(("quality", "low"), default_strength=0.2).request
    assert (weak.strength, weak.num_inference_steps) == (None, 5)
    masked = edit(("quality", "low"), uploads=(IMAGE, MASK), default_strength=0.2).request
    assert masked.num_inference_steps == low  # the default strength with a mask is 1
    generated = edit(("quality", "low"), uploads=(), endpoint=GENERATION, default_strength=0.2).request
    assert generated.num_inference_steps == low  # a generation has no strength
    with pytest.raises(InvalidValue, match=r"^strength is 0\.1, which runs none of 4 steps"):  # a given count is kept
        edit(("num_inference_steps", "4"), ("strength", "0.1"))
    with pytest.raises(
        InvalidValue, match=r"^strength is 1e-07, which runs none of 100 steps"
    ):  # too low for the limit
        edit(("quality", "low"), ("strength", "0.0000001"))


def test_step_count_of_lcm_is_neither_raised_nor_rejected() -> None:
    own = edit(path=LCM).request.num_inference_steps
    assert edit(("strength", "0.1"), path=LCM).request.num_inference_steps == own
    assert edit(("strength", "0.1"), ("num_inference_steps", "4"), path=LCM).request.num_inference_steps == 4


def test_smallest_strength_in_the_message_works() -> None:
    for fields in ((("strength", "0.0001"),), (("strength", "0.05"), ("num_inference_steps", "12"))):
        with pytest.raises(InvalidValue) as caught:
            edit(*fields)
        assert caught.value.param == "strength"
        smallest = caught.value.message.rpartition(" ")[2].rstrip(".")
        assert edit(*fields[1:], ("strength", smallest)).request.strength == float(smallest)


def test_timeout_above_the_server_maximum_is_rejected() -> None:
    assert edit(("timeout_s", "5")).timeout_s == 5
    with pytest.raises(InvalidValue, match=rf"this server allows at most {SETTINGS.max_timeout_s:g}\.$") as caught:
        edit(("timeout_s", "80000"))
    assert caught.value.param == "timeout_s"


def test_json_null_is_an_absent_prompt_and_the_text_null_is_a_prompt() -> None:
    with pytest.raises(MissingParameter) as caught:
        as_json(GENERATION, prompt=None)
    assert caught.value.param == "prompt"
    assert as_json(VARIATION, (IMAGE,), prompt=None).request.prompt == ""
    assert as_json(GENERATION, prompt="null").request.prompt == "null"


def test_seed_of_minus_one_is_random() -> None:
    assert len({edit(("seed", "-1")).request.seed for _ in range(20)}) > 15
    with pytest.raises(InvalidValue, match="at least -1"):
        edit(("seed", "-2"))


def test_mask_mode_without_a_mask_is_rejected() -> None:
    assert edit(("mask_mode", "alpha"), uploads=(IMAGE, MASK)).request.mask_mode == "alpha"
    assert edit(("mask_mode", "auto")).request.mask_mode == "auto"
    with pytest.raises(InvalidValue) as caught:  # if the mask was lost on the way, the whole picture would be repainted
        edit(("mask_mode", "luminance"))
    assert caught.value.param == "mask_mode"
    assert edit(("mask_mode", "none")).request.mask_mode == "none"
    with pytest.raises(InvalidValue, match="mask_mode is 'none', but a mask was sent"):
        edit(("mask_mode", "none"), uploads=(IMAGE, MASK))


def test_inverted_mask_needs_a_mask() -> None:
    assert edit(("mask_invert", "true"), uploads=(IMAGE, MASK)).request.mask_invert
    assert not edit(("mask_invert", "False")).request.mask_invert
    with pytest.raises(InvalidValue, match="mask_invert is 'true', but no mask was sent") as caught:
        edit(("mask_invert", "true"))
    assert caught.value.param == "mask_invert"


def test_padding_needs_the_masked_area() -> None:
    values = edit(("mask_area", "masked"), ("mask_padding", "16"), uploads=(IMAGE, MASK)).request
    assert (values.mask_area, values.mask_padding) == ("masked", 16)
    with pytest.raises(InvalidValue, match="mask_padding above 0 cannot be combined with mask_area = whole"):
        edit(("mask_padding", "16"), uploads=(IMAGE, MASK))


@pytest.mark.parametrize("name", ["negative_prompt", "negative_prompt_2"])
def test_negative_prompt_without_guidance_is_rejected(name: str) -> None:
    sdxl = Path(__file__).parent.parent / "fixtures" / "models" / "sdxl"
    assert edit((name, "a dog"), path=sdxl)
    with pytest.raises(InvalidValue) as caught:
        edit((name, "a dog"), ("guidance_scale", "1"), path=sdxl)
    assert caught.value.param == name


def test_number_of_more_than_40_digits_is_rejected() -> None:
    with pytest.raises(InvalidValue, match="40 digits") as caught:
        as_json(GENERATION, seed=10**400)
    assert caught.value.param == "seed"


def test_plain_request_runs_the_operator_default_steps() -> None:
    assert edit(default_num_inference_steps=5, max_num_inference_steps=6).request.num_inference_steps == 5


def test_inpainting_model_accepts_an_image_with_a_transparent_colour() -> None:
    inpainting = Path(__file__).parent.parent / "fixtures" / "models" / "inpaint"
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG", transparency=(0, 0, 0))
    assert edit(uploads=(FakeUpload("image", stream.getvalue()),), path=inpainting)
    with pytest.raises(MissingParameter) as caught:
        edit(path=inpainting)
    assert caught.value.param == "mask"


@pytest.mark.parametrize("endpoint", [EDIT, VARIATION])
@pytest.mark.parametrize("uploads", [(), (IMAGE,), (IMAGE, MASK), (FakeUpload("image", b"hello"),)])
def test_edit_with_a_model_that_only_generates_is_unsupported(endpoint: str, uploads: tuple[FakeUpload, ...]) -> None:
    [served] = catalog().models.values()
    generator = replace(served, profile=replace(served.profile, tasks=frozenset({"text2image"})))
    form = FakeForm([("prompt", "a star")], uploads[: 1 if endpoint == VARIATION else None])
    with pytest.raises(UnsupportedParameter, match="model 'm' cannot edit images") as caught:
        parse_parameters(form, endpoint, None, Catalog({"m": generator}, ""), SETTINGS)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "image")
