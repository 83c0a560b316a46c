"""Fields and uploads to a validated request."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
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
from ovserve.settings.options import ModelSettings, Resolution, Settings
from tests.forms import FakeForm, FakeUpload, catalog, encoded

IMAGE = FakeUpload("image", encoded())
MASK = FakeUpload("mask", encoded(mode="L"))
SETTINGS = Settings()
LCM = Path(__file__).parent.parent / "fixtures" / "models" / "lcm"


def edit(
    *fields: tuple[str, Any], uploads: tuple[FakeUpload, ...] = (IMAGE,), endpoint: str = EDIT, **model: Any
) -> Parameters:
    form = FakeForm([("prompt", "a green circle"), *fields], uploads)
    return parse_parameters(form, endpoint, None, catalog(ModelSettings(name="m", **model)), SETTINGS)


def as_json(endpoint: str, uploads: tuple[FakeUpload, ...] = (), **fields: Any) -> Parameters:
    form = FakeForm(list({"prompt": "a star", **fields}.items()), uploads, is_json=True)
    return parse_parameters(form, endpoint, None, catalog(), SETTINGS)


def test_a_plain_edit_gets_the_models_defaults() -> None:
    parameters = edit()
    request = parameters.request
    assert (request.task, request.prompt, request.n) == ("edit", "a green circle", 1)
    assert (request.num_inference_steps, request.guidance_scale, request.strength) == (12, 3.0, None)
    assert (request.width, request.height) == (0, 0)
    assert (parameters.quality, parameters.response_format, parameters.stream) == ("high", "b64_json", False)
    assert parameters.timeout_s == SETTINGS.default_timeout_s


def test_a_seed_is_drawn_when_none_is_given() -> None:
    assert len({edit().request.seed for _ in range(20)}) > 15


@pytest.mark.parametrize("name", ["seed", "rng_seed"])
def test_a_given_seed_is_kept(name: str) -> None:
    assert edit((name, "7")).request.seed == 7
    assert edit((name, str(2**64 - 1))).request.seed == 2**32 - 1


@pytest.mark.parametrize("name", ["image", "image[]", "image[0]", "images", "images[0]"])
def test_every_spelling_of_an_image(name: str) -> None:
    assert len(edit(uploads=(FakeUpload(name, encoded()),)).request.images) == 1


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("True", True), ("1", True), ("FALSE", False), ("0", False)]
)
def test_booleans_in_any_case(text: str, value: bool) -> None:
    assert edit(("truncate_prompt", text)).request.truncate_prompt is value


@pytest.mark.parametrize("text", ["", "null", "None"])
@pytest.mark.parametrize("name", ["n", "size", "strength", "seed", "mask_mode", "quality", "mask"])
def test_empty_and_null_are_absent(name: str, text: str) -> None:
    assert edit((name, text), ("rng_seed", "1")).request == edit(("rng_seed", "1")).request


def test_browser_line_breaks_mean_the_same() -> None:
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
def test_doubles_are_fine_when_equal(fields: tuple[tuple[str, str], ...]) -> None:
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
def test_doubles_that_differ_are_refused(fields: tuple[tuple[str, str], ...], param: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        edit(*fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "value", ["512", "512x", "x512", "512X512", " 512x512", "0x5", "-1x5", "1e3x5", "512x512x3", "AUTO", "9" * 30]
)
def test_a_malformed_size_is_refused(value: str) -> None:
    with pytest.raises(InvalidValue, match="size") as caught:
        edit(("size", value))
    assert caught.value.param == "size"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", "two"), ("n", "1.0"), ("n", " 1"), ("n", "+1"), ("n", "01"), ("n", "[1]"), ("n", "{}"), ("n", "0"), ("n", "-1"), ("n", "11"),
        ("n", "9" * 50), ("strength", "nan"), ("strength", "inf"), ("strength", "1.01"), ("strength", "-0.1"), ("strength", "1e999"),
        ("strength", "0x1"), ("guidance_scale", "3.5e39"), ("guidance_scale", "1.2.3"), ("num_inference_steps", "101"),
        ("num_inference_steps", "0"), ("seed", "-2"), ("seed", str(2**64)), ("response_format", "base64"), ("output_format", "gif"),
        ("output_compression", "101"), ("quality", "ultra"), ("mask_mode", "white"), ("resize_mode", "fill"), ("mask_blur", "-1"),
        ("scheduler", "heun"), ("timeout_s", "0"), ("partial_images", "4"), ("stream", "yes"), ("background", "red"),
    ],
)  # fmt: skip
def test_an_invalid_value_is_named(name: str, value: str) -> None:
    with pytest.raises(BadRequest) as caught:
        edit((name, value))
    assert caught.value.status == 400
    assert caught.value.param == name
    assert f"'{name}'" in caught.value.message


@pytest.mark.parametrize(
    ("name", "value"),
    [("n", "1"), ("n", True), ("n", 1.5), ("n", [1]), ("strength", "0.5"), ("prompt", 5), ("prompt", ["a"]), ("stream", "true"),
     ("size", 512), ("seed", 1.0), ("quality", {"a": 1}), ("negative_prompt", True)],
)  # fmt: skip
def test_json_values_keep_their_types(name: str, value: Any) -> None:
    endpoint = EDIT if name == "strength" else GENERATION
    uploads = (IMAGE,) if endpoint == EDIT else ()
    with pytest.raises(InvalidType) as caught:
        as_json(endpoint, uploads, **{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize("name", ["prompt", "user", "quality", "model"])
def test_half_a_surrogate_pair_is_refused(name: str) -> None:
    with pytest.raises(InvalidValue, match="surrogate") as caught:
        as_json(GENERATION, **{name: "a\ud800b"})
    assert caught.value.param == name


def test_json_null_is_absent() -> None:
    as_json(GENERATION, n=None, size=None, quality=None)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("num_inference_step", "num_inference_steps"), ("promt", "prompt"), ("cfg_scale", None), ("image[0][x", None)],
)
def test_an_unknown_field_is_named_with_the_nearest_one(name: str, hint: str | None) -> None:
    with pytest.raises(UnknownParameter) as caught:
        edit((name, "1"))
    assert caught.value.param == name
    assert (hint or name) in caught.value.message


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if not field.served])
def test_a_name_that_clients_know_and_nobody_serves_is_told(name: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        edit((name, "1"))
    assert caught.value.param == name


@pytest.mark.parametrize("name", ["prompt_2", "negative_prompt_2", "prompt_3", "max_sequence_length"])
def test_a_field_of_another_family_is_told(name: str) -> None:
    with pytest.raises(UnsupportedParameter, match="needs") as caught:
        edit((name, "1"))
    assert caught.value.param == name


def test_generations_take_no_image_and_no_strength() -> None:
    with pytest.raises(UnsupportedParameter, match="images/edits"):
        edit(endpoint=GENERATION)
    with pytest.raises(UnsupportedParameter):
        edit(("strength", "0.5"), uploads=(), endpoint=GENERATION)


def test_a_variation_needs_no_prompt() -> None:
    form = FakeForm([], (IMAGE,))
    assert parse_parameters(form, VARIATION, None, catalog(), SETTINGS).request.prompt == ""


@pytest.mark.parametrize("endpoint", [EDIT, GENERATION])
def test_a_missing_prompt_is_told(endpoint: str) -> None:
    for fields in ([], [("prompt", "")]):
        with pytest.raises(MissingParameter) as caught:
            parse_parameters(FakeForm(fields, ()), endpoint, None, catalog(), SETTINGS)
        assert caught.value.param == "prompt"


def test_a_missing_image_is_told() -> None:
    with pytest.raises(MissingParameter) as caught:
        edit(uploads=())
    assert caught.value.param == "image"


@pytest.mark.parametrize("name", ["image", "mask", "image[]"])
def test_an_image_as_text_is_told(name: str) -> None:
    with pytest.raises(InvalidType, match="expected a file, but got a string") as caught:
        edit((name, "aGVsbG8="))
    assert caught.value.param == name


def test_a_file_for_a_text_field_is_told() -> None:
    with pytest.raises(InvalidType, match="'prompt'"):
        edit(uploads=(IMAGE, FakeUpload("prompt", b"x")))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([{"image_url": "https://example.org/a.png"}], "not fetched"),
        ([{"file_id": "file-1"}], "by id"),
        ("http://localhost/x", "not fetched"),
        ([{"image_url": 5}], "data URL"),
    ],
)
def test_references_that_are_not_served(value: Any, told: str) -> None:
    with pytest.raises(BadRequest, match=told):
        as_json(EDIT, images=value)


def test_several_images_are_never_silently_cut_to_one() -> None:
    with pytest.raises(UnsupportedParameter, match="2 images") as caught:
        edit(uploads=(FakeUpload("image[]", encoded()), FakeUpload("image[]", encoded())))
    assert caught.value.param == "image[]"


def test_two_masks_are_refused() -> None:
    with pytest.raises(InvalidValue, match="more than one mask"):
        edit(uploads=(IMAGE, MASK, MASK))


@pytest.mark.parametrize("bad", [b"", b"hello", encoded()[:20], b"\x00\x00\x00\x18ftypheic" + b"\0" * 40])
@pytest.mark.parametrize("name", ["image", "mask"])
def test_an_upload_that_is_no_image_is_named(name: str, bad: bytes) -> None:
    uploads = (FakeUpload("image", bad),) if name == "image" else (IMAGE, FakeUpload("mask", bad))
    with pytest.raises(BadRequest) as caught:
        edit(uploads=uploads)
    assert (caught.value.code, caught.value.param) == ("invalid_image_file", name)


def test_dimensions_are_refused_from_the_header() -> None:
    small = Settings(max_image_pixels=100)
    with pytest.raises(BadRequest, match="128x128"):
        parse_parameters(FakeForm([("prompt", "a")], (IMAGE,)), EDIT, None, catalog(), small)


@pytest.mark.parametrize(
    ("model", "fields", "told"),
    [
        ({"max_num_images_per_prompt": 4}, ("n", "5"), "maximum of 4"),
        ({"max_num_inference_steps": 20}, ("num_inference_steps", "21"), "maximum of 20"),
        ({"max_resolution": Resolution(256, 256)}, ("size", "257x256"), "maximum of 256x256"),
        ({"max_resolution": Resolution(256, 256)}, ("width", "257"), "maximum of 256"),
        ({"min_strength": 0.3}, ("strength", "0.2"), "at least 0.3"),
        ({"max_guidance_scale": 10.0}, ("guidance_scale", "11"), "maximum of 10"),
    ],
)
def test_the_operators_limits_hold_for_each_request(model: dict[str, Any], fields: tuple[str, str], told: str) -> None:
    with pytest.raises(InvalidValue, match=told) as caught:
        edit(fields, **model)
    assert caught.value.param == fields[0]


def test_default_resolution_fills_in_and_each_side_alone() -> None:
    model = {"default_resolution": Resolution(96, 64)}
    assert (edit(**model).request.width, edit(**model).request.height) == (96, 64)
    one = edit(("width", "32"), **model).request
    assert (one.width, one.height) == (32, 64)
    with pytest.raises(MissingParameter):
        edit(("width", "32"))


def test_too_little_strength_names_the_least_that_works() -> None:
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
def test_what_cannot_go_together_names_both(fields: tuple[tuple[str, str], ...], param: str) -> None:
    with pytest.raises(InvalidValue, match="cannot go with") as caught:
        edit(*fields)
    assert caught.value.param == param
    for name, _ in fields:
        assert name in caught.value.message


def test_partial_images_zero_needs_no_stream() -> None:
    edit(("partial_images", "0"))


def test_the_only_model_needs_no_name() -> None:
    assert edit().model.name == "m"
    with pytest.raises(ModelNotFound, match="'m'"):
        edit(("model", "ghost"))


def test_several_models_need_a_name_or_a_default() -> None:
    two = (ModelSettings(name="a"), ModelSettings(name="b"))
    form = FakeForm([("prompt", "x")], (IMAGE,))
    with pytest.raises(MissingParameter, match="'a', 'b'"):  # 400: the client left it out
        parse_parameters(form, EDIT, None, catalog(*two), SETTINGS)
    assert parse_parameters(form, EDIT, None, catalog(*two, default="b"), SETTINGS).model.name == "b"
    assert parse_parameters(form, EDIT, "a", catalog(*two), SETTINGS).model.name == "a"


def test_the_path_and_the_field_must_agree_on_the_model() -> None:
    form = FakeForm([("prompt", "x"), ("model", "m")], (IMAGE,))
    with pytest.raises(InvalidValue, match="contradicts"):
        parse_parameters(form, EDIT, "other", catalog(), SETTINGS)


def test_quality_presets_set_the_steps_and_explicit_fields_win() -> None:
    assert (
        edit(("quality", "low")).request.num_inference_steps < edit(("quality", "hd")).request.num_inference_steps == 12
    )
    assert edit(("quality", "low"), ("num_inference_steps", "11")).request.num_inference_steps == 11
    assert edit(("quality", "standard")).quality == "medium"


def test_quality_below_high_prefers_a_quicker_way_and_high_is_exact() -> None:
    low, high = edit(("quality", "low")).request, edit().request
    assert (low.scheduler, low.preferred_scheduler, low.shortcuts) == ("", "dpmpp_2m", "guidance_until=0.6")
    assert (high.preferred_scheduler, high.shortcuts) == ("", "")
    assert edit(("quality", "low"), ("scheduler", "ddim")).request.scheduler == "ddim"


def test_high_fidelity_keeps_more_of_the_image() -> None:
    asked = edit(("input_fidelity", "high")).request
    assert asked.preferred_strength is not None
    assert asked.preferred_strength < 0.7
    assert asked.strength is None  # only the worker sees whether holes make it an inpainting
    assert edit(("input_fidelity", "low")).request.preferred_strength is None
    assert edit(("input_fidelity", "high"), ("strength", "0.9")).request.strength == 0.9


def test_high_fidelity_leaves_a_step_to_run_however_few_there_are() -> None:
    asked = edit(("input_fidelity", "high"), ("num_inference_steps", "2")).request
    assert asked.preferred_strength == 0.5


def test_a_count_of_steps_that_nobody_asked_for_leaves_an_edit_its_step() -> None:
    low = edit(("quality", "low")).request.num_inference_steps
    assert low == 4
    assert edit(("quality", "low"), ("strength", "0.3")).request.num_inference_steps == low
    assert edit(("quality", "low"), ("strength", "0.1")).request.num_inference_steps == 10
    timid = edit(("quality", "low"), default_strength=0.2).request
    assert (timid.strength, timid.num_inference_steps) == (None, 5)
    masked = edit(("quality", "low"), uploads=(IMAGE, MASK), default_strength=0.2).request
    assert masked.num_inference_steps == low  # its default strength is 1
    made = edit(("quality", "low"), uploads=(), endpoint=GENERATION, default_strength=0.2).request
    assert made.num_inference_steps == low  # and a generation has none
    with pytest.raises(InvalidValue, match="'strength'"):  # these were asked for
        edit(("num_inference_steps", "4"), ("strength", "0.1"))
    with pytest.raises(InvalidValue, match="'strength'"):  # no count within the limits will do
        edit(("quality", "low"), ("strength", "0.0000001"))


def test_lcm_counts_steps_in_its_own_way_so_none_are_added_or_refused_here() -> None:
    own = edit(path=LCM).request.num_inference_steps
    assert edit(("strength", "0.1"), path=LCM).request.num_inference_steps == own
    assert edit(("strength", "0.1"), ("num_inference_steps", "4"), path=LCM).request.num_inference_steps == 4


def test_the_smallest_strength_that_is_told_works() -> None:
    for fields in ((("strength", "0.0001"),), (("strength", "0.05"), ("num_inference_steps", "12"))):
        with pytest.raises(InvalidValue) as caught:
            edit(*fields)
        assert caught.value.param == "strength"
        told = caught.value.message.rpartition(" ")[2].rstrip(".")
        assert edit(*fields[1:], ("strength", told)).request.strength == float(told)


def test_a_timeout_beyond_the_servers_is_told() -> None:
    assert edit(("timeout_s", "5")).timeout_s == 5
    with pytest.raises(InvalidValue, match=f"{SETTINGS.max_timeout_s:g}") as caught:
        edit(("timeout_s", "80000"))
    assert caught.value.param == "timeout_s"


def test_json_null_is_an_absent_prompt_and_the_word_is_a_prompt() -> None:
    with pytest.raises(MissingParameter) as caught:
        as_json(GENERATION, prompt=None)
    assert caught.value.param == "prompt"
    assert as_json(VARIATION, (IMAGE,), prompt=None).request.prompt == ""
    assert as_json(GENERATION, prompt="null").request.prompt == "null"


def test_a_seed_of_minus_one_is_drawn() -> None:
    assert len({edit(("seed", "-1")).request.seed for _ in range(20)}) > 15
    with pytest.raises(InvalidValue, match="at least -1"):
        edit(("seed", "-2"))


def test_how_a_mask_is_read_needs_a_mask() -> None:
    assert edit(("mask_mode", "alpha"), uploads=(IMAGE, MASK)).request.mask_mode == "alpha"
    assert edit(("mask_mode", "auto")).request.mask_mode == "auto"
    with pytest.raises(InvalidValue) as caught:  # a mask that got lost on its way would repaint the whole picture
        edit(("mask_mode", "luminance"))
    assert caught.value.param == "mask_mode"


@pytest.mark.parametrize("name", ["negative_prompt", "negative_prompt_2"])
def test_no_negative_prompt_is_passed_over_without_guidance(name: str) -> None:
    sdxl = Path(__file__).parent.parent / "fixtures" / "models" / "sdxl"
    assert edit((name, "a dog"), path=sdxl)
    with pytest.raises(InvalidValue) as caught:
        edit((name, "a dog"), ("guidance_scale", "1"), path=sdxl)
    assert caught.value.param == name


NAMES = st.sampled_from([*FIELDS, "image[]", "n[]", "svg[model]", "x", "[", "prompt[a][b]"]) | st.text(max_size=8)
VALUES = st.text(max_size=12) | st.sampled_from(["1", "true", "auto", "0.5", "png"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda x: st.lists(x, max_size=2)
)


@given(
    fields=st.lists(st.tuples(NAMES, VALUES), max_size=6),
    with_image=st.booleans(),
    endpoint=st.sampled_from([EDIT, GENERATION, VARIATION]),
)
def test_any_form_is_served_or_refused_by_name(fields: list[tuple[str, str]], with_image: bool, endpoint: str) -> None:
    form = FakeForm(fields, (IMAGE,) if with_image else ())
    try:
        parse_parameters(form, endpoint, None, catalog(), SETTINGS)
    except ApiError as error:
        assert error.status in (400, 404)
        assert error.param is not None


@given(fields=st.dictionaries(NAMES, JSON, max_size=6), endpoint=st.sampled_from([EDIT, GENERATION]))
def test_any_json_is_served_or_refused_by_name(fields: dict[str, Any], endpoint: str) -> None:
    try:
        parse_parameters(FakeForm(list(fields.items()), (), is_json=True), endpoint, None, catalog(), SETTINGS)
    except ApiError as error:
        assert error.status in (400, 404)
        assert error.param is not None


# Valid values of each field, as a form writes them; the names of one thing (size and width, n and its other name) are left out.
VALID: dict[str, st.SearchStrategy[str]] = {
    "n": st.integers(1, 10).map(str),
    "size": st.sampled_from(["auto", "64x64", "4096x1", "301x77"]),
    "output_compression": st.integers(0, 100).map(str),
    "partial_images": st.integers(0, 3).map(str),
    "num_inference_steps": st.integers(10, 100).map(str),
    "guidance_scale": st.floats(0, 50).map(str),
    "strength": st.floats(0.3, 1).map(str),  # a step to run even with the four steps of low quality
    "seed": st.integers(0, 2**64 - 1).map(str),
    "mask_blur": st.integers(0, 256).map(str),
    "timeout_s": st.floats(0.01, SETTINGS.max_timeout_s).map(str),
    "user": st.text(max_size=20),
    "safety_identifier": st.text(max_size=20),
    "negative_prompt": st.text(max_size=20),
    **{
        name: st.sampled_from(field.choices)
        for name, field in FIELDS.items()
        if field.kind == "choice" and field.served
    },
    **{name: st.sampled_from(["true", "False", "1", "0"]) for name, field in FIELDS.items() if field.kind == "boolean"},
}
FORBIDDEN = {
    frozenset(("response_format", "stream")): lambda v: v.get("response_format") == "url" and on(v, "stream"),
    frozenset(("partial_images", "stream")): lambda v: int(v.get("partial_images", 0)) > 0 and not on(v, "stream"),
    frozenset(("background", "output_format")): lambda v: (
        v.get("background") == "transparent" and v.get("output_format") == "jpeg"
    ),
    frozenset(("mask_mode", "mask")): lambda v: v.get("mask_mode", "auto") != "auto",  # no mask is sent here
    frozenset(("negative_prompt", "guidance_scale")): lambda v: (
        v.get("negative_prompt", "") not in ("", "null", "None", "undefined") and float(v.get("guidance_scale", 3)) <= 1
    ),
}


def on(values: dict[str, str], name: str) -> bool:
    return values.get(name, "0").lower() in ("true", "1")


@st.composite
def combinations(draw: st.DrawFn) -> dict[str, str]:
    names = draw(st.sets(st.sampled_from(sorted(VALID)), max_size=len(VALID)))
    return {name: draw(VALID[name]) for name in sorted(names)}


def test_the_table_of_valid_values_is_whole() -> None:
    left_out = {"model", "prompt", "image", "mask", "num_images_per_prompt", "rng_seed", "width", "height"}
    taken = {
        name
        for name, field in FIELDS.items()
        if field.served and EDIT in field.endpoints and (field.has is None or name == "negative_prompt")
    }
    assert taken - left_out == set(VALID)


@given(values=combinations())
def test_any_combination_that_is_allowed_is_served_and_any_other_names_both(values: dict[str, str]) -> None:
    broken = [names for names, applies in FORBIDDEN.items() if applies(values)]
    try:
        edit(*values.items())
    except InvalidValue as error:
        assert any(all(name in error.message for name in names) for names in broken), error.message
    else:
        assert not broken


@given(
    values=combinations(),
    name=st.sampled_from(sorted(set(VALID) - {"user", "safety_identifier", "negative_prompt"})),
    wrong=st.sampled_from(["-2", "\x00", "1e99", "yes", "[]"]),
)
def test_any_single_invalid_field_is_named(values: dict[str, str], name: str, wrong: str) -> None:
    with pytest.raises(BadRequest) as caught:
        edit(*{**values, name: wrong}.items())
    assert caught.value.param == name


def test_a_number_without_end_is_refused() -> None:
    with pytest.raises(InvalidValue, match="40 digits") as caught:
        as_json(GENERATION, seed=10**400)
    assert caught.value.param == "seed"


def test_the_operators_default_steps_are_what_a_plain_request_runs() -> None:
    assert edit(default_num_inference_steps=5, max_num_inference_steps=6).request.num_inference_steps == 5


def test_an_inpainting_model_takes_an_image_whose_holes_are_a_clear_colour() -> None:
    inpainting = Path(__file__).parent.parent / "fixtures" / "models" / "inpaint"
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG", transparency=(0, 0, 0))
    assert edit(uploads=(FakeUpload("image", stream.getvalue()),), path=inpainting)
    with pytest.raises(MissingParameter) as caught:
        edit(path=inpainting)
    assert caught.value.param == "mask"
