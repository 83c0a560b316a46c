"""Reply objects and stream events in OpenAI's form, made from results."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from ovserve.api.exchange import Chunk, JsonReply, ServerEvent
from ovserve.api.parameters.params import Parameters
from ovserve.api.windows import Base64Windows
from ovserve.dispatch.jobs import Job, Partial, Result
from ovserve.dispatch.statuses import QueuePlace
from ovserve.models.catalog import Catalog, ServedModel
from ovserve.models.pending import PendingModel
from ovserve.models.plans import EXACT
from ovserve.wire.messages import Prepared, Progress

__all__ = [
    "completed_event",
    "ignored_headers",
    "images_reply",
    "json_reply",
    "model_object",
    "models_object",
    "partial_event",
    "pending_object",
    "progress_comment",
    "queue_comment",
    "timing_headers",
    "usage_of",
]

IGNORED_BYTES = 512  # of the field x-ovserve-ignored: a head must stay small


def _dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def json_reply(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> JsonReply:
    """Return a document as a JSON reply."""
    return JsonReply([_dumps(document) + b"\n"], status, headers or {})


def _base64_of(picture: Result | Partial) -> Base64Windows:
    return Base64Windows(picture.segment.read, picture.size)


def usage_of(prepared: Prepared) -> dict[str, Any]:
    """Return OpenAI's usage object: text tokens, special ones included, and one image token for each latent cell."""
    inputs = prepared.text_tokens + prepared.image_tokens
    return {
        "total_tokens": inputs + prepared.output_tokens,
        "input_tokens": inputs,
        "output_tokens": prepared.output_tokens,
        "input_tokens_details": {"text_tokens": prepared.text_tokens, "image_tokens": prepared.image_tokens},
        "output_tokens_details": {"image_tokens": prepared.output_tokens, "text_tokens": 0},
    }


def _picture_fields(parameters: Parameters, prepared: Prepared) -> dict[str, Any]:
    """Return the fields that every object with a picture contains, with resolved values."""
    return {
        "model": parameters.model.name,
        "size": f"{prepared.width}x{prepared.height}",
        "quality": parameters.quality,
        "background": prepared.background,
        "output_format": parameters.request.output_format,
    }


def _client_fields(parameters: Parameters) -> dict[str, Any]:
    """Return the reply's fields for what changes no picture: safety_identifier, moderation, and what was ignored."""
    fields: dict[str, Any] = {}
    if parameters.ignored:
        fields["ignored"] = parameters.ignored
    if parameters.safety_identifier:
        fields["safety_identifier"] = parameters.safety_identifier
    if parameters.moderation:
        fields["moderation"] = {"checked": False}
    return fields


def ignored_headers(parameters: Parameters) -> dict[str, str]:
    """Return the field with the percent-encoded names of what was ignored, those that fit IGNORED_BYTES."""
    line = ""
    for name in parameters.ignored:
        longer = f"{line}, {quote(name, safe='')}" if line else quote(name, safe="")
        if len(longer) <= IGNORED_BYTES:
            line = longer
    return {"x-ovserve-ignored": line} if line else {}


