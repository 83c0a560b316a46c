"""The engine `stepwise`: our own denoising loop; pictures join and leave between steps and share UNet calls.

    admit ──▶ encode ──▶ ready ──call──▶ ready ... ──▶ decode ──▶ Outcome
              (slot)      │  rows of one size, many pictures   (slot)
                          └──────────── (slots) ───────────────┘

A turn waits until at least one call has ended, applies its results, and fills the free slots. There is no barrier
between slots: a call is formed from the pictures that are ready when a slot is free. So a picture joins the next call
as soon as it is encoded, and leaves as soon as its last step is done. `batching` decides which pictures share a call.

Encoding and decoding go first, because they let pictures join and leave, but between two UNet calls they take no longer
than one UNet call, so that they do not stall denoising.

Invariant: every row is computed as if alone (same threads, same order of operations), so load never changes the bytes
of a picture.
Runs in: the device thread; calls run in slot threads, or there too (`slots`), previews in another one (`previews`).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ovserve.engines.checks import check_scheduler, check_step_count
from ovserve.engines.families.protocol import DenoiserRow, Feed, PlanMaker, Start
from ovserve.engines.protocol import Features, Outcome, Pixels, Work, warm_up_size, warm_up_work
from ovserve.engines.schedulers.noise import Array, read_scheduler_config
from ovserve.engines.schedulers.plans import Plan
from ovserve.engines.stepwise.batching import Batcher, Call, Row
from ovserve.engines.stepwise.compiled import Components, Requests, run_decoder, run_encoder
from ovserve.engines.stepwise.encoding import Encoding
from ovserve.engines.stepwise.lora import Loras, with_weights
from ovserve.engines.stepwise.lora_compile import add_adapted
from ovserve.engines.stepwise.picture import Picture
from ovserve.engines.stepwise.previews import Previews, choose_shrink
from ovserve.engines.stepwise.prompts import PromptEncoder
from ovserve.engines.stepwise.shortcuts import parse_shortcuts
from ovserve.engines.stepwise.slots import Finished, Slots
from ovserve.engines.stepwise.tiling import decode_tiles
from ovserve.engines.stepwise.tuning import LARGE_CALL_S, shared_rows, tune, warm_up, warm_up_rows
from ovserve.errors import ApiError, BadRequest, InternalError, InvalidValue, ModelError
from ovserve.logs import fields
from ovserve.models.profile import ModelProfile, served_by
from ovserve.settings.options import ModelSettings
from ovserve.wire.messages import Counts
from ovserve.wire.request import ImageRequest

__all__ = ["Call", "Row", "StepwiseEngine"]

# For the kernels of shared calls. Where they take longer, the rest is made when it is needed: idle work delays a
# request that arrives meanwhile.
IDLE_LIMIT_S = 2.0

log = logging.getLogger(__name__)


class StepwiseEngine:
    """The protocol `Engine`, with compiled models and our own loop.

    Args:
        profile: the model.
        settings: the model's options.
        trace: called with each call that has ended; tests and benchmarks read its rows, times and slot.
        components: the models; None for those of the profile's directory.
    """

    name = "stepwise"

    def __init__(
        self,
        profile: ModelProfile,
        settings: ModelSettings,
        trace: Callable[[Finished[Call]], None] | None = None,
        components: Components | None = None,
    ) -> None:
        profile = served_by(profile, self.name)
        self.capacity = 1
        self.features = Features(profile.tasks, previews=True, references=profile.references)
        self.precision = ""
        self.tuned: dict[str, int] = {}
        self._profile = profile
        self._settings = settings
        self._trace = trace
        self._components = components or Components(profile, settings)
        self._schedulers: dict[str, PlanMaker] = {}
        self._loras = Loras(settings.lora)
        self._encodes: deque[Picture] = deque()
        self._ready: deque[Picture] = deque()
        self._decodes: deque[Picture] = deque()
        self._calls: list[Call] = []
        self._outcomes: list[Outcome] = []
        self._codec_s = 0.0  # duration of encode and decode calls since the last denoising call started
        self._encode_s = 0.0  # duration of the last encode call
        self._call_s = 0.0  # duration of the last denoising call
        self._counts = Counts()
        self._cold: deque[tuple[int, int]] = deque()  # slots and numbers of rows without kernels
        self._idle_s = 0.0  # time spent on making them
        self._closing = ExitStack()  # resources that `load` has started, also if it failed halfway

    @property
    def schedulers(self) -> frozenset[str]:
        """The schedulers that a request may choose."""
        return self.features.schedulers

    # --- loading ---

    def load(self, beat: Callable[[str], None]) -> None:
        """Read and compile the model, choose streams, threads and rows by measuring, and make one real picture.

        Raises:
            ModelError: the model cannot be loaded.
        """
        beat("load")
        started = time.monotonic()
        try:
            self._load(beat)
        except ApiError as error:
            raise ModelError(f"model {self._profile.name}: the warm-up pass failed: {error.message}") from error
        except RuntimeError as error:
            raise ModelError(f"model {self._profile.name}: {error}") from error
        log.info(
            "engine stepwise is ready",
            extra=fields(
                model=self._profile.name,
                streams=self._slots.count,
                threads=self._tuning.layout.threads,
                rows=self._tuning.rows,
                capacity=self.capacity,
                precision=self.precision,
                seconds=round(time.monotonic() - started, 2),
            ),
        )

    def _load(self, beat: Callable[[str], None]) -> None:
        profile = self._profile
        self._components.read()
        self._family = self._components.family
        beat("load")
        _check_presets(profile)
        document = read_scheduler_config(profile.directory)
        own, self._schedulers = self._family.schedulers(document, profile.scheduling.name)
        self._schedulers[""] = self._schedulers[own]
        self.features = replace(self.features, schedulers=frozenset(self._schedulers) - {""})
        self._prompts = PromptEncoder(profile, self._family, self._components.loras)
        self._tuning = tune(self._components, beat)
        self._components.compile(self._tuning.layout, beat)
        self.precision = self._components.precision()
        add_adapted(self._components, self._tuning.layout, beat)
        spare = self._components.preview_decoder(self._tuning.layout)
        self._components.release_sources()
        self._loras = self._components.loras
        if not self._loras.rows_are_independent:
            log.warning("a row with adapters has other bits in a call with another row; such pictures share no call")
            self._tuning = replace(self._tuning, splits=False)
        self._encoding = Encoding(self._components, self._prompts)
        self._slots: Slots[Call] = Slots(self._components.requests)
        self._closing.callback(self._slots.close)
        self._batcher = Batcher(self._ready, self._tuning, profile.native, self._slots.count, self._sharing_key)
        self.capacity = self._tuning.capacity
        layout = self._tuning.layout
        self.tuned = {"streams": layout.streams, "threads": layout.threads, "max_batch": self._tuning.rows // 2}
        self._call_s = self._tuning.step_s
        warm_up(self._components, self._tuning, beat)
        if self._tuning.layout.threads:  # a CPU; for other devices `warm_up` has made them
            self._cold.extend((slot, rows) for rows in shared_rows(self._tuning) for slot in range(self._slots.count))
        self._make_warm_up_picture(beat)
        self._previews = Previews(spare, choose_shrink(self._measure_decoding(spare), self._tuning.step_s))
        self._closing.callback(self._previews.close)

    def _make_warm_up_picture(self, beat: Callable[[str], None]) -> None:
        """Make one real picture: a worker is ready only after that.

        Raises:
            ApiError: the picture failed.
        """
        # Where steps are long, one step must do; a second would test nothing more.
        steps = 1 if self._tuning.step_s > LARGE_CALL_S else 2
        work = warm_up_work(self._profile, num_inference_steps=steps, size=warm_up_size(self._profile))
        self.admit(work)
        outcomes: list[Outcome] = []
        while not outcomes:
            beat("warm-up")
            outcomes.extend(self.turn())
        if outcomes[0].error is not None:
            raise outcomes[0].error

    def _measure_decoding(self, request: Any) -> float:
        """Return the seconds to decode a picture of the native size; for a large model estimated from a quarter."""
        vae, size = self._components.vae, self._profile.native
        side = 2 if self._tuning.step_s > LARGE_CALL_S else 1
        cells = (size.height // vae.scale // side, size.width // vae.scale // side)
        latents = np.zeros((1, vae.latent_channels, *cells), np.float32)
        started = time.monotonic()
        run_decoder(request, latents)
        return (time.monotonic() - started) * side**2

    # --- requests ---

    def check(self, request: Work | ImageRequest) -> None:
        """Check the scheduler, the number of steps, and the shortcuts of the preset. Thread-safe.

        Raises:
            InvalidValue: a value that this engine does not have for this model.
            InternalError: the preset's shortcuts are invalid.
        """
        check_scheduler(request, self.features.schedulers)
        check_step_count(request, self._profile)
        self._loras.check(request)
        try:
            parse_shortcuts(request.shortcuts)
        except ValueError as error:
            raise InternalError(f"shortcuts is {request.shortcuts!r}: {error}") from None

    def count_tokens(self, prompt: str, *, clip: bool = False) -> int:
        """Count all tokens of a prompt, special tokens included. Thread-safe."""
        return self._prompts.count_tokens(prompt, clip=clip)

    def cut_prompt(self, prompt: str, *, clip: bool = False) -> str:
        """Return the longest prefix of a prompt that fits the window. Thread-safe."""
        return self._prompts.cut_prompt(prompt, clip=clip)

    # --- work ---

    def admit(self, work: Work) -> None:
        """Add a picture, which is encoded at once if a slot is free. An error ends it at the next turn."""
        try:
            self.check(work)
            plan, shortcuts = self._plan(work), parse_shortcuts(work.shortcuts)
        except Exception as error:  # noqa: BLE001 - it ends this picture, not the worker
            self._outcomes.append(Outcome(work, error=_error_of(work, error)))
            return
        self._encodes.append(Picture(work, plan, self._family.guidance, is_solo=work.alone, shortcuts=shortcuts))
        self._fill_slots()

    def _plan(self, work: Work) -> Plan:
        if work.mode not in self._profile.tasks:
            raise InvalidValue(f"this model does not serve {work.mode}", param="model")
        scale = self._components.vae.scale
        if work.width % scale or work.height % scale or min(work.width, work.height) < scale:
            raise InternalError(f"working size {work.width}x{work.height} is not a multiple of {scale}")
        cells = (work.width // scale) * (work.height // scale)
        return self._schedulers[work.scheduler].plan(
            work.num_inference_steps, 1.0 if work.mode == "text2image" else work.strength, cells
        )

    def counts(self) -> Counts:
        """Return its calls and rows, and the lookups in its caches. Thread-safe, once it is loaded."""
        prompts, images = self._prompts.lookups, self._encoding.lookups
        return replace(
            self._counts,
            prompt_hits=prompts[0],
            prompt_misses=prompts[1],
            image_hits=images[0],
            image_misses=images[1],
        )

    def phase(self) -> str:
        """Return what the next turn waits for: idle, encode, denoise or decode."""
        kinds = {call.kind for call in self._calls}
        if self._outcomes or self._ready or "denoise" in kinds:
            return "denoise"
        if "decode" in kinds or self._decodes:
            return "decode"
        return "encode" if kinds or self._encodes else "idle"

    def turn(self) -> Sequence[Outcome]:
        """Wait until at least one call has ended; return the outcomes of the pictures that ended."""
        self._fill_slots()
        if self._slots.busy and not self._outcomes:
            if not self._is_alone_in_flight():
                self._slots.release()
            for finished in self._slots.wait():
                self._apply(finished)
            self._fill_slots()
        outcomes, self._outcomes = self._outcomes, []
        if outcomes or not self._is_alone_in_flight():
            self._slots.release()  # it need not wait for the next turn: delivering outcomes takes time
        return outcomes

    def _is_alone_in_flight(self) -> bool:
        """Return whether all calls in flight end at about the same time: one call, or the rows of one picture."""
        return len(self._calls) <= 1 or len({row.picture for call in self._calls for row in call.rows}) == 1

    def use_idle_time(self) -> bool:
        """Make the kernels for one more number of rows in one slot; return False if there is nothing left to do.

        They are not made before the engine is ready, because a server's first request is mostly alone.
        """
        if not self._cold or self._slots.busy:  # the other row of a picture that has failed may still run
            return False
        slot, rows = self._cold.popleft()
        started = time.monotonic()
        try:
            warm_up_rows(self._components, self._tuning, self._components.requests[slot], rows)
        except (RuntimeError, MemoryError) as error:  # no picture needs it now; a call that does is made again alone
            log.warning("kernels for shared calls could not be made: %s", error)
            self._cold.clear()
        self._idle_s += time.monotonic() - started
        if self._idle_s > IDLE_LIMIT_S:
            self._cold.clear()
        return True

    def close(self) -> None:
        """Release the device after the calls in flight. Also after a failed `load`."""
        self._closing.close()

    # --- forming calls ---

    def _fill_slots(self) -> None:
        """Start a call in every free slot, while there is something to do."""
        self._drop_cancelled()
        while self._slots.free:
            waiting = self._decodes or self._encodes
            is_codec_first = waiting and self._codec_s < self._call_s
            if self._ready and not is_codec_first and self._start_denoising():
                continue
            if not waiting:
                return
            self._start_codec(waiting.popleft())

    def _drop_cancelled(self) -> None:
        for queue in (self._encodes, self._ready, self._decodes):
            for picture in [picture for picture in queue if picture.work.cancelled.is_set()]:
                queue.remove(picture)
                self._finish(Outcome(picture.work))

    def _start_codec(self, picture: Picture) -> None:
        """Start the decode call of a picture whose steps are done, or the encode call of a new one."""
        work, plan, decoded = picture.work, picture.plan, picture.decoded
        if decoded is None:
            self._start(_call_of_one("encode", picture), lambda requests: self._encoding.start(work, plan, requests))
        else:
            latents = self._family.decoder_input(decoded)
            tiling = self._components.tiling

            def decode(requests: Requests) -> Pixels:
                return decode_tiles(partial(run_decoder, requests.vae_decoder), latents, tiling)

            self._start(_call_of_one("decode", picture), decode)

    def _start_denoising(self) -> bool:
        """Start the next denoising calls; return False if the next picture has to wait until all slots are free."""
        counts_encodes = self._encode_s <= self._call_s
        calls = self._batcher.take(self._calls, self._slots.free, counts_encodes=counts_encodes)
        if not calls:
            return False
        self._codec_s = 0.0
        for rows in calls:
            self._start_rows(rows)
        return True

    def _start_rows(self, rows: list[Row]) -> None:
        """Start a denoising call, without the pictures whose samples cannot be made."""
        samples: dict[Picture, Array] = {}
        for picture in dict.fromkeys(row.picture for row in rows if not row.picture.is_ended):
            try:
                samples[picture] = picture.sample()
            except Exception as error:  # noqa: BLE001 - it ends this picture, not its neighbours and not the worker
                self._fail_picture(picture, error)
        call = Call("denoise", tuple(row for row in rows if row.picture in samples))
        if not call.rows:
            return
        try:
            feed = self._feed(call.rows, samples)
        except Exception as error:  # noqa: BLE001 - as in a slot: each picture is then tried alone
            self._fail(call, error)
        else:
            self._start(call, self._denoising(call.rows, feed))

    def _denoising(self, rows: Sequence[Row], feed: Feed) -> Callable[[Requests], Array]:
        """Return what a slot runs for a call: the denoiser, or the one with adapters if a row has weights."""
        name = self._family.denoiser
        weights = [self._loras.weights(row.picture.work, name) for row in rows]
        if not any(weights):
            return lambda requests: self._family.run(requests.denoiser, feed)
        adapted = with_weights(feed, self._loras.rows(weights))
        return lambda requests: self._family.run(requests.adapted[name], adapted)

    def _feed(self, rows: Sequence[Row], samples: Mapping[Picture, Array]) -> Feed:
        denoised = []
        for row in rows:
            start, timestep = row.picture.ready, row.picture.timestep
            sample = samples[row.picture]
            denoised.append(DenoiserRow(sample, timestep, start.conditions, row.condition, start.context))
        components = self._components
        return self._family.feed(denoised, components.types, timestep_per_row=components.timestep_per_row)

    def _sharing_key(self, picture: Picture) -> Hashable:
        per_row = self._components.timestep_per_row
        key = self._family.sharing_key(picture.latents, picture.ready, picture.timestep, timestep_per_row=per_row)
        return key, self._loras.sharing_key(picture.work, self._family.denoiser)

    def _start(self, call: Call, run: Callable[[Requests], object]) -> None:
        self._calls.append(call)
        self._slots.start(call, run)

    # --- applying results ---

    def _apply(self, finished: Finished[Call]) -> None:
        call, seconds = finished.subject, finished.ended_at - finished.started_at
        self._calls.remove(call)
        if call.kind == "denoise":
            self._call_s = seconds
            self._count_call(len(call.rows), seconds)
        else:
            self._codec_s += seconds
        if call.kind == "encode":
            self._encode_s = seconds
        if self._trace is not None:
            self._trace(finished)
        if call.kind != "encode":  # whose parts are reported where they run
            _report_span(call, finished)
        if finished.error is not None:
            self._fail(call, finished.error)
            if isinstance(finished.error, RuntimeError):
                self._check_device(finished.slot)
        elif call.kind == "encode":
            self._begin_steps(call.pictures[0], finished.result)
        elif call.kind == "decode":
            self._finish_decoded(call.pictures[0], finished.result)
        else:
            self._apply_predictions(call, finished.result)

    def _count_call(self, rows: int, seconds: float) -> None:
        counts = self._counts
        self._counts = replace(
            counts, calls=counts.calls + 1, rows=counts.rows + rows, call_us=counts.call_us + int(seconds * 1e6)
        )

    def _begin_steps(self, picture: Picture, start: Start) -> None:
        try:
            picture.begin(start)
        except InternalError as error:
            self._fail_picture(picture, error)
        else:
            self._ready.append(picture)

    def _apply_predictions(self, call: Call, predictions: Array) -> None:
        """Store each row's prediction in its picture; a picture with all its predictions makes its step."""
        for row, prediction in zip(call.rows, predictions, strict=True):
            row.picture.predictions[row.condition] = prediction[None]
        for picture in call.pictures:
            if picture.is_ended or len(picture.predictions) < picture.rows:
                continue
            try:
                self._advance(picture)
            except Exception as error:  # noqa: BLE001 - it ends this picture, not its neighbours and not the worker
                self._fail_picture(picture, error)

    def _advance(self, picture: Picture) -> None:
        """Make a picture's step, and those after it that need no call; then queue it for the next call."""
        self._make_step(picture)
        while picture.is_forecast:
            self._make_step(picture)
        (self._decodes if picture.is_done else self._ready).append(picture)

    def _make_step(self, picture: Picture) -> None:
        picture.advance()
        work = picture.work
        if work.on_step is not None:
            work.on_step(picture.index, picture.steps)
        if picture.index in work.previews and picture.clean is not None and not picture.is_done:
            self._previews.enqueue(work, picture.index, self._family.decoder_input(picture.clean))

    def _finish_decoded(self, picture: Picture, pixels: Pixels) -> None:
        is_cancelled = picture.work.cancelled.is_set()
        self._finish(Outcome(picture.work, pixels=None if is_cancelled else pixels))

    def _finish(self, outcome: Outcome) -> None:
        if outcome.work.previews:
            self._previews.discard(outcome.work)
        self._outcomes.append(outcome)

    def _fail(self, call: Call, error: Exception) -> None:
        """Retry each picture of a failed shared call alone; a picture that was alone in the call has failed."""
        shared = len(call.pictures) > 1
        if shared:
            jobs = ",".join(dict.fromkeys(picture.work.job for picture in call.pictures))
            found = fields(kind=call.kind, rows=len(call.rows), jobs=jobs)
            log.error("shared call failed", exc_info=error, extra=found)
        for picture in call.pictures:
            picture.predictions = {}
            if shared:
                picture.is_solo = True
                self._ready.append(picture)
            else:
                self._fail_picture(picture, error)

    def _fail_picture(self, picture: Picture, error: Exception) -> None:
        """End a picture with an error, once: the call of its other row may have failed before."""
        if picture.is_ended:
            return
        picture.is_ended = True
        self._finish(Outcome(picture.work, error=_error_of(picture.work, error, steps_done=picture.index)))

    def _check_device(self, slot: int) -> None:
        """Run one pass at the native size in a free slot whose last call failed: did the pictures fail, or the device?

        Raises:
            RuntimeError: the device failed; the worker must exit, and other workers take its jobs.
        """
        requests, vae, size = self._components.requests[slot], self._components.vae, self._profile.native
        latents = np.zeros((1, vae.latent_channels, size.height // vae.scale, size.width // vae.scale), np.float32)
        if requests.vae_encoder is not None:
            run_encoder(requests.vae_encoder, np.zeros((1, 3, size.height, size.width), np.float32))
        per_row = self._components.timestep_per_row
        for rows in (1, 2):
            # Two shapes: after a call that failed, a request fails on with the shape that worked last, until another
            # one works (measured). That failure is no sign of a failed device.
            feed = self._components.feeds.of(rows, timestep_per_row=per_row)
            try:
                self._family.run(requests.denoiser, feed)
            except RuntimeError:
                if rows == 2:
                    raise
        run_decoder(requests.vae_decoder, latents)


def _error_of(work: Work, error: Exception, **where: int) -> ApiError:
    """Return an exception as the error of a picture; log it unless it is about the request."""
    if isinstance(error, BadRequest):
        return error
    log.error("picture failed", exc_info=error, extra=fields(job=work.job, picture=work.picture, **where))
    if isinstance(error, ApiError):
        return error
    reason = str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
    return InternalError(f"the engine failed: {reason}")


def _report_span(call: Call, finished: Finished[Call]) -> None:
    """Report a denoising or decoding call to those of its pictures that are traced."""
    stage = "call" if call.kind == "denoise" else call.kind
    for picture in call.pictures:
        if (report := picture.work.on_span) is not None:
            report(stage, finished.started_at, finished.ended_at, len(call.rows))


def _call_of_one(kind: str, picture: Picture) -> Call:
    return Call(kind, (Row(picture, 0, picture.index),))


def _check_presets(profile: ModelProfile) -> None:
    """Check the shortcuts of the operator's presets, so that an error shows when the model is loaded.

    Raises:
        ModelError: a preset's shortcuts are invalid.
    """
    for quality, preset in profile.presets.items():
        try:
            parse_shortcuts(str(preset.get("shortcuts", "")))
        except ValueError as error:
            raise ModelError(f"model {profile.name}: preset {quality}: shortcuts: {error}") from None
