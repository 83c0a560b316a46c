"""The engine over openvino_genai's own pipelines: every family the library serves, one picture at a time.

The library's traps (calls that end the process, silent changes of meaning) are closed here, each with its reason beside it;
tests/e2e/test_traps.py names them. Its laws for us:
- One thread. Pipelines derived from one another share infer requests: two threads in them are a SIGSEGV.
- Inpainting is built first and the others are derived from it: the other way round its mask processors are null (SIGSEGV).
- A callback runs in a native thread: an exception, or a result that is no bool, ends the process (std::terminate).
- A failure inside a network can stay in its infer request for good: after an unforeseen error the pipelines have to prove themselves.
- A result is a view of the decoder's buffer, which the next call overwrites: copy it at once.
- `decode` shares the decoder's infer request with `generate`, so there are no previews: nothing is decoded beside a generation.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as og

from ovserve.engines.protocol import (
    CLIP_WINDOW,
    Outcome,
    Work,
    check_served,
    has_t5,
    longest_fitting,
    warm_up_work,
)
from ovserve.engines.schedulers.schedulers import LIBRARY_SCHEDULERS
from ovserve.errors import ApiError, InternalError, InvalidValue, ModelError
from ovserve.logs import fields
from ovserve.models.profile import ModelProfile
from ovserve.models.steps import is_lcm, steps_run
from ovserve.pixels.images import Pixels
from ovserve.settings.options import ModelSettings

__all__ = ["GenaiEngine", "generation_options"]

log = logging.getLogger(__name__)

_SCHEDULERS = {
    "ddim": og.Scheduler.Type.DDIM,
    "pndm": og.Scheduler.Type.PNDM,
    "euler": og.Scheduler.Type.EULER_DISCRETE,
    "euler_ancestral": og.Scheduler.Type.EULER_ANCESTRAL_DISCRETE,
}
# What a configuration must not ask of a scheduler; the library says so only in the middle of a generation.
_REFUSES: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "ddim": lambda config: config.get("clip_sample", True) or bool(config.get("thresholding")),
    "pndm": lambda config: not config.get("skip_prk_steps"),
    "euler": lambda config: bool(config.get("use_karras_sigmas")),
    "euler_ancestral": lambda config: config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"),
}
_FAMILIES_OF_OTHER_SCHEDULERS = ("stable-diffusion", "sdxl")
_TOKENIZERS_OF_T5 = {"sd3": "tokenizer_3", "flux": "tokenizer_2"}  # of the encoder that reads the whole prompt
_WITHOUT_GUIDANCE = 1.0
_UNWORKABLE_KEPT = 64  # sizes; a client who tries them all costs a rebuild for each


class GenaiEngine:
    """One model's pipelines on one device, or on three: text encoder, denoiser, VAE."""

    name = "genai"
    capacity = 1

    def __init__(self, profile: ModelProfile, settings: ModelSettings) -> None:
        self.schedulers: frozenset[str] = frozenset()
        self.tuned: dict[str, int] = {}
        self._profile = profile
        self._settings = settings
        self._pipelines: dict[str, Any] = {}
        self._own = LIBRARY_SCHEDULERS.get(profile.scheduling.name, "")
        self._scheduler_config = profile.directory / "scheduler" / "scheduler_config.json"
        self._own_scheduler: Any = None
        self._pending: Work | None = None
        self._unworkable: list[tuple[int, int]] = []  # sizes at which a network has failed
        self._beat: Callable[[str], None] = lambda _phase: None
        clip = profile.directory / "tokenizer"
        whole = profile.directory / _TOKENIZERS_OF_T5[profile.family] if has_t5(profile) else clip
        self._tokenizer = _Tokenizer(whole if whole.is_dir() else clip, profile.prompt_tokens)
        self._clip_tokenizer = _Tokenizer(clip, CLIP_WINDOW) if has_t5(profile) else self._tokenizer

    # --- loading ---

    def load(self, beat: Callable[[str], None]) -> None:
        """Read and compile the model, then make one real picture. Raises ModelError."""
        self._beat = beat
        beat("load")
        try:
            self._tokenizer.load()
            self._clip_tokenizer.load()
            self._build(beat)
            beat("warm-up")
            self._warm_up(beat)
        except RuntimeError as error:
            raise ModelError(f"model {self._profile.name}: {_first_line(error)}") from error

    def _build(self, beat: Callable[[str], None]) -> None:
        directory = str(self._profile.directory)
        first = "inpainting" if "inpainting" in self._profile.tasks else "text2image"
        kinds = {
            "inpainting": og.InpaintingPipeline,
            "text2image": og.Text2ImagePipeline,
            "image2image": og.Image2ImagePipeline,
        }
        # Uncompiled, then compile(): the constructor holds the interpreter lock, compile does not.
        main = kinds[first](directory)
        beat("load")
        devices = self._settings.device.split()
        main.compile(*devices, **self._properties(devices))
        beat("load")
        self._pipelines[first] = main
        for task in sorted(self._profile.tasks - {first}):
            self._pipelines[task] = kinds[task](main)
        self._own_scheduler = self._scheduler("")
        for pipeline in self._pipelines.values():
            # A derived FLUX or SD3 pipeline has no scheduler of its own, and its generate is a SIGSEGV without one.
            pipeline.set_scheduler(self._own_scheduler)
        self.schedulers = self._offered_schedulers()

    def _properties(self, devices: list[str]) -> dict[str, Any]:
        settings = self._settings
        properties: dict[str, Any] = json.loads(settings.plugin_config) if settings.plugin_config else {}
        if settings.threads and all(device.startswith("CPU") for device in devices):
            properties["INFERENCE_NUM_THREADS"] = settings.threads
        if settings.cache_dir:
            properties["CACHE_DIR"] = str(settings.cache_dir)
        return properties

    def _scheduler(self, name: str) -> Any:
        kind = _SCHEDULERS[name] if name else og.Scheduler.Type.AUTO
        return og.Scheduler.from_config(self._scheduler_config, kind)

    def _offered_schedulers(self) -> frozenset[str]:
        """The model's own, and those that can be made from its configuration. Never LCM for a model that was not distilled for
        it: the library then writes to an input the UNet does not have, a SIGSEGV."""
        offered = {self._own} - {""}
        if self._profile.family in _FAMILIES_OF_OTHER_SCHEDULERS and self._own != "lcm":
            config = json.loads(self._scheduler_config.read_text("utf-8"))
            for name in _SCHEDULERS:
                try:
                    self._scheduler(name)
                except RuntimeError:
                    continue  # a value that none of the library's schedulers takes
                if not _REFUSES[name](config):
                    offered.add(name)
        return frozenset(offered)

    def _warm_up(self, beat: Callable[[str], None]) -> None:
        """Pay for the first inference before reporting ready."""
        size = self._profile.native
        work = warm_up_work(self._profile, num_inference_steps=2)
        work.on_step = lambda _step, _steps: beat("warm-up")
        started = time.monotonic()
        pixels = self._generate(work)
        if pixels is None or pixels.shape != (size.height, size.width, 3):
            raise ModelError(f"model {self._profile.name}: the warm-up pass gave no picture")
        log.debug("warm-up pass took %.2f s", time.monotonic() - started)

    # --- prompts ---

    def count_tokens(self, prompt: str, *, clip: bool = False) -> int:
        """Tokens of a prompt, special tokens included, not truncated. Runs in: the prepare thread."""
        return (self._clip_tokenizer if clip else self._tokenizer).count(prompt)

    def cut_prompt(self, prompt: str, *, clip: bool = False) -> str:
        """The longest beginning of a prompt, at a word boundary, that fits the window. Runs in: the prepare thread."""
        return (self._clip_tokenizer if clip else self._tokenizer).cut(prompt)

    # --- work ---

    def admit(self, work: Work) -> None:
        """Take the one piece of work for the next turn."""
        if self._pending is not None:
            raise InternalError("the engine was given a second piece of work")
        self._pending = work

    def turn(self) -> Sequence[Outcome]:
        """Make the whole picture that was admitted."""
        work, self._pending = self._pending, None
        if work is None:
            return ()
        if work.cancelled.is_set():
            return (Outcome(work),)
        try:
            pixels = self._generate(work)
        except ApiError as error:
            return (Outcome(work, error=error),)
        except MemoryError:
            return (Outcome(work, error=InternalError("not enough memory for this picture")),)
        except RuntimeError as error:
            log.exception("generation failed")
            self._recover(work)
            return (Outcome(work, error=InternalError(f"the engine failed: {_first_line(error)}")),)
        return (Outcome(work, pixels=pixels),)

    def _recover(self, work: Work) -> None:
        """Make sure that the failure stays with this picture.

        The library's own refusals leave a pipeline usable. A failure inside a network does not: an infer request that has met a
        shape its graph cannot take fails at the shape that worked before it, for good (measured). A pass at the native size
        shows it, or ends it, if the shape that worked was another.

        Raises:
            RuntimeError: the pipelines cannot be built again either: the worker has to end.
        """
        try:
            self._warm_up(self._beat)
        except (RuntimeError, ModelError):
            log.warning("the pipelines did not recover: building them anew", extra=fields(model=self._profile.name))
            self._pipelines.clear()
            self._build(self._beat)
            self._warm_up(self._beat)
            if (work.width, work.height) != (self._profile.native.width, self._profile.native.height):
                self._unworkable = [*self._unworkable[1 - _UNWORKABLE_KEPT :], (work.width, work.height)]

    def phase(self) -> str:
        """idle, or encode: the turn begins with the text encoder; the steps report themselves."""
        return "idle" if self._pending is None else "encode"

    def close(self) -> None:
        """Release the device."""
        self._pipelines.clear()

    def _generate(self, work: Work) -> Pixels | None:
        """One picture; None when it was cancelled."""
        self._guard(work)
        pipeline = self._pipelines[work.mode]
        changed = work.scheduler not in ("", self._own)
        if changed:
            pipeline.set_scheduler(self._scheduler(work.scheduler))
        options = generation_options(work, self._profile)
        try:
            result = pipeline.generate(work.prompt, *_tensors(work), callback=_callback(work), **options)
        finally:
            if changed:
                pipeline.set_scheduler(self._own_scheduler)
        if work.cancelled.is_set() or not result.shape:
            return None  # a cancelled call returns a scalar of garbage
        # Not np.asarray: the tensor is the decoder's own buffer.
        pixels: Pixels = np.array(result.data[0], dtype=np.uint8, order="C", copy=True)
        return pixels

    def _guard(self, work: Work) -> None:
        """What must never reach the library, whoever let it come this far. Raises InvalidValue."""
        check_served(self.name, self._profile, work)  # no steps: SIGFPE
        if not 0 <= work.strength <= 1:
            raise InvalidValue("strength: must be within 0..1", param="strength")
        if is_lcm(self._profile, work.scheduler):  # too few timesteps for the steps: SIGSEGV
            enough = (
                steps_run(self._profile.scheduling.original_inference_steps, work.strength) >= work.num_inference_steps
            )
        else:
            enough = steps_run(work.num_inference_steps, work.strength) >= 1
        if not enough:
            raise InvalidValue(f"strength: {work.strength:g} leaves no step to run", param="strength")
        if work.scheduler and work.scheduler not in self.schedulers:
            raise InvalidValue(f"scheduler: {work.scheduler!r} is not served by this model", param="scheduler")
        if work.mode not in self._pipelines:
            raise InvalidValue(f"this model does not serve {work.mode}", param="model")
        multiple = self._profile.side_multiple_px
        if work.width < multiple or work.height < multiple or work.width % multiple or work.height % multiple:
            raise InternalError(f"working size {work.width}x{work.height} is no multiple of {multiple}")
        if (work.width, work.height) in self._unworkable:
            raise InvalidValue(f"size: this model cannot work at {work.width}x{work.height}", param="size")