def _usage_of_picture(prepared: Prepared, parameters: Parameters, picture: int) -> dict[str, Any]:
    """Return one picture's share of the usage; the shares add up to the whole, the first has the input tokens."""
    own = replace(prepared, output_tokens=prepared.output_tokens // parameters.request.n)
    if picture:
        own = replace(own, text_tokens=0, image_tokens=0)
    return {key: value for key, value in usage_of(own).items() if key != "output_tokens_details"}


def timing_headers(job: Job) -> dict[str, str]:
    """Return `openai-processing-ms`, and Server-Timing (W3C) with the time of each stage."""
    timings = job.timings
    queue_ms = max(0.0, timings.dispatched_at - timings.admitted_at) * 1000
    stages = (
        ("queue", queue_ms),
        ("prepare", timings.prepare_ms),
        ("denoise", timings.denoise_ms),
        ("finish", timings.finish_ms),
    )
    whole_ms = max(0.0, timings.settled_at - timings.admitted_at) * 1000
    return {
        "openai-processing-ms": str(round(whole_ms)),
        "server-timing": ", ".join(f"{name};dur={ms:.1f}" for name, ms in stages),
    }


def images_reply(
    job: Job, prepared: Prepared, parameters: Parameters, urls: Mapping[int, str] | None = None
) -> JsonReply:
    """Return OpenAI's ImagesResponse for a done job.

    Args:
        job: the job with its results.
        prepared: the worker's description of the pictures.
        parameters: the request.
        urls: the URL of each picture by number, for response_format = url; None for base64.

    Returns:
        The reply. With base64 it reads the job's segments while it is written, and its `close` closes the job.
    """
    head = {"created": int(time.time()), **_picture_fields(parameters, prepared), **_client_fields(parameters)}
    chunks: list[Chunk] = [_dumps(head)[:-1] + b',"data":[']
    for number in sorted(job.results):
        result = job.results[number]
        fields: dict[str, Any] = {"seed": result.seed}
        if prepared.revised_prompt:
            fields["revised_prompt"] = prepared.revised_prompt
        comma = b"," if number else b""
        if urls is not None:
            chunks.append(comma + _dumps({"url": urls[number], **fields}))
        else:
            chunks += [comma + b'{"b64_json":"', _base64_of(result), b'",' + _dumps(fields)[1:]]
    chunks.append(b'],"usage":' + _dumps(usage_of(prepared)) + b"}\n")
    return JsonReply(chunks, 200, {**timing_headers(job), **ignored_headers(parameters)}, job.close)


def _event_kind(parameters: Parameters) -> str:
    return "image_generation" if parameters.request.task == "generation" else "image_edit"


def partial_event(partial: Partial, prepared: Prepared, parameters: Parameters) -> ServerEvent:
    """Return the event for one preview."""
    kind = f"{_event_kind(parameters)}.partial_image"
    fields = {
        "created_at": int(time.time()),
        **_picture_fields(parameters, prepared),
        "partial_image_index": partial.index,
        "picture_index": partial.picture,
        "seed": parameters.request.seed_of(partial.picture),
    }
    return _picture_event(kind, partial, fields)


def completed_event(result: Result, prepared: Prepared, parameters: Parameters) -> ServerEvent:
    """Return the event for one finished picture."""
    kind = f"{_event_kind(parameters)}.completed"
    fields: dict[str, Any] = {
        "created_at": int(time.time()),
        **_picture_fields(parameters, prepared),
        "picture_index": result.picture,  # pictures can be finished in another order
        "seed": result.seed,
        "usage": _usage_of_picture(prepared, parameters, result.picture),
        **_client_fields(parameters),
    }
    if prepared.revised_prompt:
        fields["revised_prompt"] = prepared.revised_prompt
    return _picture_event(kind, result, fields)


def _picture_event(kind: str, picture: Result | Partial, fields: Mapping[str, Any]) -> ServerEvent:
    head, tail = b'{"type":' + _dumps(kind) + b',"b64_json":"', b'",' + _dumps(fields)[1:]
    return ServerEvent(kind, [head, _base64_of(picture), tail])


def progress_comment(progress: Progress) -> ServerEvent:
    """Return a comment line with a job's progress; clients would parse an event of an unknown kind as a picture."""
    return ServerEvent("", [f"picture {progress.picture + 1}: step {progress.step}/{progress.steps}".encode()])


def queue_comment(place: QueuePlace) -> bytes:
    """Return the text of a comment line with a waiting job's place in the queue."""
    return f"queue: {place.ahead} ahead, about {math.ceil(place.wait_s)} s".encode()


def model_object(model: ServedModel, name: str, created: int, status: Mapping[str, Any]) -> dict[str, Any]:
    """Return OpenAI's Model object with additional fields: profile, defaults, device and status.

    `name` is the model's name or one of its further names. For an alias, `alias_of` has the model's name; for a LoRA
    adapter or composite, `parent` has it, and `adapters` the adapters with their weights. The model's own object lists
    the names of its adapters and composites.
    """
    profile, adapters = model.profile, model.limits.adapters_of(name)
    return {
        "id": name,
        **_names_of(model, name, adapters),
        "object": "model",
        "created": created,
        "owned_by": "ovserve",
        **({"builtin": model.limits.builtin_name} if model.limits.builtin_name else {}),
        "family": profile.family,
        "pipeline_class": profile.pipeline_class,
        "tasks": sorted(profile.tasks),
        "features": {
            "reference_images": profile.references,
            "masks": "inpainting" in profile.tasks,
            "negative_prompt": profile.takes_negative_prompt,
            "strength": profile.takes_strength,
            "guidance": profile.guidance,
            "distilled": profile.is_distilled,
        },
        "native_size": str(profile.native),
        "prompt_tokens": profile.prompt_tokens,
        "defaults": {
            "num_inference_steps": profile.defaults.num_inference_steps,
            "guidance_scale": profile.defaults.guidance_scale,
            "strength": profile.defaults.strength,
        },
        "limits": {
            "n": model.limits.max_num_images_per_prompt,
            "size": str(model.limits.max_resolution),
            "num_inference_steps": model.limits.max_num_inference_steps,
        },
        "device": model.limits.device,
        "plan": EXACT if profile.plan is None else str(profile.plan),
        **status,
    }


def pending_object(model: PendingModel, name: str, created: int) -> dict[str, Any]:
    """Return OpenAI's Model object for a model that is being pulled: its repository, and how much of it is there."""
    state = model.state
    pull = {"percent": state.percent, "left_s": state.left_s, "repository": model.repository}
    return {
        "id": name,
        **({"alias_of": model.name} if name != model.name else {}),
        "object": "model",
        "created": created,
        "owned_by": "ovserve",
        "ready": False,
        "reason": model.reason,
        "state": "failed" if state.has_failed else "pulling",
        "pulling": pull,
    }


def _names_of(model: ServedModel, name: str, adapters: Mapping[str, float]) -> dict[str, Any]:
    """Return what the Model object under one name says of the model's other names."""
    if adapters:
        return {"parent": model.name, "adapters": adapters}
    names = list(model.limits.adapter_names)
    own = {"adapters": names} if names else {}
    return own if name == model.name else {"alias_of": model.name, **own}


def models_object(catalog: Catalog, statuses: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return OpenAI's list of Model objects; `statuses` has the status fields of each model by name."""
    entries = [
        model_object(model, name, catalog.created, statuses.get(model.name, {}))
        for name, model in catalog.listed().items()
    ]
    entries += [pending_object(model, name, catalog.created) for name, model in catalog.pending.items()]
    return {"object": "list", "data": entries}
