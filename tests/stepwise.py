"""Engines `stepwise` over the fixture model `sd`: with a record of their calls, or with infer requests that fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from ovserve.engines.families.protocol import (
    Conditions,
    DenoiserRow,
    Family,
    Feed,
    PlanMaker,
    Source,
    Start,
    Types,
)
from ovserve.engines.protocol import Outcome, Work
from ovserve.engines.schedulers.noise import Array
from ovserve.engines.schedulers.plans import Plan
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
                adapted=each.adapted,
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


STAGES = ("plan", "scale_input", "feed", "guidance", "step", "on_step")  # of a picture, in the device thread


class Faulty:
    """A family in which one stage of the pictures with the prompt `breaks STAGE` raises an ArithmeticError.

    A stage breaks at a picture's second step, or at once where there are no steps yet.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self.guidance = _Broken(family.guidance, combine=self._combine)
        self._broken: list[Conditions] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def start(self, work: Work, plan: Plan, source: Source) -> Start:
        found = self._family.start(work, plan, source)
        if work.prompt == "breaks feed":
            self._broken.append(found.conditions)
        return found

    def feed(self, rows: Sequence[DenoiserRow], types: Types, *, timestep_per_row: bool) -> Feed:
        if any(row.conditions in self._broken for row in rows):
            raise ArithmeticError("feed broke")
        return self._family.feed(rows, types, timestep_per_row=timestep_per_row)

    def _combine(self, predictions: Sequence[Array], work: Work) -> tuple[Array, Array]:
        if work.guidance_scale == BROKEN_SCALE:
            raise ArithmeticError("guidance broke")
        return self._family.guidance.combine(predictions, work)

    def schedulers(self, document: Mapping[str, Any], class_name: str) -> tuple[str, dict[str, Any]]:
        own, found = self._family.schedulers(document, class_name)
        return own, {name: _Broken(scheduler, plan=self._plans(scheduler)) for name, scheduler in found.items()}

    def _plans(self, scheduler: PlanMaker) -> Callable[[int, float, int], Any]:
        def plan(steps: int, strength: float, cells: int) -> Any:
            if steps == BROKEN_STEPS["plan"]:
                raise ArithmeticError("plan broke")
            made = scheduler.plan(steps, strength, cells)

            def scale_input(latents: Array, index: int) -> Array:
                if steps == BROKEN_STEPS["scale_input"] and index == 1:
                    raise ArithmeticError("scale_input broke")
                return made.scale_input(latents, index)

            def step(prediction: Array, latents: Array, index: int, *rest: Any) -> Any:
                if steps == BROKEN_STEPS["step"] and index == 1:
                    raise ArithmeticError("step broke")
                found = made.step(prediction, latents, index, *rest)
                if steps == NAN_STEPS and index == 1:
                    found = replace(found, latents=found.latents * np.float32("nan"))
                return found

            return _Broken(made, scale_input=scale_input, step=step)

        return plan


BROKEN_SCALE = 13.0
NAN_STEPS = 14  # the number of steps of pictures whose second step makes latents of NaN
BROKEN_STEPS = {"plan": 11, "scale_input": 12, "step": 13}


class _Broken:
    """An object with some methods replaced."""

    def __init__(self, whole: Any, **methods: Any) -> None:
        self._whole = whole
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


class FaultyComponents(Components):
    """Components of a model whose family is `Faulty`."""

    def read(self) -> None:
        super().read()
        self.family = Faulty(self.family)


def broken(stage: str, place: int = 0, **options: Any) -> Work:
    """Return the work of a picture whose `stage` breaks in an engine with `FaultyComponents`."""
    if stage == "guidance":
        options["guidance_scale"] = BROKEN_SCALE
    if stage == "on_step":
        options["on_step"] = _break_step
    if stage in BROKEN_STEPS:
        options["num_inference_steps"] = BROKEN_STEPS[stage]
    return text(place, prompt=f"breaks {stage}", **options)


def _break_step(step: int, _steps: int) -> None:
    if step == 2:
        raise ArithmeticError("on_step broke")


def with_unet(tmp_path: Path, change: Callable[[Any], Any]) -> Path:
    """Return a copy of the model whose UNet `change` has changed."""
    directory = with_scheduler("sd", tmp_path)
    (directory / "unet").unlink()
    (directory / "unet").mkdir()
    (directory / "unet" / "config.json").write_bytes((SD / "unet" / "config.json").read_bytes())
    model = change(ov.Core().read_model(SD / "unet" / "openvino_model.xml"))
    ov.save_model(model, directory / "unet" / "openvino_model.xml", compress_to_fp16=True)
    return directory
