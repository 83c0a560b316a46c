"""Replies in the form of AUTOMATIC1111's API: pictures with `parameters` and `info`, models, options, progress."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

from ovserve import __version__
from ovserve.api.exchange import Chunk, JsonReply
from ovserve.api.parameters.params import Parameters
from ovserve.api.replies import ignored_headers, json_reply, timing_headers
from ovserve.api.sdapi.embedded import PARAMETERS, read_texts
from ovserve.api.sdapi.live import Snapshot
from ovserve.api.sdapi.samplers import sampler_label
from ovserve.api.sdapi.translate import Translation
from ovserve.api.windows import Base64Windows
from ovserve.dispatch.jobs import Job
from ovserve.models.catalog import Catalog

__all__ = ["models_document", "options_document", "pictures_reply", "progress_reply"]

_TIMESTAMP = "%Y%m%d%H%M%S"


def _dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def pictures_reply(job: Job, parameters: Parameters, translation: Translation, *, is_interrupted: bool) -> JsonReply:
    """Return the reply of txt2img or img2img.

    Args:
        job: the job with its results: all of them, or those that it had when it was interrupted.
        parameters: the validated request.
        translation: the request as it was sent.
        is_interrupted: whether the client has interrupted the job.

    Returns:
        The reply. It reads the job's segments while it is written, and its `close` closes the job.
    """
    chunks: list[Chunk] = [b'{"images":[']
    if translation.sends_images:
        for number, picture in enumerate(sorted(job.results)):
            result = job.results[picture]
            chunks += [b',"' if number else b'"', Base64Windows(result.segment.read, result.size), b'"']
    info = {**_info(job, parameters, translation), "interrupted": is_interrupted}
    tail = _dumps({"parameters": translation.values, "info": json.dumps(info, ensure_ascii=False)})
    chunks.append(b"]," + tail[1:] + b"\n")
    return JsonReply(chunks, 200, {**timing_headers(job), **ignored_headers(parameters)}, job.close)


def _info(job: Job, parameters: Parameters, translation: Translation) -> dict[str, Any]:
    """Return the members of `info`: what was used, and for each picture its seed and the text that its file has."""
    request, prepared, profile = parameters.request, job.prepared, parameters.model.profile
    pictures = sorted(job.results)
    prompt = prepared.revised_prompt if prepared and prepared.revised_prompt else request.prompt
    seeds = [request.seed_of(picture) for picture in range(request.n)]
    return {
        "prompt": prompt,
        "all_prompts": [prompt] * request.n,
        "negative_prompt": request.negative_prompt,
        "all_negative_prompts": [request.negative_prompt] * request.n,
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": -1,
        "all_subseeds": [-1] * request.n,
        "subseed_strength": 0,
        "width": prepared.width if prepared else request.width,
        "height": prepared.height if prepared else request.height,
        "sampler_name": sampler_label(request.scheduler or request.preferred_scheduler, profile.scheduling.name),
        "cfg_scale": request.guidance_scale,
        "steps": request.num_inference_steps,
        "batch_size": translation.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": parameters.model.name,
        "sd_model_hash": "",
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": request.strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [_infotext(job, picture) for picture in pictures],
        "styles": [],
        "job_timestamp": time.strftime(_TIMESTAMP),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": profile.inpainting_unet,
        "version": f"ovserve {__version__}",
        "ignored": parameters.ignored,
    }


def _infotext(job: Job, picture: int) -> str:
    """Return the text of parameters in a result's file; empty if it has none."""
    result = job.results[picture]
    with result.segment.view[: result.size] as view:
        return read_texts(view).get(PARAMETERS, "")


def progress_reply(found: Snapshot | None, *, with_image: bool) -> JsonReply:
    """Return the reply of `GET progress` for a client's jobs; None: it has none."""
    state = {
        "skipped": False,
        "interrupted": found.is_interrupted if found else False,
        "stopping_generation": found.is_interrupted if found else False,
        "job": f"scripts_{found.task}" if found else "",
        "job_count": found.pictures if found else 0,
        "job_timestamp": time.strftime(_TIMESTAMP, time.localtime(found.started_at if found else 0)),
        "job_no": found.finished if found else 0,
        "sampling_step": found.step if found else 0,
        "sampling_steps": found.steps if found else 0,
        "jobs": found.jobs if found else 0,
    }
    image = base64.b64encode(found.preview).decode() if found and found.preview and with_image else None
    progress = found.progress if found else 0.0
    eta_s = found.elapsed_s / progress - found.elapsed_s if found and progress else 0.0
    return json_reply(
        {
            "progress": progress,
            "eta_relative": eta_s,
            "state": state,
            "current_image": image,
            "textinfo": None,
        }
    )


def models_document(catalog: Catalog) -> list[dict[str, Any]]:
    """Return the reply of `GET sd-models`: every model and alias."""
    return [
        {"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}
        for name in catalog.listed()
    ]


def options_document(catalog: Catalog) -> dict[str, Any]:
    """Return the reply of `GET options`: the settings of that API that have a counterpart here."""
    return {
        "sd_model_checkpoint": catalog.default_name,
        "sd_checkpoint_hash": "",
        "samples_format": "png",
    }
