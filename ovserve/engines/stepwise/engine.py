"""The engine of our own loop: pictures join and leave between steps, and share UNet calls whatever their timesteps.

    admit ──▶ encode ──▶ ready ──call──▶ ready ... ──▶ decode ──▶ Outcome
              (slot)      │  rows of one size, many pictures   (slot)
                          └──────────── (slots) ───────────────┘

A turn waits until one call has ended, takes its results, and fills the slots that are free. There is no barrier between slots:
each call is formed from whatever is ready when a slot is free, so a picture that has just been encoded joins the next call, and
one that is done leaves at once.

Fairness: ready pictures form a queue; a call takes its head, and others of the same size in order, so every picture in flight
gets the same share of steps and none starves. A picture of far fewer steps than the head goes ahead of it, but only so often between
two steps of the head: that delays a long one by little, and a short one need not wait for it at each of its steps. Encoding and decoding go first, for they let pictures join and leave, but never
for longer than one UNet call between two of those, so that they do not stall denoising.

Every row is computed as if alone (the same threads, the same order of operations), so load never changes anybody's bytes.
Runs in: the device thread; calls run in slot threads (`slots`), previews in their own (`previews`).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovserve.engines.protocol import STEPWISE_FAMILIES, Outcome, Pixels, Work, warm_up_work
from ovserve.engines.schedulers.noise import Array, read_scheduler_config
from ovserve.engines.schedulers.schedulers import SCHEDULERS, Plan, Scheduler, scheduler_name
from ovserve.engines.stepwise.compiled import Components, Requests, run_decoder, run_encoder, run_unet
from ovserve.engines.stepwise.encoding import Encoding
from ovserve.engines.stepwise.picture import Picture, Start
from ovserve.engines.stepwise.previews import Previews, choose_shrink
from ovserve.engines.stepwise.prompts import TextSide
from ovserve.engines.stepwise.shortcuts import parse_shortcuts
from ovserve.engines.stepwise.slots import Finished, Slots
from ovserve.engines.stepwise.tuning import LARGE_CALL_S, tune, warm_up
from ovserve.errors import ApiError, InternalError, InvalidValue, ModelError
from ovserve.logs import fields
from ovserve.models.profile import ModelProfile
from ovserve.settings.options import ModelSettings

__all__ = ["Call", "Row", "StepwiseEngine"]

FAR_SHORTER = 4  # times fewer steps: a picture that goes ahead delays the other by a quarter at most
PATIENCE = 2  # steps of shorter pictures since its own last one, after which a long picture lets none go ahead

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a call: row `place` of a picture at step `index`."""

    picture: Picture
    place: int
    index: int


@dataclass(frozen=True, slots=True)
class Call:
    """One call to the device: kind encode, denoise or decode, and the rows it holds (one for each picture unless denoise)."""

    kind: str
    rows: tuple[Row, ...]

    @property
    def pictures(self) -> list[Picture]:
        """The pictures in it, each once."""
        return list(dict.fromkeys(row.picture for row in self.rows))


