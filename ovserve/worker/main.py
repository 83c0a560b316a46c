"""Entry point of a worker process.

The front end names `main` as the spawn target and therefore imports this module. Pillow, numpy, OpenVINO and its
threads are imported inside functions, so that they exist in workers only.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import sys
import warnings
from typing import TYPE_CHECKING, NoReturn

from ovserve.logs import configure_logs
from ovserve.models.profile import ModelProfile
from ovserve.models.weights import device_sizes
from ovserve.settings.options import ModelSettings
from ovserve.settings.worker import WorkerSettings
from ovserve.stacks import watch_for_stacks
from ovserve.wire.blobs import WorkerBlobs
from ovserve.wire.link import WorkerLink

if TYPE_CHECKING:
    from ovserve.engines.protocol import Engine

__all__ = ["ModelProfile", "create_engine", "main", "reduce_openvino_import"]

_NICENESS = 10  # lower priority than the front end, which must answer health checks while the device computes


def main(
    link: WorkerLink, blobs: WorkerBlobs, profile: ModelProfile, model: ModelSettings, settings: WorkerSettings
) -> NoReturn:
    """Serve one model until Stop arrives or the front end exits, then exit with code 0.

    Other exit codes: `runner.LOAD_FAILED` when the model cannot be loaded, `runner.BROKEN` for a bug.
    """
    faulthandler.enable()
    os.nice(_NICENESS)
    configure_logs(settings.log_level, settings.log_format, settings.node)
    reduce_openvino_import()
    from PIL import Image  # noqa: PLC0415

    from ovserve.worker.runner import JobRunner  # noqa: PLC0415

    Image.MAX_IMAGE_PIXELS = None  # replaced by our own limit, which is checked before decoding
    # Pillow's warnings are about a client's file: what matters to the client goes into the response, not into our log.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    runner = JobRunner(
        *(link, blobs, profile, model, settings),
        create_engine=create_engine,
        complete_profile=complete_profile,
        find_device_use=find_device_use,
    )
    watch_for_stacks(f"worker of {profile.name}", runner.decoder_pids)
    runner.run()


def complete_profile(profile: ModelProfile) -> ModelProfile:
    """Return the profile with what only the model's graphs say."""
    from ovserve.engines.stepwise.sizes import find_denoiser_multiple  # noqa: PLC0415

    return find_denoiser_multiple(profile)


def reduce_openvino_import() -> None:
    """Leave the model converter and its telemetry out of `import openvino`. Call it before the first import of it.

    The converter, which a worker does not use, takes a third of the import's time. Its telemetry fails for a user
    without a home directory, such as systemd's DynamicUser; for others it writes an identifier to ~/intel and sends an
    event over the network.
    """
    for name in ("openvino.tools.ovc", "openvino_telemetry"):
        sys.modules[name] = None  # type: ignore[assignment]  # imports of it then raise ImportError


def _devices_of(profile: ModelProfile, settings: ModelSettings) -> str:
    """Return the option `device` with `auto` replaced by what this machine has.

    Raises:
        ModelError: a device does not exist, or the weights do not fit into its memory.
    """
    import openvino as ov  # noqa: PLC0415

    from ovserve.engines.device_memory import check_device_memory  # noqa: PLC0415
    from ovserve.engines.devices import choose_device  # noqa: PLC0415

    core = ov.Core()
    devices = choose_device(settings.device, core.available_devices)
    check_device_memory(profile.name, devices.split(), device_sizes(profile.directory, settings), core)
    return devices


def find_device_use(profile: ModelProfile, settings: ModelSettings) -> dict[str, list[int]]:
    """Return memory, and bytes of the model's weights, of each device that reports its memory."""
    if settings.device == "CPU":
        return {}
    import openvino as ov  # noqa: PLC0415

    from ovserve.engines.device_memory import device_use  # noqa: PLC0415
    from ovserve.engines.devices import choose_device  # noqa: PLC0415

    core = ov.Core()
    devices = choose_device(settings.device, core.available_devices)
    return device_use(devices.split(), device_sizes(profile.directory, settings), core)


def create_engine(profile: ModelProfile, settings: ModelSettings) -> tuple[Engine, str]:
    """Return the engine for a model, not yet loaded, and the reason for the choice.

    Raises:
        ModelError: the configured engine cannot serve this model.
    """
    from ovserve.engines.choice import choose_engine  # noqa: PLC0415

    if settings.device != "CPU":
        settings = dataclasses.replace(settings, device=_devices_of(profile, settings))
    name, why = choose_engine(profile, settings)
    if name == "stepwise":
        from ovserve.engines.stepwise.engine import StepwiseEngine  # noqa: PLC0415

        return StepwiseEngine(profile, settings), why
    from ovserve.engines.genai import GenaiEngine  # noqa: PLC0415

    return GenaiEngine(profile, settings), why
