"""What OpenVINO sees: its devices with their memory and the properties that matter for a choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import openvino as ov

from ovserve.errors import ModelError

__all__ = ["AUTO_DEVICE", "choose_device", "device_report"]

AUTO_DEVICE = "auto"  # of the option `device`; OpenVINO's own plugin of this name is written `AUTO`

_KINDS = ("CPU", "GPU", "NPU")
# Property of a device to its title. A device reports some of them; the others are left out.
_PROPERTIES = (
    ("FULL_DEVICE_NAME", "name"),
    ("DEVICE_TYPE", "type"),
    ("DEVICE_ARCHITECTURE", "architecture"),
    ("GPU_DEVICE_TOTAL_MEM_SIZE", "memory_bytes"),
    ("NPU_DEVICE_TOTAL_MEM_SIZE", "memory_bytes"),
    ("NPU_DEVICE_ALLOC_MEM_SIZE", "allocated_bytes"),
    ("GPU_EXECUTION_UNITS_COUNT", "execution_units"),
    ("OPTIMIZATION_CAPABILITIES", "capabilities"),
    ("INFERENCE_PRECISION_HINT", "precision"),
    ("DYNAMIC_QUANTIZATION_GROUP_SIZE", "quantisation_group"),
    ("RANGE_FOR_STREAMS", "streams"),
    ("INFERENCE_NUM_THREADS", "threads"),
    ("NPU_DRIVER_VERSION", "driver"),
    ("GPU_UARCH_VERSION", "microarchitecture"),
)


def device_report(core: Any = None) -> dict[str, dict[str, Any]]:
    """Return the properties of each device by its name: text, numbers, and lists of text or numbers.

    Args:
        core: an `openvino.Core`; None for a new one.
    """
    core = core or ov.Core()
    return {name: dict(_properties(core, name)) for name in core.available_devices}


def choose_device(given: str, available: Sequence[str]) -> str:
    """Return the devices that the option `device` means on this machine.

    `auto` is the first GPU, or the CPU where there is none. It never is an NPU, which requires static shapes. Every
    other name is OpenVINO's own, such as GPU.1, AUTO or HETERO:GPU,CPU.

    Args:
        given: one device, or three for text encoder, denoiser and VAE.
        available: the devices that OpenVINO sees.

    Raises:
        ModelError: a named CPU, GPU or NPU does not exist.
    """
    best = next((name for name in sorted(available) if name.startswith("GPU")), "CPU")
    chosen = [best if name == AUTO_DEVICE else name for name in given.split()]
    kinds = {name.partition(".")[0] for name in available}
    for name in chosen:
        kind, dot, _ = name.partition(".")
        exists = name in available or (not dot and kind in kinds) or (dot and name.endswith(".0") and kind in available)
        if kind in _KINDS and not exists:
            raise ModelError(f"device {name} does not exist; OpenVINO sees {', '.join(available) or 'no device'}")
    return " ".join(chosen)


def _properties(core: Any, device: str) -> Iterator[tuple[str, Any]]:
    for name, title in _PROPERTIES:
        try:
            value = core.get_property(device, name)
        except Exception:  # noqa: BLE001, S112 - the device does not have it; plugins raise different classes
            continue
        yield title, _plain(value)


def _plain(value: Any) -> Any:
    """Return a property as text, a number, or a list of them."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple | set):
        return [_plain(each) for each in value]
    if isinstance(value, ov.Type):
        return value.get_type_name()
    return str(value).removeprefix("Type.")
