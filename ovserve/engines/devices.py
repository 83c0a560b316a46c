"""What OpenVINO sees: its devices with their memory and the properties that matter for a choice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openvino as ov

__all__ = ["device_report"]

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
