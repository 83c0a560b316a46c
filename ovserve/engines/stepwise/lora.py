"""LoRA adapters of one model: adapted copies of its models, and how much of each adapter a picture uses.

Pictures with different adapters share calls: the adapted models take a weight for each row and adapter. Pictures
without adapters keep the plain models, so that an adapter never changes the bytes of requests that do not use it. Where
an adapted model with zero weights gives the same bits, which is measured when the model is loaded, one is enough.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ovserve.engines.checks import check_adapters
from ovserve.engines.lora.adapters import check_components, read_adapter
from ovserve.engines.lora.graph import SCALE_INPUT, adapt_model
from ovserve.engines.lora.names import DENOISER
from ovserve.engines.protocol import Work
from ovserve.engines.schedulers.noise import Array, f32
from ovserve.settings.loras import LoraSettings
from ovserve.wire.request import ImageRequest

__all__ = ["Adapted", "Loras", "Weights", "with_weights"]

Weights = tuple[float, ...]  # of each adapter of the model, in their order; empty where all are zero


class Loras:
    """The adapters of one model, and its adapted models. Thread-safe after `adapt`.

    Args:
        settings: the adapters of the model.

    Attributes:
        models: the adapted models by the name of their component, such as unet or text_encoder.
        shared: the components whose adapted model stands for the plain model too.
        rows_are_independent: a row of a call of the adapted denoiser has the bits that it has alone.
    """

    def __init__(self, settings: Sequence[LoraSettings]) -> None:
        self._columns = {adapter.alias: index for index, adapter in enumerate(settings)}
        self._paths: list[Path] = [adapter.path for adapter in settings]
        self._touching: dict[str, tuple[bool, ...]] = {}
        self.models: dict[str, Any] = {}
        self.shared: set[str] = set()
        self.rows_are_independent = True

    def adapt(self, models: Mapping[str, Any], denoiser: str) -> None:
        """Read the files and make an adapted copy of each model that an adapter changes.

        Args:
            models: the models of the denoiser and the text encoders, by component.
            denoiser: the component of the denoiser.

        Raises:
            ModelError: a file cannot be read, or not all of it fits the models; the message names file and modules.
        """
        adapters = [read_adapter(path) for path in self._paths]
        kinds = {DENOISER if name == denoiser else name: name for name in models}
        for adapter in adapters:
            check_components(adapter, kinds)
        for kind, name in kinds.items():
            adapted = adapt_model(models[name], kind, adapters)
            if adapted is not None:
                self.models[name] = adapted
                self._touching[name] = tuple(bool(adapter.pairs.get(kind)) for adapter in adapters)

    def check(self, request: Work | ImageRequest) -> None:
        """Check that the model has every adapter of a request. Raises InvalidValue."""
        check_adapters(request, self._columns)

    def weights(self, work: Work, component: str) -> Weights:
        """Return the weights of a picture for one component; empty where no adapter with a weight changes it."""
        if not work.request.adapters or component not in self._touching:
            return ()
        touching = self._touching[component]
        found = [0.0] * len(touching)
        for alias, weight in work.request.adapters:
            column = self._columns[alias]
            found[column] = weight if touching[column] else 0.0
        return tuple(found) if any(found) else ()

    def sharing_key(self, work: Work, denoiser: str) -> Hashable:
        """Return a key of a picture: pictures with equal keys may share a call of the denoiser."""
        if denoiser in self.shared and self.rows_are_independent:
            return True
        has_weights = bool(self.weights(work, denoiser))
        return has_weights if self.rows_are_independent or not has_weights else id(work)

    @property
    def count(self) -> int:
        """Number of adapters."""
        return len(self._columns)

    def rows(self, weights: Sequence[Weights]) -> Array:
        """Return the input of an adapted model for the rows of a call: float32 (rows, adapters)."""
        return np.array([each or (0.0,) * len(self._columns) for each in weights], f32).reshape(-1, len(self._columns))


def with_weights(inputs: Mapping[Any, Any], rows: Array) -> dict[Any, Any]:
    """Return the inputs of a call with those of the adapters."""
    return {**inputs, SCALE_INPUT: rows}


class Adapted:
    """An infer request of an adapted model that stands for the plain model too: no weights means weights of zero.

    Args:
        request: the infer request.
        adapters: the number of adapters.
        row_input: an input that has a row for each row of a call.
    """

    def __init__(self, request: Any, adapters: int, row_input: str | int) -> None:
        self._request = request
        self._adapters = adapters
        self._row_input = row_input

    def infer(self, inputs: Mapping[Any, Any], **options: Any) -> Any:
        """Run the model; inputs without weights are completed."""
        if SCALE_INPUT not in inputs:
            inputs = with_weights(inputs, np.zeros((len(inputs[self._row_input]), self._adapters), f32))
        return self._request.infer(inputs, **options)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the infer request."""
        return getattr(self._request, name)
