"""The engine `genai`: openvino_genai's own pipelines, for every family the library serves, one picture at a time.

This file guards against the library's traps (calls that end the process, silent changes of meaning). Each guard has its
reason beside it; tests/e2e/test_traps.py shows each trap. Rules:
- One thread. Pipelines derived from one another share infer requests: a second thread causes a SIGSEGV.
- Build inpainting first, else image-to-image, and derive the others from it; in the opposite order its mask processors
  are null (SIGSEGV). Z-Image derives none: it generates through its image-to-image pipeline.
- Every derived pipeline gets a scheduler; without one `generate` is a SIGSEGV. FLUX.1's is read without a key that the
  library takes for FLUX.2's.
- A callback runs in a native thread: an exception, or a result that is not a bool, ends the process (std::terminate).
- A failure inside a network can break its infer request permanently: after an unexpected error, test the pipelines.
- A result is a view of the decoder's buffer, which the next call overwrites: copy it at once.
- FLUX.2 squashes its reference to the size of the result, so it gets the image that was fitted to the canvas.
- LoRA adapters: see genai_loras.py. Requests without adapters have their own pipelines, because in bfloat16 adapters of
  weight zero change bits.
- No previews: `decode` shares the decoder's infer request with `generate`, so a picture in progress cannot be decoded.
Runs in: worker, device thread; counting tokens also in the prepare thread.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as og

from ovserve.engines.checks import (
    check_fixed_values,
    check_known_fields,
    check_scheduler,
    check_step_count,
    check_step_spacing,
)
from ovserve.engines.genai_loras import GenaiLoras
from ovserve.engines.protocol import (
    CLIP_WINDOW,
    Features,
    Outcome,
    Work,
    has_t5,
    truncate_to_window,
    warm_up_size,
    warm_up_work,
)
from ovserve.engines.schedulers.schedulers import LIBRARY_SCHEDULERS
from ovserve.engines.static_shapes import StaticShape
from ovserve.engines.templates import count_templated
from ovserve.errors import ApiError, InternalError, InvalidValue, ModelError
from ovserve.logs import fields
from ovserve.models.families import LCM_SCHEDULER, FamilyTraits
from ovserve.models.profile import ModelProfile, served_by
from ovserve.models.steps import denoising_steps
from ovserve.pixels.images import Pixels
from ovserve.settings.options import ModelSettings, Resolution
from ovserve.wire.messages import Counts
from ovserve.wire.request import ImageRequest

__all__ = ["GENAI_FIELDS", "GenaiEngine", "generation_options", "make_scheduler"]

log = logging.getLogger(__name__)

_SCHEDULERS = {
    "ddim": og.Scheduler.Type.DDIM,
    "pndm": og.Scheduler.Type.PNDM,
    "euler": og.Scheduler.Type.EULER_DISCRETE,
    "euler_ancestral": og.Scheduler.Type.EULER_ANCESTRAL_DISCRETE,
}
# Configurations that a scheduler does not support; the library reports it only in the middle of a generation.
_UNSUPPORTED_CONFIGS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "ddim": lambda config: config.get("clip_sample", True) or bool(config.get("thresholding")),
    "pndm": lambda config: not config.get("skip_prk_steps"),
    "euler": lambda config: bool(config.get("use_karras_sigmas")),
    "euler_ancestral": lambda config: config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"),
}
# Fields of a request that the library gets, or that `check` and the worker settle for it: it has no previews, which the
# worker leaves out, and no shortcuts, which only save time.
GENAI_FIELDS = frozenset((
    "prompt", "negative_prompt", "prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3",
    "num_inference_steps", "guidance_scale", "strength", "scheduler", "max_sequence_length", "partial_images",
    "shortcuts", "adapters",
))  # fmt: skip
_NO_GUIDANCE = 1.0
_MAX_FAILED_SIZES = 64  # bounds the list; a size that drops out of it costs one more rebuild


class GenaiEngine:
    """The pipelines of one model on one device, or on three: text encoder, denoiser, VAE."""

    name = "genai"
    capacity = 1

    def __init__(self, profile: ModelProfile, settings: ModelSettings) -> None:
        profile = served_by(profile, self.name)
        self.features = Features(profile.tasks, references=profile.references)
        self.precision = ""  # the pipelines do not say
        self.tuned: dict[str, int] = {}
        self._profile = profile
        self._settings = settings
        self._loras = GenaiLoras(profile, settings.lora)
        self._pipelines: dict[str, Any] = {}
        self._adapted: dict[str, Any] = {}  # those with adapters
        self._own_name = LIBRARY_SCHEDULERS.get(profile.scheduling.name, "")
        self._own_scheduler: Any = None
        self._static = StaticShape.of(profile, settings)
        static = self._static
        self._warm_up_size = Resolution(static.width, static.height) if static else warm_up_size(profile)
        self._pending: Work | None = None
        self._failed_sizes: list[tuple[int, int]] = []  # width, height at which a network has failed
        self._beat: Callable[[str], None] = lambda _phase: None
        clip = profile.directory / "tokenizer"
        t5 = profile.traits.t5 if has_t5(profile) else None
        main = profile.directory / t5.tokenizer if t5 is not None else clip
        self._tokenizer = _Tokenizer(main if main.is_dir() else clip, profile.prompt_tokens, profile.traits)
        self._clip_tokenizer = _Tokenizer(clip, CLIP_WINDOW, profile.traits) if t5 is not None else self._tokenizer

    # --- loading ---

    def load(self, beat: Callable[[str], None]) -> None:
        """Read and compile the model, then make one real picture.

        Raises:
            ModelError: the model cannot be loaded.
        """
        self._beat = beat
        beat("load")
        try:
            self._tokenizer.load()
            self._clip_tokenizer.load()
            if self._settings.lora:
                self._read_adapters(beat)
            self._build(beat)
            beat("warm-up")
            self._warm_up(beat)
            if self._adapted:
                self._check_adapted(beat)
        except RuntimeError as error:
            raise ModelError(f"model {self._profile.name}: {_first_line(error)}") from error

    def _read_adapters(self, beat: Callable[[str], None]) -> None:
        if self._static is not None:
            raise ModelError(
                f"model {self._profile.name}: engine genai does not apply LoRA adapters with static shapes; "
                "use stepwise on another device"
            )
        self._loras.read()
        beat("load")

    def _build(self, beat: Callable[[str], None]) -> None:
        if self._settings.lora:
            self._adapted = self._build_pipelines(beat, {"adapters": self._loras.at_construction()})
        is_shared = self._settings.lora and self._settings.lora_denoiser == "shared"
        self._pipelines = self._adapted if is_shared else self._build_pipelines(beat, {})
        self.features = replace(self.features, schedulers=self._offered_schedulers())

    def _build_pipelines(self, beat: Callable[[str], None], properties: Mapping[str, Any]) -> dict[str, Any]:
        """Return a pipeline for each task; `properties` are those of the compilation beside the settings'."""
        first = next(task for task in ("inpainting", "image2image", "text2image") if task in self._profile.tasks)
        kinds = {
            "inpainting": og.InpaintingPipeline,
            "text2image": og.Text2ImagePipeline,
            "image2image": og.Image2ImagePipeline,
        }
        # Construct uncompiled, then compile(): the constructor holds the GIL, compile() does not.
        with _one_directory(self._profile) as directory:
            main = kinds[first](str(directory))
            beat("load")
            if self._static is not None:  # one picture a call, also for n > 1
                main.reshape(1, self._static.height, self._static.width, self._static.guidance_scale)
            devices = self._settings.device.split()
            main.compile(*devices, **self._properties(devices), **properties)
        beat("load")
        pipelines: dict[str, Any] = {first: main}
        for task in sorted(self._profile.tasks - {first}):
            pipelines[task] = main if self._profile.traits.generates_by_edit else kinds[task](main)
        self._own_scheduler = make_scheduler(self._profile)
        for pipeline in pipelines.values():
            pipeline.set_scheduler(self._own_scheduler)
        return pipelines

    def _properties(self, devices: list[str]) -> dict[str, Any]:
        settings = self._settings
        properties: dict[str, Any] = json.loads(settings.plugin_config) if settings.plugin_config else {}
        if settings.threads and all(device.startswith("CPU") for device in devices):
            properties["INFERENCE_NUM_THREADS"] = settings.threads
        if settings.cache_dir:
            properties["CACHE_DIR"] = str(settings.cache_dir)
        return properties

    def _offered_schedulers(self) -> frozenset[str]:
        """Return the model's own scheduler and those that support its configuration.

        Never LCM for a model that was not distilled for it: the library then writes to an input that the UNet does not
        have, a SIGSEGV.
        """
        offered = {self._own_name} - {""}
        if self._profile.traits.takes_schedulers and self._own_name != LCM_SCHEDULER:
            config = json.loads(_scheduler_config(self._profile).read_text("utf-8"))
            for name in _SCHEDULERS:
                try:
                    make_scheduler(self._profile, name)
                except RuntimeError:
                    continue  # a value that no scheduler of the library supports
                if not _UNSUPPORTED_CONFIGS[name](config):
                    offered.add(name)
        return frozenset(offered)

    def _warm_up(self, beat: Callable[[str], None]) -> None:
        """Make one picture before the worker reports ready.

        Raises:
            ModelError: the result does not have the expected shape.
        """
        size = self._warm_up_size
        work = warm_up_work(self._profile, num_inference_steps=2, size=size)
        if self._static is not None:
            work.guidance_scale = self._static.guidance_scale
        work.on_step = lambda _step, _steps: beat("warm-up")
        started = time.monotonic()
        pixels = self._generate(work)
        if pixels is None or pixels.shape != (size.height, size.width, 3):
            raise ModelError(f"model {self._profile.name}: the warm-up pass returned no picture")
        log.debug("warm-up pass took %.2f s", time.monotonic() - started)

    def _check_adapted(self, beat: Callable[[str], None]) -> None:
        """Check that pictures with adapters do not depend on those made before.

        Raises:
            ModelError: they do; the library then reads memory that is not an adapter's.
        """
        made: list[Pixels | None] = []
        for weight in (1.0, 0.0, -0.5, 1.0, 0.0):
            work = warm_up_work(self._profile, num_inference_steps=2, size=self._warm_up_size)
            work.on_step = lambda _step, _steps: beat("warm-up")
            adapters = tuple((entry.alias, weight) for entry in self._settings.lora)
            work.request = replace(work.request, adapters=adapters)
            made.append(self._generate(work, is_adapted=True))
        if not all(np.array_equal(made[one], made[other]) for one, other in ((0, 3), (1, 4))):  # type: ignore[arg-type]
            raise ModelError(
                f"model {self._profile.name}: OpenVINO GenAI makes different pictures of the same request with LoRA "
                "adapters on this device; use engine stepwise"
            )

    # --- requests ---

    def check(self, request: Work | ImageRequest) -> None:
        """Check the scheduler, and the values with which the library fails or ends the process. Thread-safe.

        Raises:
            InvalidValue: the request has one of them.
        """
        check_known_fields(request, GENAI_FIELDS, self.name)
        check_scheduler(request, self.features.schedulers)
        check_step_count(request, self._profile)  # zero steps: SIGFPE
        check_step_spacing(request, self._profile)
        check_fixed_values(request, self._profile)
        self._loras.check(request)

    def count_tokens(self, prompt: str, *, clip: bool = False) -> int:
        """Count all tokens of a prompt, special tokens included. Runs in: the prepare thread."""
        return (self._clip_tokenizer if clip else self._tokenizer).count(prompt)

    def cut_prompt(self, prompt: str, *, clip: bool = False) -> str:
        """Return the longest prefix of a prompt that fits the window. Runs in: the prepare thread."""
        return (self._clip_tokenizer if clip else self._tokenizer).cut(prompt)

    # --- work ---

    def admit(self, work: Work) -> None:
        """Accept the work of the next turn. Raises InternalError while there is one already."""
        if self._pending is not None:
            raise InternalError("the engine has work already; its capacity is 1")
        self._pending = work

    def turn(self) -> Sequence[Outcome]:
        """Make the admitted picture, from the first step to the last."""
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
        except Exception as error:  # the binding raises more than RuntimeError: TypeError, ValueError, ...
            log.exception("generation failed", extra=fields(job=work.job))
            self._recover(work)
            return (Outcome(work, error=InternalError(f"the engine failed: {_first_line(error)}")),)
        return (Outcome(work, pixels=pixels),)

    def _recover(self, work: Work) -> None:
        """Make sure that the failure affects only this picture.

        After an error of the library's own checks a pipeline remains usable, but not always after a failure inside a
        network: after one unsupported shape, an infer request fails permanently at the last shape that worked
        (measured). So make a picture of the warm-up's size; it either shows the failure, or, if the last working shape
        was another, ends it. If it fails, build the pipelines again.

        Raises:
            RuntimeError: the pipelines cannot be built again; the worker must exit.
        """
        try:
            self._warm_up(self._beat)
        except (RuntimeError, ModelError):
            log.warning(
                "pipelines did not recover from a failure; rebuilding them",
                extra=fields(model=self._profile.name, job=work.job),
            )
            self.close()
            self._build(self._beat)
            self._warm_up(self._beat)
            if (work.width, work.height) != (self._warm_up_size.width, self._warm_up_size.height):
                self._failed_sizes = [*self._failed_sizes[1 - _MAX_FAILED_SIZES :], (work.width, work.height)]

    def counts(self) -> Counts:
        """Return nothing counted: the library makes the calls and has the caches."""
        return Counts()

    def use_idle_time(self) -> bool:
        """Return False: there is nothing to do."""
        return False

    def phase(self) -> str:
        """Return idle, or encode: a turn begins with the text encoder; its steps send their own heartbeats."""
        return "idle" if self._pending is None else "encode"

    def close(self) -> None:
        """Release the device."""
        self._pipelines, self._adapted = {}, {}

    def _generate(self, work: Work, *, is_adapted: bool = False) -> Pixels | None:
        """Make one picture, with adapters if it has weights or `is_adapted`; return None if it was cancelled."""
        self._check_work(work)
        is_adapted |= any(weight for _, weight in work.request.adapters)
        pipelines = self._adapted if is_adapted else self._pipelines
        pipeline = pipelines[work.mode]
        changed = work.scheduler not in ("", self._own_name)
        if changed:
            pipeline.set_scheduler(make_scheduler(self._profile, work.scheduler))
        options, images = generation_options(work, self._profile), _tensors(work)
        if work.mode == "text2image" and isinstance(pipeline, og.Image2ImagePipeline):
            images = [ov.Tensor(np.full((1, work.height, work.width, 3), 127, np.uint8))]  # noise covers it
            options["strength"] = 1.0
        if pipelines is self._adapted:
            options["adapters"] = self._loras.of_call(work)
        try:
            result = pipeline.generate(work.prompt, *images, callback=_callback(work), **options)
        finally:
            if changed:
                pipeline.set_scheduler(self._own_scheduler)
        if work.cancelled.is_set() or not result.shape:
            return None  # a cancelled call returns a scalar without meaning
        # Not np.asarray: the tensor is the decoder's own buffer.
        pixels: Pixels = np.array(result.data[0], dtype=np.uint8, order="C", copy=True)
        return pixels

    def _check_work(self, work: Work) -> None:
        """Check again everything that must never reach the library.

        Raises:
            InvalidValue: this model cannot do the work.
            InternalError: the working size was chosen wrongly.
        """
        self.check(work)
        if not 0 <= work.strength <= 1:
            raise InvalidValue(f"strength is {work.strength:g}; it must be within 0 to 1", param="strength")
        # With LCM, too few timesteps for the steps are a SIGSEGV.
        if not denoising_steps(self._profile, work.scheduler, work.num_inference_steps, work.strength):
            raise InvalidValue(
                f"strength is {work.strength:g}, which leaves too few of {work.num_inference_steps} steps; raise it",
                param="strength",
            )
        if work.mode not in self._pipelines:
            raise InvalidValue(f"this model does not serve {work.mode}", param="model")
        multiple = self._profile.side_multiple_px
        if work.width < multiple or work.height < multiple or work.width % multiple or work.height % multiple:
            raise InternalError(f"working size {work.width}x{work.height} is not a multiple of {multiple}")
        if self._static is not None:
            self._static.check(work.width, work.height, work.guidance_scale)
        if (work.width, work.height) in self._failed_sizes:
            raise InvalidValue(
                f"size: this model failed at {work.width}x{work.height} before; use another size", param="size"
            )


