"""Measures one plan of a model with a fixed edit: what runs in the processes of `ovserve tune`.

A plan is loaded as a worker loads it, without the cache of compiled models, so that the time until it is ready is that
of a first start. Runs in: a process of its own, because a plan can crash it or take all memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ovserve.errors import ApiError, StartupError
from ovserve.models.plans import Plan
from ovserve.models.profile import read_profile
from ovserve.models.steps import denoising_steps, raise_steps
from ovserve.settings.options import ModelSettings, Resolution
from ovserve.worker.main import complete_profile, create_engine, reduce_openvino_import

if TYPE_CHECKING:
    from ovserve.engines.protocol import Engine, Work
    from ovserve.models.profile import ModelProfile

__all__ = [
    "Measured",
    "Receiver",
    "Sender",
    "Trial",
    "default_steps",
    "edit_size",
    "main",
    "measure",
    "receive",
    "send",
]

_PROMPT = "a photo of a garden with a red house"
_PEAK = 255.0  # of a level
_MIN_STEPS = 3  # of an edit that is timed: the first one is left out
_MAX_STEPS = 1000  # that an edit asks for
_MAX_RESULT_BYTES = 64 * 1024  # without the pixels
_MAX_PIXELS = 1 << 26  # of a picture
_SHOWN_CHARS = 500  # of the reason of a failure


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of one plan.

    Attributes:
        settings: the model's options.
        plan: what to measure.
        size: of the edit; None: the size of a worker's warm-up.
        steps: number of denoising steps that the edit asks for; more where the strength leaves fewer than _MIN_STEPS.
        edits: how many edits are timed; one more is made before them.
        reference: pixels of the first edit to compare with; empty: there is none yet.
    """

    settings: ModelSettings
    plan: Plan
    size: Resolution | None
    steps: int
    edits: int
    reference: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run has measured.

    Attributes:
        engine: the engine.
        precision: what the compiled denoiser computes in; empty where the engine does not know it.
        size: the working size.
        ready_s: reading, compiling and warming up.
        edit_s: the median duration of an edit.
        step_s: the median duration of a step.
        steps: number of steps that an edit has run.
        memory_bytes: resident memory without mapped files.
        psnr: peak signal-to-noise ratio to the reference in dB; infinity: the same bits.
        pixels: of the first edit.
    """

    engine: str
    precision: str
    size: Resolution
    ready_s: float
    edit_s: float
    step_s: float
    steps: int
    memory_bytes: int
    psnr: float
    pixels: bytes = field(repr=False)


class Sender(Protocol):
    """The end of a pipe to the process of the command."""

    def send_bytes(self, content: bytes, /) -> None:
        """Send a message. Raises OSError."""


class Receiver(Protocol):
    """The end of a pipe from the process of a trial."""

    def recv_bytes(self, maxlength: int, /) -> bytes:
        """Receive a message. Raises EOFError, and OSError for one that is cut off or too long."""


def send(link: Sender, found: Measured | str) -> None:
    """Send what a trial has measured, or why it failed: JSON, then the raw pixels. Raises OSError."""
    if isinstance(found, str):
        link.send_bytes(json.dumps({"failure": found[:_SHOWN_CHARS]}).encode())
        return
    names = [entry.name for entry in dataclasses.fields(found) if entry.name not in ("size", "pixels")]
    document = {name: getattr(found, name) for name in names}
    link.send_bytes(json.dumps({**document, "size": [found.size.width, found.size.height]}).encode())
    link.send_bytes(found.pixels)


def receive(link: Receiver) -> Measured | str:
    """Receive what `send` has sent. Nothing of it is unpickled: native code may have damaged the process of a trial.

    Raises:
        EOFError: the pipe was closed before.
        OSError: a message is cut off or too long.
        ValueError: it is not what `send` sends.
    """
    try:
        document = json.loads(link.recv_bytes(_MAX_RESULT_BYTES))
        if "failure" in document:
            return _printable(document["failure"])
        width, height = document.pop("size")
        found = Measured(**document, size=Resolution(width, height), pixels=b"")
        engine, precision = _printable(found.engine), _printable(found.precision)
        sizes = (width, height, found.steps, found.memory_bytes)
        is_valid = all(type(value) is int and value >= 0 for value in sizes)
        is_valid &= all(0 <= value < math.inf for value in (found.ready_s, found.edit_s, found.step_s))
        is_valid &= found.psnr >= 0 and width * height <= _MAX_PIXELS
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"no result of a trial: {type(error).__name__}") from None
    if not is_valid:
        raise ValueError("no result of a trial: a number out of range")
    pixels = link.recv_bytes(width * height * 3)
    if len(pixels) != width * height * 3:
        raise ValueError(f"a picture of {width}x{height} px has {len(pixels)} bytes")
    return dataclasses.replace(found, engine=engine, precision=precision, pixels=pixels)


def _printable(text: str) -> str:
    """Return a text of another process on one line, without what a terminal acts on."""
    return "".join(each if each.isprintable() else " " for each in text[:_SHOWN_CHARS])


def main(link: Sender, trial: Trial) -> None:
    """Run a trial, and send what it has measured, or the reason of its failure. The target of `run_worker`."""
    reduce_openvino_import()
    logging.disable(logging.WARNING)  # it would be repeated for every run
    try:
        found: Measured | str = measure(trial)
    except (ApiError, StartupError, RuntimeError, MemoryError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        found = lines[-1]
    with contextlib.suppress(OSError):  # the command has been stopped
        send(link, found)


def measure(trial: Trial) -> Measured:
    """Load the model with the plan, and make the edits.

    Raises:
        ApiError, StartupError, RuntimeError: the model cannot be loaded, or an edit fails.
    """
    settings = trial.plan.apply(dataclasses.replace(trial.settings, cache_dir=None))
    profile = complete_profile(read_profile(settings))
    engine, _ = create_engine(profile, settings)
    started = time.monotonic()
    engine.load(lambda _phase: None)
    ready_s = time.monotonic() - started
    try:
        # The first edit has the memory allocated and the caches filled: it makes the picture, and is not timed.
        first, *edits = [_edit(engine, _work(profile, trial, number)) for number in range(trial.edits + 1)]
        memory_bytes = _resident_bytes()
    finally:
        engine.close()
    return Measured(
        engine=engine.name,
        precision=engine.precision,
        size=first.size,
        ready_s=ready_s,
        edit_s=statistics.median(edit.seconds for edit in edits),
        step_s=statistics.median(seconds for edit in edits for seconds in edit.steps_s),
        steps=first.steps,
        memory_bytes=memory_bytes,
        psnr=_psnr(first.pixels, trial.reference or first.pixels),
        pixels=first.pixels,
    )


@dataclass(frozen=True, slots=True)
class _Edit:
    """One edit: its duration, the number of its steps, the duration of those after the first, and the picture."""

    seconds: float
    steps: int
    steps_s: list[float]
    size: Resolution
    pixels: bytes


def _edit(engine: Engine, work: Work) -> _Edit:
    """Make one picture. The first step is not timed: the encoding is before it.

    Raises:
        RuntimeError: it has run a single step, so that the duration of a step is not known.
    """
    ends: list[float] = []
    work.on_step = lambda _step, _steps: ends.append(time.monotonic())
    started = time.monotonic()
    engine.admit(work)
    outcomes: list[Any] = []
    while not outcomes:
        outcomes.extend(engine.turn())
    seconds = time.monotonic() - started
    if outcomes[0].error is not None:
        raise outcomes[0].error
    steps_s = [end - begin for begin, end in itertools.pairwise(ends)]
    if not steps_s:
        raise RuntimeError(f"{work.num_inference_steps} steps at strength {work.strength:g} run too few to be timed")
    return _Edit(seconds, len(ends), steps_s, Resolution(work.width, work.height), outcomes[0].pixels.tobytes())


def default_steps(profile: ModelProfile, limit: int) -> tuple[int, float, int]:
    """Return the steps and the strength of an edit that names neither, and how many denoising steps it runs.

    Args:
        profile: the model.
        limit: the option `max_num_inference_steps`.
    """
    strength = _strength(profile, _mode(profile))
    steps = raise_steps(profile, "", profile.defaults.num_inference_steps, strength, limit)
    return steps, strength, denoising_steps(profile, "", steps, strength)


def edit_size(profile: ModelProfile, size: Resolution | None) -> Resolution:
    """Return the working size of the edit of a trial; None: that of a worker's warm-up."""
    from ovserve.engines.protocol import warm_up_size  # noqa: PLC0415 - loads numpy

    given = size or warm_up_size(profile)
    return profile.working_size(given.width, given.height)


