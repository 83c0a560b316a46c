"""Text encoders that are loaded for each new prompt and freed after it, where a model does not fit into the memory.

The text encoder of a large transformer is as large as its denoiser, and is needed only for prompts that are not in the
cache of embeddings. Loading it again takes seconds, from the cache of compiled models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ovserve.models.weights import estimated_bytes

__all__ = ["MIN_RELEASED_BYTES", "OnDemand", "is_released"]

MIN_RELEASED_BYTES = 256 * 1024 * 1024  # of the text encoders' weights; fewer are not worth the time


def is_released(choice: str, directory: Path, encoder_bytes: int, available: int) -> bool:
    """Return whether the text encoders of a model are freed between prompts.

    Args:
        choice: the option `text_encoder`: auto, keep or release.
        directory: the model.
        encoder_bytes: size of the weights of its text encoders.
        available: memory that may still be allocated, before anything of the model is loaded.
    """
    if choice != "auto":
        return choice == "release"
    return encoder_bytes >= MIN_RELEASED_BYTES and estimated_bytes(directory) > available


class OnDemand:
    """An infer request that is made by its first call, and again after `release`. Used by one thread at a time.

    Args:
        make: compiles the model and returns an infer request; raises ModelError.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._request: Any = None

    @property
    def is_loaded(self) -> bool:
        """Whether the compiled model is in memory."""
        return self._request is not None

    def infer(self, inputs: Mapping[Any, Any], **options: Any) -> Any:
        """Run the model, which is compiled if it is not in memory."""
        if self._request is None:
            self._request = self._make()
        return self._request.infer(inputs, **options)

    def release(self) -> None:
        """Free the compiled model. What its tensors held must have been copied."""
        self._request = None

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the infer request, which the last call has made."""
        return getattr(self._request, name)