@contextlib.contextmanager
def _one_directory(profile: ModelProfile) -> Iterator[Path]:
    """Yield a directory with all components of a model: the library reads a model from one."""
    if profile.vae is None:
        yield profile.directory
        return
    with tempfile.TemporaryDirectory(prefix="ovserve-model-") as folder:
        for part in profile.directory.iterdir():
            if part.name not in ("vae_decoder", "vae_encoder"):
                Path(folder, part.name).symlink_to(part)
        for name in ("vae_decoder", "vae_encoder"):
            if profile.component(name).is_dir():
                Path(folder, name).symlink_to(profile.component(name).absolute())
        yield Path(folder)


def make_scheduler(profile: ModelProfile, name: str = "") -> Any:
    """Return a scheduler of the library for a model: its own, or the one of a name in _SCHEDULERS.

    Raises:
        RuntimeError: the library does not support the configuration.
    """
    path = _scheduler_config(profile)
    kind = _SCHEDULERS[name] if name else og.Scheduler.Type.AUTO
    document = json.loads(path.read_text("utf-8"))
    if not profile.traits.misreads_time_shift or document.pop("time_shift_type", None) is None:
        return og.Scheduler.from_config(path, kind)
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / path.name
        changed.write_text(json.dumps(document), "utf-8")
        return og.Scheduler.from_config(changed, kind)


