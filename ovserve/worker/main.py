"""The worker process: where it begins, and which engine it gets.

The front end names `main` as the spawn target, so importing this module costs nothing: pixels, arrays, OpenVINO and its threads
are imported inside `main`, and exist in workers only.
"""

from __future__ import annotations

import faulthandler
import os
import warnings
from typing import TYPE_CHECKING, NoReturn

from ovserve.logs import configure_logs
from ovserve.models.profile import ModelProfile
from ovserve.settings.options import ModelSettings, Settings
from ovserve.wire.local.pipes import WorkerEnd

if TYPE_CHECKING:
    from ovserve.engines.protocol import Engine

__all__ = ["ModelProfile", "create_engine", "main"]

_NICENESS = 10  # the front end answers health checks while the device computes


def main(end: WorkerEnd, profile: ModelProfile, model: ModelSettings, settings: Settings) -> NoReturn:
    """Serve one model until Stop, or until the front end is gone; then end the process with exit code 0.

    Exit codes otherwise: `desk.LOAD_FAILED` when the model cannot be loaded, `desk.BROKEN` for a bug.
    """
    faulthandler.enable()
    os.nice(_NICENESS)
    configure_logs(settings.log_level, settings.log_format)
    from PIL import Image  # noqa: PLC0415

    from ovserve.worker.runner import JobRunner  # noqa: PLC0415

    Image.MAX_IMAGE_PIXELS = None  # our own limit, checked before decoding, takes its place
    warnings.filterwarnings(
        "ignore", module=r"PIL\."
    )  # what a client's file has to say is said in the answer, if anywhere
    JobRunner(end, profile, model, settings, create_engine).run()


def create_engine(profile: ModelProfile, settings: ModelSettings) -> tuple[Engine, str]:
    """The engine for a model, not loaded, and why this one.

    Raises:
        ModelError: the configured engine cannot serve this model.
    """
    from ovserve.engines.protocol import choose_engine  # noqa: PLC0415

    name, why = choose_engine(profile, settings)
    if name == "stepwise":
        from ovserve.engines.stepwise.engine import StepwiseEngine  # noqa: PLC0415

        return StepwiseEngine(profile, settings), why
    from ovserve.engines.genai import GenaiEngine  # noqa: PLC0415

    return GenaiEngine(profile, settings), why
