"""Results to OpenAI's objects, events and errors."""

from __future__ import annotations

import binascii
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ovserve.api.exchange import JsonReply, ServerEvent
from ovserve.api.parameters.params import Parameters
from ovserve.dispatch.jobs import Job, Partial, Result
from ovserve.models.catalog import Catalog, ServedModel
from ovserve.wire.messages import Prepared, Progress

__all__ = [
    "completed_event",
    "images_reply",
    "json_reply",
    "model_object",
    "models_object",
    "partial_event",
    "progress_comment",
    "timing_headers",
    "usage_of",
]


def _dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def json_reply(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> JsonReply:
    """Any document as a reply."""
    return JsonReply([_dumps(document) + b"\n"], status, headers or {})


def base64_of(segment_view: memoryview, size: int) -> bytes:
    """The first `size` bytes in base64 (RFC 4648 section 4), no line breaks."""
    with segment_view[:size] as part:
        return binascii.b2a_base64(part, newline=False)


def usage_of(prepared: Prepared) -> dict[str, Any]:
    """Token counts: text by the model's tokenizer, special tokens included; images one for each cell of the latent grid."""
    inputs = prepared.text_tokens + prepared.image_tokens
    return {
        "total_tokens": inputs + prepared.output_tokens,
        "input_tokens": inputs,
        "output_tokens": prepared.output_tokens,
        "input_tokens_details": {"text_tokens": prepared.text_tokens, "image_tokens": prepared.image_tokens},
        "output_tokens_details": {"image_tokens": prepared.output_tokens, "text_tokens": 0},
    }


def _described(parameters: Parameters, prepared: Prepared) -> dict[str, Any]:
    """What every object about a picture says of it, resolved."""
    return {
        "size": f"{prepared.width}x{prepared.height}",
        "quality": parameters.quality,
        "background": prepared.background,
        "output_format": parameters.request.output_format,
    }


def _echoed(parameters: Parameters) -> dict[str, Any]:
    """What a reply says of fields that change no picture."""
    echoed: dict[str, Any] = {}
    if parameters.safety_identifier:
        echoed["safety_identifier"] = parameters.safety_identifier
    if parameters.moderation:
        echoed["moderation"] = {"checked": False}
    return echoed


def _usage_of_one(prepared: Prepared, parameters: Parameters, picture: int) -> dict[str, Any]:
    """One picture's part of a request's usage: they add up to the whole, the first carries what was sent in."""
    own = replace(prepared, output_tokens=prepared.output_tokens // parameters.request.n)
    if picture:
        own = replace(own, text_tokens=0, image_tokens=0)
    return {key: value for key, value in usage_of(own).items() if key != "output_tokens_details"}


def timing_headers(job: Job) -> dict[str, str]:
    """`openai-processing-ms`, and Server-Timing (W3C) with the stages."""
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
    """OpenAI's ImagesResponse for a finished job.

    Args:
        urls: address of each picture, where the client asked for addresses instead of base64.
    """
    head = {"created": int(time.time()), **_described(parameters, prepared), **_echoed(parameters)}
    # The pictures are the bulk of the reply: each is encoded once, and never joined into one large string.
    chunks: list[bytes | memoryview] = [_dumps(head)[:-1] + b',"data":[']
    for number in sorted(job.results):
        result = job.results[number]
        about: dict[str, Any] = {"seed": result.seed}
        if prepared.revised_prompt:
            about["revised_prompt"] = prepared.revised_prompt
        comma = b"," if number else b""
        if urls is not None:
            chunks.append(comma + _dumps({"url": urls[number], **about}))
        else:
            chunks += [comma + b'{"b64_json":"', base64_of(result.segment.view, result.size), b'",' + _dumps(about)[1:]]
    chunks.append(b'],"usage":' + _dumps(usage_of(prepared)) + b"}\n")
    return JsonReply(chunks, 200, timing_headers(job))


def _event_kind(parameters: Parameters) -> str:
    return "image_generation" if parameters.request.task == "generation" else "image_edit"


def partial_event(partial: Partial, prepared: Prepared, parameters: Parameters) -> ServerEvent:
    """The event for one preview."""
    kind = f"{_event_kind(parameters)}.partial_image"
    about = {
        "created_at": int(time.time()),
        **_described(parameters, prepared),
        "partial_image_index": partial.index,
        "seed": parameters.request.seed_of(partial.picture),  # tells previews of several pictures apart
    }
    return _picture_event(kind, base64_of(partial.segment.view, partial.size), about)


def completed_event(result: Result, prepared: Prepared, parameters: Parameters) -> ServerEvent:
    """The event for one finished picture."""
    kind = f"{_event_kind(parameters)}.completed"
    about: dict[str, Any] = {
        "created_at": int(time.time()),
        **_described(parameters, prepared),
        "seed": result.seed,
        "usage": _usage_of_one(prepared, parameters, result.picture),
        **_echoed(parameters),
    }
    if prepared.revised_prompt:
        about["revised_prompt"] = prepared.revised_prompt
    return _picture_event(kind, base64_of(result.segment.view, result.size), about)


def _picture_event(kind: str, base64: bytes, about: Mapping[str, Any]) -> ServerEvent:
    return ServerEvent(kind, b'{"type":' + _dumps(kind) + b',"b64_json":"' + base64 + b'",' + _dumps(about)[1:])


def progress_comment(progress: Progress) -> ServerEvent:
    """A comment line with a job's progress: clients would take an event of an unknown kind for a picture."""
    return ServerEvent("", f"picture {progress.picture + 1}: step {progress.step}/{progress.steps}".encode())


def model_object(model: ServedModel, created: int, about: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's Model object with what a user of ours wants to know beside it."""
    profile = model.profile
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "ovserve",
        "family": profile.family,
        "tasks": sorted(profile.tasks),
        "native_size": str(profile.native),
        "prompt_tokens": profile.prompt_tokens,
        "defaults": {
            "num_inference_steps": profile.defaults.num_inference_steps,
            "guidance_scale": profile.defaults.guidance_scale,
            "strength": profile.defaults.strength,
        },
        "device": model.limits.device,
        **about,
    }


def models_object(catalog: Catalog, about: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """OpenAI's list of Model objects."""
    entries = [model_object(model, catalog.created, about.get(model.name, {})) for model in catalog.models.values()]
    return {"object": "list", "data": entries}
