"""The memory of devices: a model whose weights do not fit into that of its devices is refused before it is compiled.

What is counted is the least that a device holds at once, so a model that fits is never refused.
A device that does not report its memory, such as a CPU, is not checked here: the option `memory_budget_bytes` limits
the memory of the machine.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ovserve.errors import ModelError

__all__ = ["check_device_memory", "component_bytes"]

_MIB = 1 << 20
_CONSTANT = re.compile(rb"<data [^>]*\boffset=[^>]*>")
_ATTRIBUTE = re.compile(rb'(\w+)="([^"]*)"')
_PROPERTIES = ("GPU_DEVICE_TOTAL_MEM_SIZE", "NPU_DEVICE_TOTAL_MEM_SIZE")


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
        size = path.stat().st_size - (0 if keeps_float32 else _float32_bytes(path.with_suffix(".xml")) // 2)
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


def check_device_memory(model: str, devices: Sequence[str], sizes: Sequence[int], core: Any) -> None:
    """Check that the weights on each device that reports its memory fit into it.

    Args:
        model: its name, for the error.
        devices: one device, or three for text encoders, denoiser and VAE.
        sizes: what `component_bytes` returns.
        core: an `openvino.Core`.

    Raises:
        ModelError: the weights of the components on a device are larger than its memory.
    """
    placed = Counter[str]()
    each = list(devices) if len(devices) == len(sizes) else [devices[0]] * len(sizes)
    for device, size in zip(each, sizes, strict=True):
        placed[device] += size
    for device, size in placed.items():
        memory = _memory_of(core, device)
        if memory and size > memory:
            advice = _advice(placed)
            raise ModelError(
                f"model {model}: its weights on {device} take {size // _MIB} MiB, and {device} has "
                f"{memory // _MIB} MiB; {advice}"
            )


def _advice(placed: Mapping[str, int]) -> str:
    if len(placed) == 1:
        return "use an int8 or int4 export, or three devices (text encoders, denoiser, VAE)"
    return "use an int8 or int4 export"


def _memory_of(core: Any, device: str) -> int:
    """Return the memory that a device reports; 0 if it reports none."""
    for name in _PROPERTIES:
        try:
            return int(core.get_property(device, name))
        except Exception:  # noqa: BLE001, S112 - the device does not have it; plugins raise different classes
            continue
    return 0
