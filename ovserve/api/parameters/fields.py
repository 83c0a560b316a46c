"""The table of request fields: name, kind, range, default, endpoints, text, and the record's attribute it fills.

Validation, defaults, the record for the worker, error messages, the reference page and the OpenAPI document are all
made from this table. The names are those of the public API (OpenAI's, then the model server's extensions, then ours);
they are not used outside this package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ovserve.models.families import LCM_SCHEDULER
from ovserve.models.profile import ModelProfile
from ovserve.settings.loras import MAX_ALPHA
from ovserve.settings.options import ModelSettings, Resolution, Settings
from ovserve.wire.request import ImageRequest

__all__ = [
    "EDIT",
    "ENDPOINTS",
    "EXCLUSIONS",
    "FIELDS",
    "GENERATION",
    "SCHEDULERS",
    "VARIATION",
    "Exclusion",
    "Field",
    "field_named",
]

EDIT, GENERATION, VARIATION = "edit", "generation", "variation"
ENDPOINTS = (EDIT, GENERATION, VARIATION)
_EVERY = frozenset(ENDPOINTS)
_WITH_IMAGE = frozenset((EDIT, VARIATION))
_WITH_PROMPT = frozenset((EDIT, GENERATION))

SCHEDULERS = ("ddim", "pndm", "euler", "euler_ancestral", LCM_SCHEDULER, "dpmpp_2m", "dpmpp_2m_karras", "unipc")
# The names of the same schedulers in other programs (Stable Diffusion web UI, ComfyUI, stable-diffusion.cpp).
SAMPLERS = {
    "plms": "pndm",
    "eulera": "euler_ancestral",
    "keuler": "euler",
    "keulera": "euler_ancestral",
    "dpm++2m": "dpmpp_2m",
    "kdpm++2m": "dpmpp_2m",
    "dpm++2mkarras": "dpmpp_2m_karras",
}
FLOAT32_MAX = 3.4028234663852886e38

_RECORD = frozenset(attribute.name for attribute in dataclasses.fields(ImageRequest))

# The operator's inclusive bounds of a value, from the options of the model and of the server; None for no bound.
Limit = Callable[[ModelSettings, Settings], tuple[float | None, float | Resolution | None]]


@dataclass(frozen=True, slots=True)
class Field:
    """One field.

    Attributes:
        name: the field's name in requests.
        kind: text, integer, number, boolean, choice, size, file, files, object.
        text: what the field does, for the reference page and the OpenAPI document.
        endpoints: the endpoints that accept it: edit, generation, variation.
        required: the endpoints that require it.
        default: the value if it is left out; None where `resolve.py` chooses it, or the record's own default applies.
        default_text: what the reference page shows as the default where `default` is None; empty for none.
        low, high: inclusive bounds of a number.
        limit: returns the operator's bounds; None if there are none.
        limited_by: what these bounds belong to, in words.
        choices: the accepted values.
        spellings: other spellings of them; case, blanks, `_` and `-` do not count.
        same_as: the field of which this is another name; both may be given if they are equal.
        needs: the model feature that the field requires, in words; empty if every model supports it.
        has: whether a model has that feature.
        served: False for a field that clients send and no model supports: 400 unsupported_parameter.
        record: the attribute of ImageRequest that it fills, where that has another name.
    """

    name: str
    kind: str
    text: str
    endpoints: frozenset[str] = _EVERY
    required: frozenset[str] = frozenset()
    default: Any = None
    default_text: str = ""
    low: float | None = None
    high: float | None = None
    limit: Limit | None = None
    limited_by: str = "this model"
    choices: tuple[str, ...] = ()
    spellings: Mapping[str, str] = field(default_factory=dict)
    same_as: str = ""
    needs: str = ""
    has: Callable[[ModelProfile], bool] | None = None
    served: bool = True
    record: str = ""

    @property
    def attribute(self) -> str:
        """The attribute of ImageRequest that this field fills; empty if it fills none."""
        name = self.record or self.name
        return name if name in _RECORD else ""

    @property
    def shown_default(self) -> str:
        """The default as the reference page and the OpenAPI document show it; empty for none."""
        if isinstance(self.default, bool):
            return "true" if self.default else "false"
        return self.default_text if self.default is None else str(self.default)


def _has_guidance(profile: ModelProfile) -> bool:
    return profile.takes_negative_prompt


def _has_encoders(count: int) -> Callable[[ModelProfile], bool]:
    return lambda profile: profile.text_encoders >= count


def _has_t5(profile: ModelProfile) -> bool:
    return profile.traits.t5 is not None


def _unsupported(name: str, kind: str, text: str) -> Field:
    """Return a field that no model supports; `text` is a phrase for the error message."""
    return Field(name, kind, text, served=False)


_TABLE = (
    Field("model", "text", "The model. May be left out if the server has only one model or a default model."),
    Field("prompt", "text", "What the picture should show. Required for edits and generations.",
          required=_WITH_PROMPT, default=""),
    Field("image", "files",
          "The picture to edit: PNG, JPEG, WebP, AVIF, GIF (first frame), BMP or TIFF; HEIC where the extra `heic` is "
          "installed. Models that edit by reference take several (`image[]`, repeated): the first one is edited, and a "
          "mask belongs to it.", _WITH_IMAGE, required=_WITH_IMAGE, record="images"),
    Field("mask", "file", "The region to repaint; see `mask_mode`.", frozenset((EDIT,))),
    Field("n", "integer", "Number of pictures. Picture k uses seed + k.", default=1, low=1, high=64,
          limit=lambda model, _: (None, model.max_num_images_per_prompt)),
    Field("size", "size", "Size of the result: `auto` (size of the image) or WxH in pixels.", default_text="auto",
          limit=lambda model, _: (None, model.max_resolution)),
    Field("width", "integer", "Width of the result in pixels; use `width` and `height`, or `size`.", low=1, high=99999,
          limit=lambda model, _: (None, model.max_resolution.width)),
    Field("height", "integer", "Height of the result in pixels; use `width` and `height`, or `size`.",
          low=1, high=99999, limit=lambda model, _: (None, model.max_resolution.height)),
    Field("response_format", "choice", "Pictures in the reply: base64, or the URL of a stored file.",
          default_text="the option `default_response_format`", choices=("b64_json", "url")),
    Field("output_format", "choice", "File format of the pictures.", default="png", choices=("png", "jpeg", "webp"),
          spellings={"jpg": "jpeg"}),
    Field("output_compression", "integer",
          "Quality of jpeg and webp in percent. With 100, webp is lossless. Ignored for png.",
          default=100, low=0, high=100),
    Field("background", "choice",
          "Alpha channel of the source: `transparent` keeps it, `auto` keeps it outside the mask, `opaque` removes it.",
          default="auto", choices=("auto", "opaque", "transparent")),
    Field("quality", "choice",
          "Preset of steps and engine shortcuts; `high` is the model's best. Fields in the request override it.",
          default="auto", choices=("auto", "low", "medium", "high", "standard", "hd", "xhigh", "max")),
    Field("input_fidelity", "choice",
          "Preset of `strength`, used if that is left out and the whole image is edited; `high` keeps more of it. "
          "Models that edit by reference see each image at up to 1 megapixel, with `high` at up to 2.",
          frozenset((EDIT,)), default="low", choices=("low", "high")),
    Field("stream", "boolean", "Send the reply as server-sent events.", frozenset((EDIT, GENERATION)), default=False,
          record="progress"),
    Field("partial_images", "integer", "Number of previews in a stream before each final picture.",
          frozenset((EDIT, GENERATION)), default=0, low=0, high=3),
    Field("style", "choice", "Accepted for older clients; has no effect.", choices=("vivid", "natural")),
    Field("complexity", "choice", "OpenAI's planning effort. Accepted; has no effect.",
          choices=("auto", "low", "medium", "high")),
    Field("moderation", "choice",
          "Accepted, but no content is checked; the reply contains `moderation: {checked: false}`.",
          choices=("auto", "low")),
    Field("user", "text", "Your identifier of the end user; returned as `safety_identifier`.", default=""),
    Field("safety_identifier", "text", "Same purpose as `user`; overrides it.", default=""),
    Field("negative_prompt", "text", "What the picture should not show.",
          needs="classifier-free guidance", has=_has_guidance),
    Field("prompt_2", "text", "Prompt for the second text encoder.",
          needs="a second text encoder", has=_has_encoders(2)),
    Field("prompt_3", "text", "Prompt for the third text encoder.", needs="a third text encoder", has=_has_encoders(3)),
    Field("negative_prompt_2", "text", "Negative prompt for the second text encoder.", needs="a second text encoder",
          has=lambda profile: _has_guidance(profile) and _has_encoders(2)(profile)),
    Field("negative_prompt_3", "text", "Negative prompt for the third text encoder.", needs="a third text encoder",
          has=lambda profile: _has_guidance(profile) and _has_encoders(3)(profile)),
    Field("num_inference_steps", "integer",
          "Denoising steps. An edit runs num_inference_steps x strength of them; if this is left out, at least one.",
          default_text="the model's", low=1, high=1000,
          limit=lambda model, _: (None, model.max_num_inference_steps)),
    Field("guidance_scale", "number", "How closely the result follows the prompt; 1 or less turns guidance off.",
          default_text="the model's", low=0, high=FLOAT32_MAX,
          limit=lambda model, _: (None, model.max_guidance_scale)),
    Field("image_guidance_scale", "number",
          "How closely the result follows the image, for models that have a second guidance scale; below 1 turns "
          "guidance off.", frozenset((EDIT,)), default=1.5, low=0, high=FLOAT32_MAX,
          needs="a guidance scale for the image",
          has=lambda profile: profile.traits.has_image_guidance,
          limit=lambda model, _: (None, model.max_guidance_scale)),
    Field("strength", "number",
          "How much noise is added to the image before denoising: near 0 keeps the image, 1 ignores it. 0 runs no step "
          "and returns the image itself, at the requested size and in the requested format.",
          _WITH_IMAGE, default_text="the model's", low=0, high=1,
          needs="an edit that starts from the image",
          has=lambda profile: profile.takes_strength,
          limit=lambda model, _: (model.min_strength, model.max_strength)),
    Field("seed", "integer", "Seed of the noise, modulo 2**32. Random if left out or -1. The reply always contains it.",
          default_text="random", low=-1, high=2**64 - 1),
    Field("scheduler", "choice", "Noise scheduler; the choices of a model depend on its engine.",
          default_text="the model's", choices=SCHEDULERS, spellings=SAMPLERS),
    Field("max_sequence_length", "integer", "Maximum number of tokens for the T5 text encoder.",
          low=1, high=512, needs="a T5 text encoder", has=_has_t5),
    Field("lora_alphas", "object",
          "Weights of LoRA adapters by alias: an object, its JSON text, or `lora_alphas[ALIAS]`. With the name of an "
          "adapter or composite as `model` they replace its weights; with the model's own name they add adapters.",
          default_text="the weights of the adapter or composite that `model` names", low=-MAX_ALPHA, high=MAX_ALPHA,
          needs="LoRA adapters", record="adapters"),
    Field("resize_mode", "choice", "How an image of another aspect ratio is fitted: cropped, padded or stretched.",
          _WITH_IMAGE, default="crop", choices=("crop", "pad", "stretch")),
    Field("mask_mode", "choice",
          "`alpha` repaints transparent pixels, `luminance` white ones; `auto` is alpha if a pixel of the mask has "
          "alpha below 128, else luminance. `stencil` repaints opaque pixels if some pixel of the mask is not, else "
          "white ones. `none`, without a mask: the image's own transparent pixels are not a mask.",
          frozenset((EDIT,)), default="auto", choices=("auto", "alpha", "luminance", "stencil", "none")),
    Field("mask_invert", "boolean", "Repaint what the mask would keep, and keep what it would repaint.",
          frozenset((EDIT,)), default=False),
    Field("mask_blur", "integer",
          "Width in pixels of the soft edge, inside the mask or the transparent pixels of the image.",
          frozenset((EDIT,)), default=0, low=0, high=256),
    Field("mask_fill", "choice",
          "What the model sees where it repaints: the image itself, or the smoothed colours around the mask.",
          frozenset((EDIT,)), default="original", choices=("original", "surroundings")),
    Field("mask_area", "choice",
          "What the model works on: the `whole` image, or only the part around the `masked` pixels, scaled to `size`. "
          "With `masked` the result has the size of the image, and `size` is the resolution of that part; "
          "`resize_mode` has no effect.",
          frozenset((EDIT,)), default="whole", choices=("whole", "masked")),
    Field("mask_padding", "integer", "Pixels of the image that the model sees on each side of the masked part.",
          frozenset((EDIT,)), default=0, low=0, high=4096),
    Field("truncate_prompt", "boolean",
          "Cut a prompt that is too long instead of rejecting it. The built-in model then also leaves out words that "
          "it does not know. The reply contains the prompt that was used (`revised_prompt`).",
          default_text="the option `truncate_prompt`; the built-in model's own default is true"),
    Field("timeout_s", "number", "Time limit for the whole request in seconds.",
          default_text="the option `default_timeout_s`", low=0.01, high=86400,
          limit=lambda _, server: (None, server.max_timeout_s), limited_by="this server"),
    Field("keep_alive", "number",
          "Time in seconds for which the model stays loaded after its last job; the newest request decides. Without "
          "effect on a pinned model.",
          default_text="the option `keep_alive_s`", low=0, high=86400 * 365,
          limit=lambda _, server: (None, server.keep_alive_max_s), limited_by="this server"),
    Field("metadata", "boolean", "Write prompt, seed and settings into the file.", default=True),
    _unsupported("markup", "file", "an overlay with instructions"),
    _unsupported("frame_count", "integer", "frames of an animation"),
    _unsupported("frame_duration_ms", "integer", "duration of the frames of an animation"),
    _unsupported("svg", "object", "settings of a vector drawing"),
)  # fmt: skip

# Further names of fields, and the field of each: the model server's, and those of other local servers.
_SYNONYMS = (
    ("num_images_per_prompt", "n"),
    ("rng_seed", "seed"),
    ("steps", "num_inference_steps"),
    ("step", "num_inference_steps"),
    ("num_steps", "num_inference_steps"),
    ("cfg_scale", "guidance_scale"),
    ("cfg", "guidance_scale"),
    ("guidance", "guidance_scale"),
    ("true_cfg_scale", "guidance_scale"),
    ("image_cfg_scale", "image_guidance_scale"),
    ("image_cfg", "image_guidance_scale"),
    ("sampler", "scheduler"),
    ("sample_method", "scheduler"),
    ("sampling_method", "scheduler"),
    ("denoising_strength", "strength"),
    ("denoise", "strength"),
)


def _synonym(name: str, field: Field) -> Field:
    """Return a field that is another name of `field`."""
    return dataclasses.replace(
        field,
        name=name,
        text=f"Another name of `{field.name}`.",
        required=frozenset(),
        default=None,
        default_text="",
        same_as=field.name,
        record="",
    )


_BY_NAME = {field.name: field for field in _TABLE}
FIELDS: Mapping[str, Field] = {**_BY_NAME, **{name: _synonym(name, _BY_NAME[of]) for name, of in _SYNONYMS}}

# Other spellings of field names that clients send, with the field they stand for.
SPELLINGS: Mapping[str, str] = {"images": "image", "image_url": "image"}


def field_named(name: str) -> Field | None:
    """Return the field with this name or spelling, or None."""
    return FIELDS.get(SPELLINGS.get(name, name))


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Two fields with values that cannot be combined.

    Attributes:
        first, second: names of the fields; the error's `param` is the first.
        first_value, second_value: the fields and their values, in words.
        applies: whether a request has this combination; gets every field's value by name, defaults included, and the
            model.
    """

    first: str
    first_value: str
    second: str
    second_value: str
    applies: Callable[[Mapping[str, Any], ModelProfile], bool]


def _needs_guidance(name: str) -> Callable[[Mapping[str, Any], ModelProfile], bool]:
    return lambda values, model: bool(values[name]) and model.traits.engine_guidance(values["guidance_scale"]) <= 1


EXCLUSIONS = (
    Exclusion("response_format", "response_format = url", "stream", "stream = true (it sends pictures as base64)",
              lambda v, _: v["response_format"] == "url" and v["stream"]),
    Exclusion("partial_images", "partial_images above 0", "stream", "stream = false",
              lambda v, _: v["partial_images"] > 0 and not v["stream"]),
    Exclusion("background", "background = transparent", "output_format", "output_format = jpeg (it has no alpha)",
              lambda v, _: v["background"] == "transparent" and v["output_format"] == "jpeg"),
    Exclusion("mask_padding", "mask_padding above 0", "mask_area", "mask_area = whole (the model sees the whole image)",
              lambda v, _: v["mask_padding"] > 0 and v["mask_area"] == "whole"),
    *(Exclusion(name, name, "guidance_scale", "a guidance_scale that turns guidance off", _needs_guidance(name))
      for name in ("negative_prompt", "negative_prompt_2", "negative_prompt_3")),
)  # fmt: skip
