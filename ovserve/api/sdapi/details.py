"""Errors in the form of AUTOMATIC1111's API, a FastAPI application: `detail`, with that API's names of fields."""

from __future__ import annotations

import re
from typing import Any

from ovserve.api.sdapi.samplers import with_labels
from ovserve.errors import ApiError, BadRequest, Unprocessable

__all__ = ["as_detail_error", "detail_document"]

# Our names of fields, as errors of the validation and of a worker begin with them, to those of this API.
_NAMES = {
    "image": "init_images",
    "model": "override_settings.sd_model_checkpoint",
    "n": "batch_size x n_iter",
    "strength": "denoising_strength",
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "scheduler": "sampler_name",
    "mask_area": "inpaint_full_res",
    "mask_padding": "inpaint_full_res_padding",
    "mask_fill": "inpainting_fill",
    "mask_invert": "inpainting_mask_invert",
}
_PARAM = re.compile(r"(\w+)((?:\[\d*\])*)")


def as_detail_error(error: ApiError) -> ApiError:
    """Return the error that this API's clients get: 422 for a wrong field, with their name of it."""
    if not isinstance(error, BadRequest) or error.status != BadRequest.status or error.closes_connection:
        return error
    message, param = error.message, error.param
    match = _PARAM.fullmatch(param or "")
    if match and match[1] in _NAMES:
        theirs = _NAMES[match[1]] + match[2]
        for ours, name in ((str(param), theirs), (match[1], _NAMES[match[1]])):
            if message.startswith(ours):
                message = name + message[len(ours) :]
                break
        if match[1] == "scheduler":
            message = with_labels(message)
        param = "batch_size" if match[1] == "n" else theirs
    return Unprocessable(message, param=param, kind=str(error.code), headers=error.headers)


def detail_document(error: ApiError) -> dict[str, Any]:
    """Return the document of an error: FastAPI's list for a wrong field, else AUTOMATIC1111's object.

    `errors` has the message as text in both, for clients that show one of them.
    """
    if isinstance(error, Unprocessable):
        detail: Any = [{"type": error.kind, "loc": ["body", *_location(error.param)], "msg": error.message}]
    else:
        detail = error.message
    return {"error": error.code, "detail": detail, "body": "", "errors": error.message}


def _location(param: str | None) -> list[str | int]:
    """Return the path of a field in the body: `init_images[0]` as ["init_images", 0]."""
    words = re.findall(r"[^.\[\]]+", param or "")
    return [int(word) if word.isdecimal() and len(word) < 10 else word for word in words]