def _scheduler_config(profile: ModelProfile) -> Path:
    return profile.directory / "scheduler" / "scheduler_config.json"


def generation_options(work: Work, profile: ModelProfile) -> dict[str, Any]:
    """Return the arguments of `generate` by their names in the library.

    The library silently ignores unknown names, and rejects some combinations. Never max_sequence_length: the first call
    fixes it, and every family's default is its text encoder's window.
    """
    options: dict[str, Any] = {
        "width": work.width,  # the library's default depends on the pipeline: the model's, the image's or a fixed size
        "height": work.height,
        "num_inference_steps": work.num_inference_steps,
        "guidance_scale": work.guidance_scale,
        "rng_seed": work.seed % 2**32,  # the default is seed 42 for every call
        "num_images_per_prompt": 1,  # inpainting rejects more, and picture k must equal that of seed + k
    }
    if work.mode != "text2image" and profile.takes_strength:  # FLUX.2 ignores it
        options["strength"] = work.strength
    prompts = {"prompt_2": work.prompt_2, "prompt_3": work.prompt_3}
    # Without guidance the library rejects a negative prompt, even an empty one.
    if profile.takes_negative_prompt and work.guidance_scale > _NO_GUIDANCE:
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
    """Return the image, (1, H, W, 3), and the mask, (1, H, W, 1): the only shapes that the library accepts."""
    arrays = []
    if work.initial_image is not None:
        arrays.append(work.initial_image[None])
    if work.mask_image is not None:
        arrays.append(work.mask_image[None, :, :, None])
    return [ov.Tensor(np.ascontiguousarray(array, dtype=np.uint8)) for array in arrays]


