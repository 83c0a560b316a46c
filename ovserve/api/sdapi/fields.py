"""The table of fields of AUTOMATIC1111's API: what each becomes here, or why it is ignored or refused.

The translation of requests, the field `parameters` of replies, the OpenAPI document and the reference page are made
from this table. The names on the left are that API's; those in `fills` are the ones of `api.parameters.fields`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ovserve.api.parameters.fields import EDIT, GENERATION

__all__ = [
    "ENDPOINTS",
    "FIELDS",
    "FILLS",
    "IGNORED",
    "IMG2IMG",
    "INERT",
    "REFUSED",
    "RESIZE_MODES",
    "SETTINGS",
    "TXT2IMG",
    "USED",
    "SdField",
    "fields_of",
]

TXT2IMG, IMG2IMG = "txt2img", "img2img"
ENDPOINTS: Mapping[str, str] = {TXT2IMG: GENERATION, IMG2IMG: EDIT}
_BOTH = frozenset(ENDPOINTS)
_TXT2IMG, _IMG2IMG = frozenset((TXT2IMG,)), frozenset((IMG2IMG,))

# By number: "Just resize", "Crop and resize", "Resize and fill".
RESIZE_MODES = ("stretch", "crop", "pad")
FILLS = ("surroundings", "original")  # inpainting_fill by number; 2 and 3 are noise and zeros in the latents

USED, IGNORED, INERT, REFUSED = "used", "ignored", "no effect", "refused"


def is_off(value: Any) -> bool:
    """Return whether a value leaves an option off: null, zero, false, or an empty text, list or object."""
    return not value


def _is_any_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value is None or value in values


def _is_no_name(value: Any) -> bool:
    return not value or value == "None"


def _is_random(value: Any) -> bool:
    return value in (None, "", -1, 0)


def _are_scripts_off(value: Any) -> bool:
    """Return whether no script runs: each has no arguments, or begins with false, the switch of most scripts."""
    if not isinstance(value, dict):
        return is_off(value)
    arguments = [script.get("args") if isinstance(script, dict) else script for script in value.values()]
    return all(not given or (isinstance(given, list) and given[0] is False) for given in arguments)


@dataclass(frozen=True, slots=True)
class SdField:
    """One field.

    Attributes:
        name: the field's name in that API.
        kind: text, integer, number, boolean, list, object, picture, pictures. A number may be sent as text, as there.
        use: used; ignored (and named in `info`); refused; no effect (and not named).
        text: what the field does here, for the reference page.
        default: the value that `parameters` shows if the field is left out: that of AUTOMATIC1111, or null where the
            default is the same as on the other routes.
        fills: our fields that it fills, in words.
        is_neutral: whether an ignored or refused field has a value that changes nothing.
        endpoints: txt2img, img2img.
    """

    name: str
    kind: str
    use: str
    text: str
    default: Any = None
    fills: str = ""
    is_neutral: Callable[[Any], bool] = is_off
    endpoints: frozenset[str] = _BOTH


def _hires(name: str, kind: str, default: Any) -> SdField:
    return SdField(name, kind, INERT, "Belongs to `enable_hr`, which is refused.", default, endpoints=_TXT2IMG)


def _sampling(name: str, default: Any, *neutral: Any) -> SdField:
    text = "The schedulers here have no such parameter."
    return SdField(name, "number", IGNORED, text, default, is_neutral=_is_any_of(default, 0, *neutral))


def _unsaved(name: str) -> SdField:
    return SdField(name, "boolean", INERT, "Nothing is saved on the server.", False)


_TABLE = (
    SdField("prompt", "text", USED, "May be empty. Weights such as `(word:1.2)` are plain text.", "", "prompt"),
    SdField("negative_prompt", "text", USED,
            "Ignored, as there, if guidance is off or the model has none.", "", "negative_prompt"),
    SdField("init_images", "pictures", USED, "One image as base64 or data URL. Transparent pixels are shown on white.",
            None, "image", endpoints=_IMG2IMG),
    SdField("mask", "picture", USED,
            "White is repainted. In a mask that is not opaque everywhere, opaque pixels are repainted.", None,
            "mask, mask_mode = stencil", endpoints=_IMG2IMG),
    SdField("mask_blur", "integer", USED, "Width of the soft edge; it lies inside the mask. Without a mask, no effect.",
            4, "mask_blur", endpoints=_IMG2IMG),
    SdField("mask_blur_x", "integer", USED, "The larger of both counts, if `mask_blur` is left out.", 4, "mask_blur",
            endpoints=_IMG2IMG),
    SdField("mask_blur_y", "integer", USED, "The larger of both counts, if `mask_blur` is left out.", 4, "mask_blur",
            endpoints=_IMG2IMG),
    SdField("mask_round", "boolean", IGNORED, "Masks have two levels here.", True, is_neutral=_is_any_of(True),
            endpoints=_IMG2IMG),
    SdField("inpainting_mask_invert", "integer", USED, "0 or 1.", 0, "mask_invert", endpoints=_IMG2IMG),
    SdField("inpainting_fill", "integer", USED,
            "0: smoothed colours around the mask; 1: the image. 2 and 3, noise and zeros in the latents, are refused.",
            0, "mask_fill", endpoints=_IMG2IMG),
    SdField("inpaint_full_res", "boolean", USED,
            "Only the part around the mask is repainted, at the size `width` x `height`; the result has the size of "
            "the image.",
            True, "mask_area", endpoints=_IMG2IMG),
    SdField("inpaint_full_res_padding", "integer", USED, "In pixels of the image.", 0, "mask_padding",
            endpoints=_IMG2IMG),
    SdField("resize_mode", "integer", USED,
            "0: stretch, 1: crop, 2: pad with the edges. 3, an enlargement of the latents, is refused.", 0,
            "resize_mode", endpoints=_IMG2IMG),
    SdField("denoising_strength", "number", USED,
            "Ignored if the model has no strength. For txt2img no effect: it belongs to `enable_hr`.", None,
            "strength"),
    SdField("width", "integer", USED,
            "If both sides are left out, the default is that of the other routes; if one is, 512.", None, "width"),
    SdField("height", "integer", USED, "As `width`.", None, "height"),
    SdField("steps", "integer", USED, "", None, "num_inference_steps"),
    SdField("cfg_scale", "number", USED, "", None, "guidance_scale"),
    SdField("seed", "integer", USED, "-1: random.", -1, "seed"),
    SdField("batch_size", "integer", USED, "The product of `batch_size` and `n_iter` is the number of pictures.", 1,
            "n"),
    SdField("n_iter", "integer", USED, "See `batch_size`.", 1, "n"),
    SdField("sampler_name", "text", USED,
            "A name of `/sdapi/v1/samplers` or one of its aliases; left out: the model's own scheduler.", None,
            "scheduler"),
    SdField("sampler_index", "text", USED, "Old name of `sampler_name`, used if that is left out.", None, "scheduler"),
    SdField("scheduler", "text", USED,
            "`automatic`, `uniform` (also as `normal`, `simple`, `ddim`, `sgm_uniform`), or, with DPM++ 2M, `karras`. "
            "`automatic` is `karras` for DPM++ 2M, as there.",
            None, "scheduler"),
    SdField("override_settings", "object", USED,
            "`sd_model_checkpoint` is the model, `samples_format` (png, jpg, webp) the file format. Others are "
            "ignored.",
            {}, "model, output_format"),
    SdField("send_images", "boolean", USED, "If false, the reply has no pictures.", True),
    SdField("save_images", "boolean", IGNORED, "Nothing is saved on the server.", False),
    SdField("override_settings_restore_afterwards", "boolean", INERT, "No request changes settings.", True),
    SdField("subseed", "integer", INERT, "Belongs to `subseed_strength`.", -1, is_neutral=_is_random),
    SdField("subseed_strength", "number", REFUSED, "There are no variations of a seed.", 0),
    SdField("seed_resize_from_w", "integer", REFUSED, "The noise has the size of the picture.", -1,
            is_neutral=_is_random),
    SdField("seed_resize_from_h", "integer", REFUSED, "The noise has the size of the picture.", -1,
            is_neutral=_is_random),
    SdField("enable_hr", "boolean", REFUSED, "There is no second pass.", False, endpoints=_TXT2IMG),
    _hires("firstphase_width", "integer", 0),
    _hires("firstphase_height", "integer", 0),
    _hires("hr_scale", "number", 2.0),
    _hires("hr_upscaler", "text", None),
    _hires("hr_second_pass_steps", "integer", 0),
    _hires("hr_resize_x", "integer", 0),
    _hires("hr_resize_y", "integer", 0),
    _hires("hr_checkpoint_name", "text", None),
    _hires("hr_sampler_name", "text", None),
    _hires("hr_scheduler", "text", None),
    _hires("hr_prompt", "text", ""),
    _hires("hr_negative_prompt", "text", ""),
    SdField("firstpass_image", "text", REFUSED, "There is no second pass.", None, endpoints=_TXT2IMG),
    SdField("tiling", "boolean", REFUSED, "No model here makes tiles.", None),
    SdField("refiner_checkpoint", "text", REFUSED, "One model makes a picture.", None,
            is_neutral=_is_no_name),
    SdField("refiner_switch_at", "number", INERT, "Belongs to `refiner_checkpoint`.", None),
    SdField("script_name", "text", REFUSED, "There are no scripts.", None, is_neutral=_is_no_name),
    SdField("script_args", "list", INERT, "Belongs to `script_name`.", []),
    SdField("alwayson_scripts", "object", REFUSED,
            "There are no scripts. One without arguments, or with `false` as the first, is accepted.", {},
            is_neutral=_are_scripts_off),
    SdField("infotext", "text", REFUSED, "It would replace other fields.", None),
    SdField("latent_mask", "text", REFUSED, "Masks are of pixels.", None, endpoints=_IMG2IMG),
    SdField("image_cfg_scale", "number", IGNORED, "Belongs to InstructPix2Pix models.", None,
            is_neutral=_is_any_of(0, 1.5), endpoints=_IMG2IMG),
    SdField("initial_noise_multiplier", "number", IGNORED, "The noise of a strength is fixed.", None,
            is_neutral=_is_any_of(1), endpoints=_IMG2IMG),
    SdField("include_init_images", "boolean", IGNORED, "`parameters` never contains pictures.", False,
            endpoints=_IMG2IMG),
    SdField("styles", "list", IGNORED, "There are no stored styles.", None),
    SdField("restore_faces", "boolean", IGNORED, "There is no face restoration.", None),
    _sampling("eta", None, 1),
    _sampling("s_min_uncond", None),
    _sampling("s_churn", None),
    _sampling("s_tmax", None),
    _sampling("s_tmin", None),
    _sampling("s_noise", None, 1),
    SdField("disable_extra_networks", "boolean", IGNORED, "A prompt names no extra networks.", False),
    SdField("comments", "object", IGNORED, "They are not written into the file.", None),
    SdField("force_task_id", "text", INERT, "`progress` shows the caller's own jobs.", None),
    _unsaved("do_not_save_samples"),
    _unsaved("do_not_save_grid"),
)  # fmt: skip

FIELDS: Mapping[str, SdField] = {field.name: field for field in _TABLE}

# The members of `override_settings` that are used.
SETTINGS = ("sd_model_checkpoint", "samples_format")


def fields_of(endpoint: str) -> dict[str, SdField]:
    """Return the fields of txt2img or img2img by name."""
    return {name: field for name, field in FIELDS.items() if endpoint in field.endpoints}
