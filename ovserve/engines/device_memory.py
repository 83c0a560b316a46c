"""The memory of devices: a model whose weights do not fit into that of its devices is refused before it is compiled.

What is counted is the least that a device holds at once, so a model that fits is never refused.
A device that does not report its memory, such as a CPU, is not checked here: the option `memory_budget_bytes` limits
the memory of the machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ovserve.errors import ModelError
from ovserve.models.weights import placed_bytes

__all__ = ["check_device_memory", "device_use"]

_MIB = 1 << 20
_PROPERTIES = ("GPU_DEVICE_TOTAL_MEM_SIZE", "NPU_DEVICE_TOTAL_MEM_SIZE")


def check_device_memory(model: str, devices: Sequence[str], sizes: Sequence[int], core: Any) -> None:
    """Check that the weights on each device that reports its memory fit into it.

    Args:
        model: its name, for the error.
        devices: one device, or three for text encoders, denoiser and VAE.
        sizes: what `weights.component_bytes` returns.
        core: an `openvino.Core`.

    Raises:
        ModelError: the weights of the components on a device are larger than its memory.
    """
    placed = placed_bytes(devices, sizes)
    for device, size in placed.items():
        memory = _memory_of(core, device)
        if memory and size > memory:
            advice = _advice(placed)
            raise ModelError(
                f"model {model}: its weights on {device} take {size // _MIB} MiB, and {device} has "
                f"{memory // _MIB} MiB; {advice}"
            )


def device_use(devices: Sequence[str], sizes: Sequence[int], core: Any) -> dict[str, list[int]]:
    """Return memory, and bytes of the weights, of each device that reports its memory. Arguments as above."""
    found = {}
    for device, size in placed_bytes(devices, sizes).items():
        if memory := _memory_of(core, device):
            found[device] = [memory, size]
    return found


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