def _callback(work: Work) -> Callable[..., bool]:
    """Return a step callback that never raises and always returns a bool; True stops about a step later."""

    def after_step(*reported: Any) -> bool:
        try:
            if work.on_step is not None:
                work.on_step(int(reported[0]) + 1, int(reported[1]))
            return work.cancelled.is_set()
        except BaseException:
            log.exception("step callback failed", extra=fields(job=work.job))
            return False

    return after_step


class _Tokenizer:
    """Counts and truncates prompts. For one thread; safe beside the pipelines: its infer requests are its own."""

    def __init__(self, directory: Path, window: int, traits: FamilyTraits) -> None:
        self._directory = directory
        self._window = window
        self._traits = traits
        self._tokenizer: Any = None

    def load(self) -> None:
        if self._tokenizer is not None:
            return
        self._tokenizer = og.Tokenizer(str(self._directory), INFERENCE_NUM_THREADS=1)
        self.count("the first call is slow, so make it during load")

    def count(self, prompt: str) -> int:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidValue(
                "prompt contains half of a surrogate pair, which is not a character; remove it", param="prompt"
            ) from None
        return count_templated(self._tokenizer, self._traits, prompt)

    def cut(self, prompt: str) -> str:
        return truncate_to_window(prompt, self.count, self._window)


def _first_line(error: BaseException) -> str:
    """Return the first line of the library's message that is not a source location."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if not line.startswith(("Exception from", "Check "))]
    return (reasons or lines or ["unknown error"])[0][:300]
