"""The memory of devices, and what models take there: from the reports of ready workers, else from the models' files.

A device of this machine counts once a worker has reported its memory. A CPU reports none: `memory_budget_bytes` limits
the memory of the machine. What a model takes are its weights, the least that it needs.
"""

from __future__ import annotations

from collections.abc import Mapping

from ovserve.fleet.desired import DesiredModel
from ovserve.models.weights import device_sizes, placed_bytes

__all__ = ["DeviceMemory"]

_AUTO, _FIRST_GPU = "auto", "GPU.0"  # what the option `device` means on a machine with a GPU


class DeviceMemory:
    """What is known of the devices. Runs in: the supervisor thread.

    Attributes:
        totals: memory of each device in bytes, by name.
    """

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}
        self._sizes: dict[tuple[object, ...], tuple[int, int, int]] = {}

    def note(self, report: Mapping[str, object]) -> None:
        """Take over what a worker has reported in `Ready.devices`; entries of another form are ignored."""
        for device, found in report.items():
            if isinstance(found, list) and len(found) == 2 and all(type(each) is int and each > 0 for each in found):
                self.totals[device] = found[0]

    def needs(self, record: DesiredModel) -> dict[str, int]:
        """Return the bytes that one worker of a model takes on each device whose memory is known.

        Never more than the device has: alone there, a worker decides with the precision of the device.
        """
        model = record.model
        if not self.totals or model.pool not in ("", "local"):
            return {}
        choices = (model.plugin_config, model.text_encoder, model.engine, model.lora)
        key = (record.profile.directory, record.files, *choices)
        if key not in self._sizes:
            self._sizes[key] = device_sizes(record.profile.directory, model)
        # Until a worker has reported the first GPU, it is not known that there is one.
        devices = [_FIRST_GPU if name == _AUTO else name for name in model.device.split()]
        placed = placed_bytes(devices, self._sizes[key])
        return {name: min(size, self.totals[name]) for name, size in placed.items() if name in self.totals}
