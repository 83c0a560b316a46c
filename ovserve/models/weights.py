"""The size of a model's weights, and the memory that a worker is expected to take before one was measured."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ovserve.settings.options import ModelSettings

__all__ = ["component_bytes", "device_sizes", "estimated_bytes", "placed_bytes", "weights_bytes"]

MIB = 1 << 20
# Measured with workers of random models: interpreter, libraries, and buffers of a small picture.
_WORKER_BYTES = 350 * MIB
# Of the weights: they are mapped from the file, and the CPU plugin keeps a repacked copy of them, in bfloat16 as large
# as a float16 file and in float32 twice as large.
_WEIGHTS_FACTOR = 2.2
_CONSTANT = re.compile(rb"<data [^>]*\boffset=[^>]*>")
_ATTRIBUTE = re.compile(rb'(\w+)="([^"]*)"')
_FIRST = "GPU"  # OpenVINO's other name of GPU.0


def weights_bytes(directory: Path) -> int:
    """Return the size of the weight files of a model's directory: its OpenVINO IR `.bin` files."""
    total = 0
    for path in directory.glob("*/*.bin"):
        try:
            total += path.stat().st_size
        except OSError:  # it was removed meanwhile; a worker reports what is missing
            continue
    return total


def estimated_bytes(directory: Path) -> int:
    """Return the memory that one worker is expected to take, from the model's files alone.

    It is a first guess: quantised weights can take several times as much, and only a measurement decides.
    """
    return _WORKER_BYTES + int(_WEIGHTS_FACTOR * weights_bytes(directory))


def component_bytes(
    directory: Path, *, keeps_float32: bool = False, releases_encoders: bool = False
) -> tuple[int, int, int]:
    """Return what the weights of the text encoders, the denoiser and the VAE take on a device at the same time.

    Args:
        directory: the model.
        keeps_float32: the device computes in float32; else it holds float32 weights as float16.
        releases_encoders: a text encoder is loaded for a prompt and freed after it, one at a time.
    """
    encoders, denoiser, vae = [0], 0, 0
    for path in directory.glob("*/openvino_model.bin"):
        try:
            stored = path.stat().st_size
        except OSError:  # it was removed meanwhile; a worker reports what is missing
            continue
        size = stored - (0 if keeps_float32 else _float32_bytes(path.with_suffix(".xml")) // 2)
        if path.parent.name.startswith("text"):
            encoders.append(size)
        elif path.parent.name.startswith("vae"):
            vae += size
        else:
            denoiser += size
    return max(encoders) if releases_encoders else sum(encoders), denoiser, vae


def _float32_bytes(graph: Path) -> int:
    """Return the size of the float32 constants of a graph; 0 if it cannot be read, which another check reports."""
    try:
        text = graph.read_bytes()
    except OSError:
        return 0
    sizes = {}
    for constant in _CONSTANT.finditer(text):
        attributes = dict(_ATTRIBUTE.findall(constant.group()))
        if attributes.get(b"element_type") == b"f32" and {b"offset", b"size"} <= attributes.keys():
            sizes[int(attributes[b"offset"])] = int(attributes[b"size"])  # constants can share their data
    return sum(sizes.values())


def device_sizes(directory: Path, settings: ModelSettings) -> tuple[int, int, int]:
    """Return `component_bytes` of a model with its options."""
    plugin = json.loads(settings.plugin_config) if settings.plugin_config else {}
    return component_bytes(
        directory,
        keeps_float32=plugin.get("INFERENCE_PRECISION_HINT") == "f32",
        # `auto` decides by the memory of the machine, and an encoder with adapters is kept.
        releases_encoders=settings.text_encoder == "release" and settings.engine != "genai" and not settings.lora,
    )


def placed_bytes(devices: Sequence[str], sizes: Sequence[int]) -> dict[str, int]:
    """Return the bytes of the weights on each device, by its full name (GPU.0 for GPU).

    Args:
        devices: one device, or three for text encoders, denoiser and VAE.
        sizes: what `component_bytes` returns.
    """
    placed = Counter[str]()
    each = list(devices) if len(devices) == len(sizes) else [devices[0]] * len(sizes)
    for device, size in zip(each, sizes, strict=True):
        placed[f"{device}.0" if device == _FIRST else device] += size
    return dict(placed)
