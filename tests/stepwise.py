"""Engines `stepwise` over the fixture model `sd`: with a record of their calls, or with infer requests that fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino as ov

from ovserve.engines.protocol import Outcome, Work
from ovserve.engines.stepwise.compiled import Components, Layout, Requests
from ovserve.engines.stepwise.engine import Call, StepwiseEngine
from ovserve.engines.stepwise.slots import Finished
from ovserve.models.profile import ModelProfile, read_profile
from tests.pictures import directory_of, drive, load_stepwise, settings_of, with_scheduler, work_of

SD = directory_of("sd")
PROFILE: ModelProfile = read_profile(settings_of(SD))


class Traced:
    """An engine and a record of its calls."""

    def __init__(self) -> None:
        self.calls: list[Finished[Call]] = []
        self.engine = load_stepwise(SD, trace=self.calls.append)

    def drive(self, works: list[Work]) -> list[Outcome]:
        """Drive the engine until all works have ended; record its calls."""
        self.calls.clear()
        return drive(self.engine, works)

    @property
    def denoising(self) -> list[Call]:
        """The denoising calls of the last `drive`."""
        return [call.subject for call in self.calls if call.subject.kind == "denoise"]


def text(place: int = 0, **options: Any) -> Work:
    """Return the work of one picture from text; what is not given differs with `place`."""
    return work_of(PROFILE, "text2image", place, **options)


class Wrapped:
    """An infer request that calls `report(inputs)` before each call; the call raises what `report` raises."""

    def __init__(self, request: Any, report: Callable[[Any], None]) -> None:
        self._request, self._report = request, report

    def infer(self, inputs: Any, **options: Any) -> Any:
        self._report(inputs)
        return self._request.infer(inputs, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


class Watched(Components):
    """Components whose infer requests call `seen(kind, inputs)` before each call."""

    seen: Callable[[str, Any], None] = staticmethod(lambda _kind, _inputs: None)

    def compile(self, layout: Layout, beat: Callable[[str], None]) -> None:
        super().compile(layout, beat)

        def watched(kind: str, request: Any) -> Any:
            return Wrapped(request, lambda inputs: self.seen(kind, inputs))

        self.requests = [
            Requests(
                denoiser=watched("unet", each.denoiser),
                text_encoders=tuple(watched("text_encoder", request) for request in each.text_encoders),
                vae_encoder=watched("vae_encoder", each.vae_encoder),
                vae_decoder=watched("vae_decoder", each.vae_decoder),
            )
            for each in self.requests
        ]


def load_watched(directory: Path = SD, kind: type[Watched] = Watched) -> tuple[StepwiseEngine, Watched]:
    """Return a loaded engine, and its components."""
    settings = settings_of(directory)
    profile = read_profile(settings)
    components = kind(profile, settings)
    engine = StepwiseEngine(profile, settings, components=components)
    engine.load(lambda _phase: None)
    return engine, components


def with_unet(tmp_path: Path, change: Callable[[Any], Any]) -> Path:
    """Return a copy of the model whose UNet `change` has changed."""
    directory = with_scheduler("sd", tmp_path)
    (directory / "unet").unlink()
    (directory / "unet").mkdir()
    (directory / "unet" / "config.json").write_bytes((SD / "unet" / "config.json").read_bytes())
    model = change(ov.Core().read_model(SD / "unet" / "openvino_model.xml"))
    ov.save_model(model, directory / "unet" / "openvino_model.xml", compress_to_fp16=True)
    return directory
