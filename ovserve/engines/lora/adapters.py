"""A LoRA adapter: the pairs of matrices in a file by component and module, each with its scale.

Hu et al. 2021, arXiv:2106.09685: a module's output x·Wᵀ becomes x·Wᵀ + scale·(x·downᵀ)·upᵀ, where scale is
alpha / rank. Convolutions have a `down` of the module's own kernel and an `up` of 1 x 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovserve.engines.lora.names import parse_key
from ovserve.engines.lora.tensors import read_tensors
from ovserve.errors import ModelError

__all__ = ["Adapter", "Pair", "check_components", "quoted_keys", "read_adapter"]

MAX_SHOWN_KEYS = 8  # names of tensors in one message
MAX_SHOWN_CHARS = 120  # of each
MAX_CONFIG_BYTES = 1024 * 1024  # of adapter_config.json
_PEFT_NAME = "adapter_model.safetensors"  # its configuration is adapter_config.json in the same directory
_DIFFUSERS_METADATA = "lora_adapter_metadata"  # under `__metadata__`, in files that diffusers 0.34 or later has saved

Matrix = NDArray[Any]  # float16 or float32


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """The matrices of one module.

    Attributes:
        key: the module's name in the file, for messages.
        down: (rank, in), or (rank, in, height, width) for a convolution.
        up: (out, rank).
        scale: alpha / rank, or what the file's configuration says.
    """

    key: str
    down: Matrix
    up: Matrix
    scale: float

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return int(self.down.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One file: `pairs` by component (denoiser, text_encoder, ...) and then by module."""

    path: Path
    pairs: Mapping[str, Mapping[str, Pair]]


def check_components(adapter: Adapter, known: Collection[str]) -> None:
    """Check that a model has each component that an adapter changes. Raises ModelError, which names the file."""
    if unknown := sorted(adapter.pairs.keys() - set(known)):
        keys = [pair.key for pair in adapter.pairs[unknown[0]].values()]
        raise ModelError(
            f"{adapter.path}: this model has no {unknown[0]}, which {len(keys)} modules of the file change, such as "
            f"{keys[0]}"
        )


def quoted_keys(keys: Iterable[str]) -> str:
    """Return the first names for a message, and how many more there are."""
    every = sorted(keys)
    shown = ", ".join(key[:MAX_SHOWN_CHARS] for key in every[:MAX_SHOWN_KEYS])
    return shown + (f" and {len(every) - MAX_SHOWN_KEYS} more" if len(every) > MAX_SHOWN_KEYS else "")


def read_adapter(path: Path) -> Adapter:
    """Read a file.

    Raises:
        ModelError: the file cannot be read, is not valid, or contains a tensor that is no matrix of a LoRA.
    """
    file = read_tensors(path)
    groups: dict[tuple[str, str], dict[str, tuple[str, Matrix]]] = {}
    paths: dict[tuple[str, str], str] = {}
    unknown = []
    for key, tensor in file.tensors.items():
        parts = parse_key(key)
        if parts is None:
            unknown.append(key)
            continue
        place = parts.component, parts.module
        group = groups.setdefault(place, {})
        if parts.role in group:
            raise ModelError(f"{path}: {group[parts.role][0]} and {key} are two names of the same matrix")
        group[parts.role], paths[place] = (key, tensor), parts.path
    if unknown:
        raise ModelError(
            f"{path}: {len(unknown)} tensors are of a kind that is not supported, only LoRA's pairs of matrices are: "
            f"{quoted_keys(unknown)}"
        )
    if not groups:
        raise ModelError(f"{path}: contains no LoRA")
    scaling = _Scaling.read(path, file.metadata)
    found: dict[str, dict[str, Pair]] = {}
    for (component, module), group in groups.items():
        found.setdefault(component, {})[module] = _pair(path, paths[component, module], component, group, scaling)
    return Adapter(path, found)