def generation_options(work: Work, profile: ModelProfile) -> dict[str, Any]:
    """Every option by its name in the library, which ignores the ones it does not know, and refuses some with others.

    Never max_sequence_length: the first call freezes it, and every family's default is its text encoder's window.
    """
    options: dict[str, Any] = {
        "width": work.width,  # never left to the library: it takes the model's, the image's or a fixed size, by pipeline
        "height": work.height,
        "num_inference_steps": work.num_inference_steps,
        "guidance_scale": work.guidance_scale,
        "rng_seed": work.seed % 2**32,  # left out, every call has seed 42
        "num_images_per_prompt": 1,  # inpainting with more is refused, and picture k must be seed + k alone
    }
    if work.mode != "text2image":
        options["strength"] = work.strength
    prompts = {"prompt_2": work.prompt_2, "prompt_3": work.prompt_3}
    if (
        profile.takes_negative_prompt and work.guidance_scale > _WITHOUT_GUIDANCE
    ):  # refused without guidance, even when empty
        prompts |= {
            "negative_prompt": work.negative_prompt,
            "negative_prompt_2": work.negative_prompt_2,
            "negative_prompt_3": work.negative_prompt_3,
        }
    for name, text in prompts.items():
        encoder = int(name[-1]) if name[-1].isdigit() else 1
        if text and encoder <= profile.text_encoders:
            options[name] = text
    return options


