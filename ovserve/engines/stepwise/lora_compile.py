"""Compiles the models with adapters, and measures whether each can stand for the model without adapters.

With weights of zero an adapted model adds zeros, which changes no bits in float32. In bfloat16 and float16 it can: the
plugin then rounds at other places. What the measuring calls compare are whole outputs, for two numbers of rows. For a
small model a second copy takes little memory, and pictures without adapters are faster without their branches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from ovserve.engines.families.texts import TextEncoder
from ovserve.engines.schedulers.noise import Array, f32
from ovserve.engines.stepwise.compiled import Components, Layout
from ovserve.engines.stepwise.lora import Adapted, with_weights
from ovserve.engines.stepwise.tuning import HEAVY_DENOISER_BYTES
from ovserve.logs import fields

__all__ = ["add_adapted"]

log = logging.getLogger(__name__)

_PROBED_IDS = 200  # ids of the probe's tokens are below; every vocabulary has more
_PROBED_TOKENS = 64  # where any number is allowed

Run = Callable[[Any, int, Array | None], list[Array]]  # request, rows, weights of the rows


def add_adapted(components: Components, layout: Layout, beat: Callable[[str], None]) -> None:
    """Compile each adapted model for each slot; free a plain one where the adapted one can stand for it.

    Raises:
        ModelError: a device cannot compile a model.
    """
    loras = components.loras
    for name in loras.models:
        adapted = components.compile_adapted(name, layout, beat)
        for requests, request in zip(components.requests, adapted, strict=True):
            requests.adapted[name] = request
        is_denoiser = name == components.family.denoiser
        place = 0 if is_denoiser else components.encoder_names.index(name)
        text = components.family.texts[place]
        run: Run = _denoiser_probe(components) if is_denoiser else _encoder_probe(text)
        first = components.requests[0]
        plain = first.denoiser if is_denoiser else first.text_encoders[place]
        choice = components.settings.lora_denoiser
        is_shared = choice == "shared"
        if choice == "auto" and components.denoiser_bytes > HEAVY_DENOISER_BYTES:
            is_shared = _are_equal(run, plain, adapted[0], loras.count, beat)
        if is_denoiser:
            loras.rows_are_independent = _has_independent_rows(run, adapted[0], loras.count, beat)
        log.info(
            "model with LoRA adapters compiled",
            extra=fields(model=components.profile.name, component=name, adapters=loras.count, shared=is_shared),
        )
        if is_shared:
            loras.shared.add(name)
            row_input = components.family.required_inputs[0] if is_denoiser else _ids_input(text)
            for requests, request in zip(components.requests, adapted, strict=True):
                requests.replace(place if not is_denoiser else None, Adapted(request, loras.count, row_input))


def _ids_input(text: TextEncoder) -> str | int:
    """Return the input of a text encoder that has the tokens, by its name or number."""
    return "input_ids" if text.is_masked else 0


def _denoiser_probe(components: Components) -> Run:
    """Return a function that runs the denoiser at the native size, or a quarter of it for a large one."""
    feeds, per_row = components.feeds, components.timestep_per_row
    if components.denoiser_bytes > HEAVY_DENOISER_BYTES:
        feeds, _ = feeds.quarter()

    def run(request: Any, rows: int, weights: Array | None) -> list[Array]:
        # One row: the second of two, so that it can be compared with that one.
        feed = feeds.of(rows, timestep_per_row=per_row) if rows > 1 else feeds.second(timestep_per_row=per_row)
        return [components.family.run(request, feed if weights is None else with_weights(feed, weights))]

    return run


def _encoder_probe(text: TextEncoder) -> Run:
    """Return a function that runs a text encoder."""
    tokens = min(text.window, _PROBED_TOKENS) if text.is_masked else text.window

    def run(request: Any, rows: int, weights: Array | None) -> list[Array]:
        ids = (np.arange(2 * tokens, dtype=np.int64) % _PROBED_IDS).reshape(2, tokens)[-rows:]
        inputs: dict[Any, Any] = {_ids_input(text): ids}
        if text.is_masked:
            inputs["attention_mask"] = np.ones_like(ids)
        request.infer(inputs if weights is None else with_weights(inputs, weights))
        return [np.array(tensor.data) for tensor in request.output_tensors]

    return run


def _are_equal(run: Run, plain: Any, adapted: Any, adapters: int, beat: Callable[[str], None]) -> bool:
    """Return whether an adapted model with weights of zero gives the bits of the plain one."""
    for rows in (2, 1):
        expected = run(plain, rows, None)
        beat("warm-up")
        found = run(adapted, rows, np.zeros((rows, adapters), f32))
        beat("warm-up")
        if not all(np.array_equal(one, other) for one, other in zip(expected, found, strict=True)):
            return False
    return True


def _has_independent_rows(run: Run, adapted: Any, adapters: int, beat: Callable[[str], None]) -> bool:
    """Return whether a row of a call has the bits that it has alone, with other weights in the other row."""
    weights = np.stack([np.full(adapters, 0.5, f32), np.linspace(1, 0.25, adapters, dtype=f32)])
    pair = run(adapted, 2, weights)[0]
    beat("warm-up")
    alone = run(adapted, 1, weights[1:])[0]
    beat("warm-up")
    return bool(np.array_equal(pair[1:], alone))