class StepwiseEngine:
    """Implements engine.Engine over compiled models and our own loop.

    Args:
        profile, settings: the model, and how the operator wants it run.
        trace: called with each call that has ended, for tests and benchmarks: what shared a call, when, and where.
        components: the models; left out, those of the profile's directory.
    """

    name = "stepwise"

    def __init__(
        self,
        profile: ModelProfile,
        settings: ModelSettings,
        trace: Callable[[Finished[Call]], None] | None = None,
        components: Components | None = None,
    ) -> None:
        self.capacity = 1
        self.schedulers: frozenset[str] = frozenset()
        self.tuned: dict[str, int] = {}
        self._profile = profile
        self._settings = settings
        self._trace = trace
        self._components = components or Components(profile, settings)
        self._schedulers: dict[str, Scheduler] = {}
        self._encodes: deque[Picture] = deque()
        self._ready: deque[Picture] = deque()
        self._decodes: deque[Picture] = deque()
        self._under_way: list[Call] = []
        self._ended: list[Outcome] = []
        self._side_s = 0.0  # encoding and decoding since the last denoising call began
        self._encode_s = 0.0  # how long the last encoding took
        self._call_s = 0.0  # how long the last denoising call took
        self._closing = ExitStack()  # what `load` has started, however far it came

    # --- loading ---

    def load(self, beat: Callable[[str], None]) -> None:
        """Read and compile the model, measure how to divide the device, and make one real picture. Raises ModelError."""
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
                seconds=round(time.monotonic() - started, 2),
            ),
        )

    def _load(self, beat: Callable[[str], None]) -> None:
        profile = self._profile
        if profile.family not in STEPWISE_FAMILIES:
            raise ModelError(f"model {profile.name}: the stepwise engine has no loop for family {profile.family}")
        self._components.read()
        beat("load")
        _check_presets(profile)
        document = read_scheduler_config(profile.directory)
        own = scheduler_name(document, profile.scheduling.name)
        self._schedulers = _offered(own, document, is_lcm=bool(self._components.time_cond_dim))
        self._schedulers[""] = self._schedulers[own]
        self.schedulers = frozenset(self._schedulers) - {""}
        self._text = TextSide(profile, self._components.time_cond_dim, _forces_zeros(profile))
        self._timestep_type = self._components.feeds.types["timestep"]
        self._tuning = tune(self._components, beat)
        self._components.compile(self._tuning.layout, beat)
        self._components.release_sources()
        self._encoding = Encoding(self._components, self._text)
        self._slots: Slots[Call] = Slots(self._components.requests)
        self._closing.callback(self._slots.close)
        self.capacity = self._tuning.capacity
        layout = self._tuning.layout
        self.tuned = {"streams": layout.streams, "threads": layout.threads, "max_batch": self._tuning.rows // 2}
        self._call_s = self._tuning.step_s
        warm_up(self._components, self._tuning, beat)
        self._make_one(beat)
        spare = self._components.requests[-1].vae_decoder.get_compiled_model().create_infer_request()
        self._previews = Previews(spare, choose_shrink(self._measure_decoding(spare), self._tuning.step_s))
        self._closing.callback(self._previews.close)

    def _make_one(self, beat: Callable[[str], None]) -> None:
        """One real picture, as a client would have it: ready means it has worked."""
        # Where steps are long one has to do: a second would show no more.
        work = warm_up_work(self._profile, num_inference_steps=1 if self._tuning.step_s > LARGE_CALL_S else 2)
        self.admit(work)
        outcomes: list[Outcome] = []
        while not outcomes:
            beat("warm-up")
            outcomes.extend(self.turn())
        if outcomes[0].error is not None:
            raise outcomes[0].error

    def _measure_decoding(self, request: Any) -> float:
        """Seconds of decoding one picture of the native size, by a call of a quarter of it where a whole one takes long."""
        vae, size = self._components.vae, self._profile.native
        side = 2 if self._tuning.step_s > LARGE_CALL_S else 1
        cells = (size.height // vae.scale // side, size.width // vae.scale // side)
        latents = np.zeros((1, vae.latent_channels, *cells), np.float32)
        started = time.monotonic()
        run_decoder(request, latents)
        return (time.monotonic() - started) * side**2

    # --- prompts ---

    def count_tokens(self, prompt: str, *, clip: bool = False) -> int:  # noqa: ARG002 - every encoder of these families is CLIP's
        """Tokens of a prompt, special tokens included, not truncated. Thread-safe."""
        return self._text.count_tokens(prompt)

    def cut_prompt(self, prompt: str, *, clip: bool = False) -> str:  # noqa: ARG002
        """The longest beginning of a prompt, at a word boundary, that fits the window. Thread-safe."""
        return self._text.cut_prompt(prompt)

    # --- work ---

    def admit(self, work: Work) -> None:
        """Let a picture join: it is encoded at once where a slot is free, and steps with the next call that is formed."""
        try:
            picture = Picture(work, self._plan(work), is_solo=work.alone, shortcuts=parse_shortcuts(work.shortcuts))
        except ApiError as error:
            self._ended.append(Outcome(work, error=error))
            return
        except ValueError as error:
            self._ended.append(Outcome(work, error=InternalError(f"shortcuts {work.shortcuts!r}: {error}")))
            return
        self._encodes.append(picture)
        self._fill()

    def _plan(self, work: Work) -> Plan:
        scheduler = self._schedulers.get(work.scheduler)
        if scheduler is None:
            raise InvalidValue(f"scheduler: {work.scheduler!r} is not served by this model", param="scheduler")
        if work.mode not in self._profile.tasks:
            raise InvalidValue(f"this model does not serve {work.mode}", param="model")
        scale = self._components.vae.scale
        if work.width % scale or work.height % scale or min(work.width, work.height) < scale:
            raise InternalError(f"working size {work.width}x{work.height} is no multiple of {scale}")
        return scheduler.plan(work.num_inference_steps, 1.0 if work.mode == "text2image" else work.strength)

    def phase(self) -> str:
        """What the next turn waits for: idle, encode, denoise or decode."""
        kinds = {call.kind for call in self._under_way}
        if self._ended or self._ready or "denoise" in kinds:
            return "denoise"
        if "decode" in kinds or self._decodes:
            return "decode"
        return "encode" if kinds or self._encodes else "idle"

    def turn(self) -> Sequence[Outcome]:
        """Wait for one call to end, and give out the pictures that ended with it."""
        self._fill()
        if self._slots.busy and not self._ended:
            for finished in self._slots.wait():
                self._take(finished)
            self._fill()
        outcomes, self._ended = self._ended, []
        return outcomes

    def close(self) -> None:
        """Release the device, after the calls under way. Also after a `load` that failed."""
        self._closing.close()

    # --- forming calls ---

    def _fill(self) -> None:
        """Give every free slot a call, as far as there is something to do."""
        self._drop_cancelled()
        while self._slots.free:
            side = self._decodes or self._encodes
            is_sides_turn = side and self._side_s < self._call_s
            if self._ready and not is_sides_turn and self._start_denoising():
                continue
            if not side:
                return
            self._start_side(side)

    def _drop_cancelled(self) -> None:
        for queue in (self._encodes, self._ready, self._decodes):
            for picture in [picture for picture in queue if picture.work.cancelled.is_set()]:
                queue.remove(picture)
                self._end(Outcome(picture.work))

    def _start_side(self, side: deque[Picture]) -> None:
        picture = side.popleft()
        work, plan, decoded = picture.work, picture.plan, picture.decoded
        if decoded is None:
            self._start(_whole("encode", picture), lambda requests: self._encoding.start(work, plan, requests))
        else:
            self._start(_whole("decode", picture), lambda requests: run_decoder(requests.vae_decoder, decoded))

    def _start_denoising(self) -> bool:
        """Start a call, or one for each row of a picture; False where a picture is to have all slots and some are not free yet."""
        head = self._whose_turn()
        one_at_a_time = self._is_one_at_a_time(head)
        if one_at_a_time and self._slots.busy:
            return False
        self._side_s = 0.0
        self._ready.remove(head)
        has_room = one_at_a_time or self._rows + head.rows <= self._slots.count
        if self._tuning.splits and has_room and 1 < head.rows <= self._slots.free:
            started = [head]
            for place in head.places:  # each row of the picture on a slot of its own
                self._start_rows([Row(head, place, head.index)])
        else:
            started = self._group(head)
            self._start_rows([Row(picture, place, picture.index) for picture in started for place in picture.places])
        for waiting in self._ready:
            waiting.passed += sum(_is_far_shorter(picture, waiting) for picture in started)
        return True

    def _whose_turn(self) -> Picture:
        """The head of the queue; or the first of far fewer steps, if the head has not let enough of those by."""
        head = self._ready[0]
        if head.passed < PATIENCE:
            return next((picture for picture in self._ready if _is_far_shorter(picture, head)), head)
        return head

    def _is_one_at_a_time(self, head: Picture) -> bool:
        """Whether a long picture and a far shorter one take turns with all slots, as fast as one alone, and not a slot each.

        Where one picture fills the slots, and nobody else is there: rows of many pictures are quicker together. One that is being
        encoded counts if that is quicker than a step.
        """
        if not self._tuning.splits or head.rows < self._slots.count or self._rows > 2 * self._slots.count:
            return False
        kinds = {"encode", "denoise"} if self._encode_s <= self._call_s else {"denoise"}
        under_way = [picture for call in self._under_way if call.kind in kinds for picture in call.pictures]
        there = [*self._ready, *under_way]
        return any(_is_far_shorter(one, other) for one in there for other in there)

    @property
    def _rows(self) -> int:
        """Rows of all pictures that are ready or in a denoising call."""
        in_calls = sum(len(call.rows) for call in self._under_way if call.kind == "denoise")
        return in_calls + sum(picture.rows for picture in self._ready)

    def _group(self, head: Picture) -> list[Picture]:
        """The pictures of the next call: `head`, and others from the queue that can share a call with it, in order."""
        group, rows = [head], head.rows
        most = self._most_rows(head)
        share = min(most, math.ceil((self._rows + head.rows) / self._slots.count))
        for picture in list(self._ready):
            if rows >= share:
                break
            if self._can_share(head, picture) and rows + picture.rows <= most:
                self._ready.remove(picture)
                group.append(picture)
                rows += picture.rows
        return group

    def _can_share(self, head: Picture, other: Picture) -> bool:
        if head.is_solo or other.is_solo or head.latents.shape != other.latents.shape:
            return False
        return self._components.timestep_per_row or head.timestep == other.timestep

    def _most_rows(self, picture: Picture) -> int:
        """Rows in a call for pictures of this size: fewer where they are larger than the size that was measured."""
        native = self._profile.native
        share = native.width * native.height / (picture.work.width * picture.work.height)
        return max(2, int(self._tuning.rows * min(1.0, share)))

    def _start_rows(self, rows: list[Row]) -> None:
        feed = self._feed(rows)
        self._start(Call("denoise", tuple(rows)), lambda requests: run_unet(requests.unet, feed))

    def _feed(self, rows: list[Row]) -> dict[str, NDArray[Any]]:
        samples = {row.picture: row.picture.sample() for row in rows}
        parts: dict[str, list[Array]] = {name: [] for name in self._components.inputs - {"sample", "timestep"}}
        for row in rows:
            for name, values in parts.items():
                values.append(row.picture.ready.conditions.arrays[name][row.place])
        feed: dict[str, NDArray[Any]] = {name: np.stack(values) for name, values in parts.items()}
        feed["sample"] = np.concatenate([samples[row.picture] for row in rows])
        timesteps = [row.picture.timestep for row in rows]
        feed["timestep"] = np.array(
            timesteps if self._components.timestep_per_row else timesteps[:1], self._timestep_type
        )
        return feed

    def _start(self, call: Call, run: Callable[[Requests], object]) -> None:
        self._under_way.append(call)
        self._slots.start(call, run)

    # --- taking results ---

    def _take(self, finished: Finished[Call]) -> None:
        call, seconds = finished.subject, finished.ended_at - finished.started_at
        self._under_way.remove(call)
        if call.kind == "denoise":
            self._call_s = seconds
        else:
            self._side_s += seconds
        if call.kind == "encode":
            self._encode_s = seconds
        if self._trace is not None:
            self._trace(finished)
        if finished.error is not None:
            self._fail(call, finished.error)
            if len(call.pictures) == 1 and isinstance(finished.error, RuntimeError):
                self._prove(finished.slot)
        elif call.kind == "encode":
            self._begin(call.pictures[0], finished.result)
        elif call.kind == "decode":
            self._give_out(call.pictures[0], finished.result)
        else:
            self._step(call, finished.result)

    def _begin(self, picture: Picture, start: Start) -> None:
        picture.begin(start)
        self._ready.append(picture)

    def _step(self, call: Call, predictions: Array) -> None:
        """Hand each row's prediction to its picture; pictures whose rows are all there make their step."""
        for row, prediction in zip(call.rows, predictions, strict=True):
            row.picture.predictions[row.place] = prediction[None]
        for picture in call.pictures:
            if picture.is_ended or len(picture.predictions) < picture.rows:
                continue
            picture.advance()
            work = picture.work
            if work.on_step is not None:
                work.on_step(picture.index, picture.steps)
            if picture.index in work.previews and picture.clean is not None and not picture.is_done:
                self._previews.ask(work, picture.index, picture.clean)
            (self._decodes if picture.is_done else self._ready).append(picture)

    def _give_out(self, picture: Picture, pixels: Pixels) -> None:
        wanted = not picture.work.cancelled.is_set()
        self._end(Outcome(picture.work, pixels=pixels if wanted else None))

    def _end(self, outcome: Outcome) -> None:
        if outcome.work.previews:
            self._previews.forget(outcome.work)
        self._ended.append(outcome)

    def _fail(self, call: Call, error: Exception) -> None:
        """What shared a call that failed is tried again alone, so that nobody falls with a neighbour; alone, it has failed."""
        log.error("a call failed", exc_info=error, extra=fields(kind=call.kind, rows=len(call.rows)))
        shared = len(call.pictures) > 1
        for picture in call.pictures:
            picture.predictions = {}
            if shared:
                picture.is_solo = True
                self._ready.append(picture)
            elif not picture.is_ended:  # the other row's call may have failed before
                picture.is_ended = True
                told = error if isinstance(error, ApiError) else InternalError(f"the engine failed: {error}")
                self._end(Outcome(picture.work, error=told))

    def _prove(self, slot: int) -> None:
        """A pass at the native size in a slot that is free, whose last call has failed: was it the picture, or the device?

        Raises:
            RuntimeError: the device: the worker has to end, and its jobs are made elsewhere.
        """
        requests, vae, size = self._components.requests[slot], self._components.vae, self._profile.native
        latents = np.zeros((1, vae.latent_channels, size.height // vae.scale, size.width // vae.scale), np.float32)
        if requests.vae_encoder is not None:
            run_encoder(requests.vae_encoder, np.zeros((1, 3, size.height, size.width), np.float32))
        feed = self._components.feeds.of(2, timestep_per_row=self._components.timestep_per_row)
        run_unet(requests.unet, feed)
        run_decoder(requests.vae_decoder, latents)


def _is_far_shorter(one: Picture, other: Picture) -> bool:
    return one.steps * FAR_SHORTER <= other.steps


def _whole(kind: str, picture: Picture) -> Call:
    return Call(kind, (Row(picture, 0, picture.index),))


def _offered(own: str, document: Mapping[str, Any], *, is_lcm: bool) -> dict[str, Scheduler]:
    """The model's own scheduler, and the others its configuration allows. A model distilled for LCM has no other."""
    offered = {own: Scheduler(own, document)}
    for name in () if is_lcm else sorted(SCHEDULERS - {own}):
        try:
            offered[name] = Scheduler(name, document)
        except ModelError as error:
            log.debug("scheduler %s is not offered: %s", name, error)
    return offered


def _check_presets(profile: ModelProfile) -> None:
    """A preset's shortcuts are the operator's words: wrong ones are told when the model is loaded. Raises ModelError."""
    for quality, preset in profile.presets.items():
        try:
            parse_shortcuts(str(preset.get("shortcuts", "")))
        except ValueError as error:
            raise ModelError(f"model {profile.name}: preset {quality}: {error}") from None


def _forces_zeros(profile: ModelProfile) -> bool:
    """Whether SDXL's absent negative prompt is zeros and not an empty text: model_index.json, as the library reads it."""
    try:
        document = json.loads((profile.directory / "model_index.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{profile.directory}: model_index.json cannot be read: {error}") from None
    return bool(document.get("force_zeros_for_empty_prompt", True))