def _tensors(work: Work) -> list[ov.Tensor]:
    """The image, (1, H, W, 3), and the mask, (1, H, W, 1): no other shapes are taken."""
    arrays = []
    if work.initial_image is not None:
        arrays.append(work.initial_image[None])
    if work.mask_image is not None:
        arrays.append(work.mask_image[None, :, :, None])
    return [ov.Tensor(np.ascontiguousarray(array, dtype=np.uint8)) for array in arrays]


def _callback(work: Work) -> Callable[..., bool]:
    """A step callback that never raises and always answers with a bool; True stops the generation about a step later."""

    def after_step(*reported: Any) -> bool:
        try:
            if work.on_step is not None:
                work.on_step(int(reported[0]) + 1, int(reported[1]))
            return work.cancelled.is_set()
        except BaseException:
            log.exception("step callback failed")
            return False

    return after_step


class _Tokenizer:
    """Counts and cuts prompts. Its own infer requests: thread-safe beside the pipelines, for use by one thread."""

    def __init__(self, directory: Path, window: int) -> None:
        self._directory = directory
        self._window = window
        self._tokenizer: Any = None

    def load(self) -> None:
        if self._tokenizer is not None:
            return
        self._tokenizer = og.Tokenizer(str(self._directory))
        self.count("the first call is slow")

    def count(self, prompt: str) -> int:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidValue(
                "prompt: holds half of a surrogate pair, which is no character", param="prompt"
            ) from None
        return int(self._tokenizer.encode(prompt).input_ids.shape[1])

    def cut(self, prompt: str) -> str:
        return longest_fitting(prompt, self.count, self._window)


def _first_line(error: BaseException) -> str:
    """What the library says, without the source location it puts first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Exception from", "Check "))]
    return (told or lines or ["unknown error"])[0][:300]