def _mode(profile: ModelProfile) -> str:
    return next(name for name in ("image2image", "inpainting", "text2image") if name in profile.tasks)


def _strength(profile: ModelProfile, mode: str) -> float:
    defaults = profile.defaults
    known = {"image2image": defaults.strength, "inpainting": defaults.strength_inpainting}
    return known.get(mode, 1.0) if profile.takes_strength else 1.0


def _timed_steps(profile: ModelProfile, steps: int, strength: float) -> int:
    """Return the step count, raised until _MIN_STEPS steps run; as it is where no step count does that."""
    counts = range(steps, _MAX_STEPS + 1)
    return next((each for each in counts if denoising_steps(profile, "", each, strength) >= _MIN_STEPS), steps)


def _work(profile: ModelProfile, trial: Trial, number: int) -> Work:
    """Return the fixed edit: of a gradient with a disc, at the strength that the model has by default.

    Another number gives another prompt and picture, because engines keep encoded ones.
    """
    import numpy as np  # noqa: PLC0415

    from ovserve.engines.protocol import Work  # noqa: PLC0415

    size = edit_size(profile, trial.size)
    down, across = np.mgrid[: size.height, : size.width] / max(size.height, size.width)
    across += 0.01 * number
    disc = (down - 0.4) ** 2 + (across - 0.5) ** 2 < 0.04
    image = np.clip(np.stack([down, across, 1 - down], axis=2), 0, 1) * 255
    image[disc] = (220, 40, 30)
    pixels = image.astype(np.uint8)
    mode = _mode(profile)
    strength = _strength(profile, mode)
    return Work(
        job="tune",
        picture=0,
        mode=mode,
        prompt=f"{_PROMPT} {number or ''}".strip(),
        negative_prompt="",
        width=size.width,
        height=size.height,
        num_inference_steps=_timed_steps(profile, trial.steps, strength),
        guidance_scale=profile.traits.engine_guidance(profile.defaults.guidance_scale),
        strength=strength,
        seed=7,
        initial_image=None if mode == "text2image" else pixels,
        mask_image=disc.astype(np.uint8) * 255 if mode == "inpainting" else None,
        reference_images=(pixels,) if profile.references and mode != "text2image" else (),
    )


def _psnr(pixels: bytes, reference: bytes) -> float:
    """Return the peak signal-to-noise ratio of two pictures in dB; infinity for the same bits."""
    import numpy as np  # noqa: PLC0415

    one, other = (np.frombuffer(each, np.uint8).astype(np.float32) for each in (pixels, reference))
    if one.shape != other.shape:
        raise RuntimeError(f"the picture has {len(pixels)} bytes, and that of the default plan {len(reference)}")
    error = float(np.square(one - other).mean(dtype=np.float64))
    return 10 * math.log10(_PEAK**2 / error) if error else math.inf


def _resident_bytes() -> int:
    """Return this process's resident memory without mapped files."""
    with open("/proc/self/statm", "rb") as stream:
        _, resident, shared, *_ = stream.read().split()  # proc(5): pages
    return max(0, int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
