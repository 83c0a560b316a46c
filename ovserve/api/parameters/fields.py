"""The one table of request fields: name, type, range, default, who takes it, and its text.

Validation, error messages, the reference page and the OpenAPI document are all made from this table. Names are the public
API's own (OpenAI's, then the model server's extensions, then ours); they stop at `params.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ovserve.models.profile import ModelProfile

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

SCHEDULERS = ("ddim", "pndm", "euler", "euler_ancestral", "lcm", "dpmpp_2m", "dpmpp_2m_karras", "unipc")
FLOAT32_MAX = 3.4028234663852886e38


@dataclass(frozen=True, slots=True)
class Field:
    """One field.

    Attributes:
        kind: text, integer, number, boolean, choice, size, file, files, object.
        text: what it does, for the reference page.
        endpoints: which of edit, generation, variation take it.
        default: as the reference page says it; empty for none.
        low, high: inclusive bounds of a number, before the operator's own limits.
        choices: the only values.
        same_as: another name of that field; both may be given when they are equal.
        needs: what a model must have to take it, in words; empty when every model does.
        has: whether a model has that.
        served: False for a name that clients know and no model here can serve: 400 unsupported_parameter.
    """

    name: str
    kind: str
    text: str
    endpoints: frozenset[str] = _EVERY
    default: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    same_as: str = ""
    needs: str = ""
    has: Callable[[ModelProfile], bool] | None = None
    served: bool = True


def _guided(profile: ModelProfile) -> bool:
    return profile.takes_negative_prompt


def _encoders(count: int) -> Callable[[ModelProfile], bool]:
    return lambda profile: profile.text_encoders >= count


def _t5(profile: ModelProfile) -> bool:
    return profile.family in ("sd3", "flux")


def _never(name: str, kind: str, text: str) -> Field:
    return Field(name, kind, text, served=False)


_TABLE = (
    Field("model", "text", "Which model; may be left out when only one is served or a default is configured."),
    Field("prompt", "text", "What the picture should show. Required for edits and generations."),
    Field("image", "files", "The picture to edit: PNG, JPEG, WebP, GIF (first frame), BMP or TIFF.", _WITH_IMAGE),
    Field("mask", "file", "Where to repaint; see mask_mode.", frozenset((EDIT,))),
    Field("n", "integer", "How many pictures; picture k uses seed + k.", default="1", low=1, high=64),
    Field("num_images_per_prompt", "integer", "The model server's name for `n`.", low=1, high=64, same_as="n"),
    Field("size", "size", "Size of the result: `auto` (the image's own) or WxH in pixels.", default="auto"),
    Field("width", "integer", "Width of the result in pixels; with `height` in place of `size`.", low=1, high=99999),
    Field("height", "integer", "Height of the result in pixels; with `width` in place of `size`.", low=1, high=99999),
    Field("response_format", "choice", "How pictures come back.", default="b64_json", choices=("b64_json", "url")),
    Field("output_format", "choice", "File format of the pictures.", default="png", choices=("png", "jpeg", "webp")),
    Field("output_compression", "integer", "Quality of jpeg and webp in percent; 100 makes webp lossless; png ignores it.",
          default="100", low=0, high=100),
    Field("background", "choice", "`transparent` keeps the source's alpha channel in the result; `auto` keeps it outside a mask; `opaque` never.",
          default="auto", choices=("auto", "opaque", "transparent")),
    Field("quality", "choice", "Preset of steps and engine shortcuts; `high` is the model's own best. Explicit fields win.",
          default="auto", choices=("auto", "low", "medium", "high", "standard", "hd", "xhigh", "max")),
    Field("input_fidelity", "choice", "Preset of `strength` where that is left out and the whole image is edited: `high` keeps more of it.",
          frozenset((EDIT,)), default="low", choices=("low", "high")),
    Field("stream", "boolean", "Answer with server-sent events.", frozenset((EDIT, GENERATION)), default="false"),
    Field("partial_images", "integer", "How many previews a stream carries before each final picture.",
          frozenset((EDIT, GENERATION)), default="0", low=0, high=3),
    Field("style", "choice", "Accepted for older clients; changes nothing.", default="", choices=("vivid", "natural")),
    Field("moderation", "choice", "Accepted; no checker runs, and the reply says so.", default="", choices=("auto", "low")),
    Field("user", "text", "Your own name for the end user; returned as safety_identifier."),
    Field("safety_identifier", "text", "As `user`; wins over it."),
    Field("negative_prompt", "text", "What the picture should not show.", needs="classifier-free guidance", has=_guided),
    Field("prompt_2", "text", "Prompt for the second text encoder.", needs="a second text encoder", has=_encoders(2)),
    Field("prompt_3", "text", "Prompt for the third text encoder.", needs="a third text encoder", has=_encoders(3)),
    Field("negative_prompt_2", "text", "Negative prompt for the second text encoder.", needs="a second text encoder",
          has=lambda profile: _guided(profile) and _encoders(2)(profile)),
    Field("negative_prompt_3", "text", "Negative prompt for the third text encoder.", needs="a third text encoder",
          has=lambda profile: _guided(profile) and _encoders(3)(profile)),
    Field("num_inference_steps", "integer",
          "Denoising steps; an edit runs num_inference_steps x strength of them, and where this is left out, at least one.",
          default="the model's", low=1, high=1000),
    Field("guidance_scale", "number", "How strongly the prompt is followed; 1 or less turns guidance off.",
          default="the model's", low=0, high=FLOAT32_MAX),
    Field("strength", "number", "How far the image is noised before it is denoised: near 0 keeps it, 1 forgets it; 0 leaves no step to run and is refused.", _WITH_IMAGE,
          default="the model's", low=0, high=1),
    Field("seed", "integer", "Seed of the noise, taken modulo 2**32. Random when left out or -1, and always reported.",
          default="random", low=-1, high=2**64 - 1),
    Field("rng_seed", "integer", "The model server's name for `seed`.", low=-1, high=2**64 - 1, same_as="seed"),
    Field("scheduler", "choice", "Noise scheduler; which of them a model serves depends on its engine.", default="the model's",
          choices=SCHEDULERS),
    Field("max_sequence_length", "integer", "Tokens of the T5 text encoder.", low=1, high=512, needs="a T5 text encoder", has=_t5),
    Field("resize_mode", "choice", "How an image of another shape is fitted: cut, padded or stretched.", _WITH_IMAGE,
          default="crop", choices=("crop", "pad", "stretch")),
    Field("mask_mode", "choice", "`alpha`: transparent is repainted; `luminance`: white is; `auto`: alpha if the mask has any.",
          frozenset((EDIT,)), default="auto", choices=("auto", "alpha", "luminance")),
    Field("mask_blur", "integer", "Width in pixels of the soft seam, inside the mask or the image's own holes.", frozenset((EDIT,)), default="0",
          low=0, high=256),
    Field("truncate_prompt", "boolean", "Cut a prompt that is too long instead of refusing it.", default="false"),
    Field("timeout_s", "number", "Deadline for the whole request in seconds.", default="600", low=0.01, high=86400),
    Field("metadata", "boolean", "Write prompt, seed and settings into the file.", default="true"),
    _never("lora_alphas", "object", "Weights of LoRA adapters: no model here has adapters."),
    _never("markup", "file", "An overlay with instructions."),
    _never("complexity", "choice", "Detail of an animation or drawing."),
    _never("frame_count", "integer", "Frames of an animation."),
    _never("frame_duration_ms", "integer", "Duration of an animation's frames."),
    _never("svg", "object", "Settings of a vector drawing."),
)  # fmt: skip

FIELDS: Mapping[str, Field] = {field.name: field for field in _TABLE}

# Other spellings of field names that clients send, and the field they mean.
SPELLINGS: Mapping[str, str] = {"images": "image"}


def field_named(name: str) -> Field | None:
    """The field of that name, or None."""
    return FIELDS.get(SPELLINGS.get(name, name))


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Two fields whose values cannot go together.

    Attributes:
        first, second: the fields; the error's `param` is the first.
        first_told, second_told: the combination in words.
        applies: whether it holds for resolved values by field name.
        resolved: what a field counts as when the request leaves it out is in the values too (defaults are filled in).
    """

    first: str
    first_told: str
    second: str
    second_told: str
    applies: Callable[[Mapping[str, Any]], bool]


def _unguided(name: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda values: bool(values[name]) and values["guidance_scale"] <= 1


EXCLUSIONS = (
    Exclusion("response_format", "'response_format' = 'url'", "stream", "'stream' = true (streams carry pictures as base64)",
              lambda v: v["response_format"] == "url" and v["stream"]),
    Exclusion("partial_images", "'partial_images' above 0", "stream", "'stream' = false",
              lambda v: v["partial_images"] > 0 and not v["stream"]),
    Exclusion("background", "'background' = 'transparent'", "output_format", "'output_format' = 'jpeg' (it has no alpha channel)",
              lambda v: v["background"] == "transparent" and v["output_format"] == "jpeg"),
    *(Exclusion(name, f"'{name}'", "guidance_scale", "'guidance_scale' of 1 or less (guidance is off)", _unguided(name))
      for name in ("negative_prompt", "negative_prompt_2", "negative_prompt_3")),
)  # fmt: skip