def _pair(
    path: Path, module_path: str, component: str, group: Mapping[str, tuple[str, Matrix]], scaling: _Scaling
) -> Pair:
    """Return the pair of one module after checking that its matrices fit each other."""
    any_key = next(iter(group.values()))[0]
    for role in ("down", "up"):
        if role not in group:
            raise ModelError(f"{path}: {any_key} has no matrix {role!r} beside it")
    (down_key, down), (up_key, up) = group["down"], group["up"]
    if down.ndim == 4 and down.shape[2:] == (1, 1):
        down = down[:, :, 0, 0]
    if up.ndim == 4 and up.shape[2:] == (1, 1):
        up = up[:, :, 0, 0]
    if down.ndim not in (2, 4) or up.ndim != 2 or 0 in (*down.shape, *up.shape) or up.shape[1] != down.shape[0]:
        raise ModelError(f"{path}: {down_key} {down.shape} and {up_key} {up.shape} are no pair of matrices of a LoRA")
    alpha: float | None = None
    if "alpha" in group:
        alpha_key, value = group["alpha"]
        if value.size != 1:
            raise ModelError(f"{path}: {alpha_key} has {value.size} values; expected 1")
        alpha = float(value.reshape(-1)[0])
    key = down_key.removesuffix(".weight")
    return Pair(key, down, up, scaling.scale(component, module_path, int(down.shape[0]), alpha))


@dataclass(frozen=True, slots=True)
class _Scaling:
    """The configuration that peft and diffusers store beside the matrices: alphas, where the file has no tensors of it.

    Attributes:
        sections: by component; under "" the configuration of a file with one component.
    """

    sections: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path, metadata: Mapping[str, str]) -> _Scaling:
        """Read the file's metadata, else adapter_config.json beside a file with peft's name. Raises ModelError."""
        text = metadata.get(_DIFFUSERS_METADATA, "")
        where = f"{path}: {_DIFFUSERS_METADATA}"
        if text:
            return cls(_by_component(_parse_object(text, where)))
        config = path.with_name("adapter_config.json")
        if path.name != _PEFT_NAME or not config.is_file():
            return cls({})
        try:
            with config.open("rb") as stream:
                data = stream.read(MAX_CONFIG_BYTES + 1)
        except OSError as error:
            raise ModelError(f"{config}: cannot be read: {error.strerror}") from None
        if len(data) > MAX_CONFIG_BYTES:
            raise ModelError(f"{config}: has more than {MAX_CONFIG_BYTES} bytes")
        section = _parse_object(data.decode("utf-8", errors="replace"), str(config))
        return cls({"": _checked(section, str(config))})

    def scale(self, component: str, module_path: str, rank: int, alpha: float | None) -> float:
        """Return alpha / rank of a module; a tensor in the file takes precedence over the configuration."""
        section = self.sections.get(component, self.sections.get("", {}))
        if alpha is None:
            alpha = float(section.get("lora_alpha", rank))
            for pattern, value in section.get("alpha_pattern", {}).items():
                if module_path == pattern or module_path.endswith(f".{pattern}"):
                    alpha = float(value)
        return alpha / (math.sqrt(rank) if section.get("use_rslora") else rank)


_SECTIONS = {"unet": "denoiser", "transformer": "denoiser"}


def _by_component(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the options by component; diffusers writes them as `unet.lora_alpha`, `text_encoder.r`, ..."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in document.items():
        section, separator, name = key.partition(".")
        if not separator:
            section, name = "", key
        found.setdefault(_SECTIONS.get(section, section), {})[name] = value
    return {section: _checked(options, _DIFFUSERS_METADATA) for section, options in found.items()}


def _checked(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the options that change the scale. Raises ModelError for a wrong one, and for DoRA."""
    if options.get("use_dora"):
        raise ModelError(f"{where}: use_dora is set; DoRA is not supported")
    alpha, pattern = options.get("lora_alpha"), options.get("alpha_pattern") or {}
    found: dict[str, Any] = {"use_rslora": bool(options.get("use_rslora"))}
    if not isinstance(pattern, dict) or not all(map(_is_number, pattern.values())):
        raise ModelError(f"{where}: alpha_pattern is not an object of numbers")
    found["alpha_pattern"] = pattern
    if alpha is not None:
        if not _is_number(alpha):
            raise ModelError(f"{where}: lora_alpha is not a number")
        found["lora_alpha"] = alpha
    return found


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) < float(np.finfo(np.float32).max)


def _parse_object(text: str, where: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise ModelError(f"{where}: is not JSON") from None
    if not isinstance(document, dict):
        raise ModelError(f"{where}: is not a JSON object")
    return document
