"""The worker's desk: the jobs it holds, on their way from the link through the device and back.

    main thread      reads commands ──Run──▶ prepare thread      decode, orient, fit, mask, count tokens ──Prepared──▶
                                                  │ works
                                             device thread       the device loop: admit, turn, beat
                                                  │ outcomes
                     Room ─────────────────▶ finish thread       paste back, encode ──Need──▶ ◀──Room── fill ──Picture, Done──▶

Laws of this file:
- A job that came in goes out in exactly one Done or Failed, when the worker has let go of it: nothing of it is on the device or
  in a queue any more. That holds for a cancelled job too; the front end counts on it to fill the place.
- What goes wrong with one job ends that job. What goes wrong with a thread ends the process: the supervisor starts another.
- End-of-file on the link means that the front end is dead: the process ends at once, whatever it is doing.
- Every queue is bounded: jobs by the capacity reported as ready, outcomes by _FINISH_LIMIT, encoded pictures by the jobs held.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from ovserve.config import ModelSettings, Settings
from ovserve.deadline import Deadline
from ovserve.device.engine import Engine, Outcome, Preview, Work
from ovserve.device.loop import DeviceLoop
from ovserve.device.pixels.edit import Edit, prepare, seed_of
from ovserve.dispatch.ipc import (
    MAX_CAPACITY,
    Beat,
    Cancel,
    Done,
    Failed,
    ImageRequest,
    LinkClosed,
    LinkGarbage,
    Message,
    Need,
    Picture,
    Prepared,
    Progress,
    Ready,
    Room,
    Run,
    Stop,
    WorkerEnd,
)
from ovserve.dispatch.spool import fill
from ovserve.errors import ApiError, DeadlineExceeded, InternalError, ModelError, SpoolFull
from ovserve.logs import fields
from ovserve.profile import ModelProfile

__all__ = ["BROKEN", "LOAD_FAILED", "Desk"]

LOAD_FAILED = 3  # exit code: the model cannot be loaded; the reason went out as a Failed without a job
BROKEN = 4  # exit code: a thread of the worker has failed, or the link carries no messages
_SPARE_JOBS = 2  # beside those in the engine: one prepared and one being finished, so that the device never waits
_FINISH_LIMIT = 4  # outcomes waiting to be encoded; then the device waits
_PREVIEW_LIMIT = 8  # previews waiting to be encoded; further ones are dropped
_TICK_S = 1.0
_SHORT_TEXT_CHARS = 300  # of a message that does not fit a link: at most 12 bytes for each character in JSON

CreateEngine = Callable[[ModelProfile, ModelSettings], tuple[Engine, str]]

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Held:
    """One job the worker holds. Changed under the desk's lock.

    Attributes:
        given, returned: pieces of work handed to the device loop, and outcomes dealt with.
        filled: results whose segment is filled.
        error: why it fails; the first reason counts.
        stopped: nobody wants it any more, or it has failed: whoever meets it lets go of it. Shared with its works.
    """

    job: str
    run: Run
    deadline: Deadline
    edit: Edit | None = None
    is_preparing: bool = True
    given: int = 0
    returned: int = 0
    filled: int = 0
    error: ApiError | None = None
    stopped: threading.Event = field(default_factory=threading.Event)
    partials: dict[int, int] = field(default_factory=dict)
    prepare_ms: float = 0.0
    denoise_ms: float = 0.0
    finish_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class _Finished:
    """What the device loop gives out, and how long the engine had it."""

    outcome: Outcome
    seconds: float


@dataclass(frozen=True, slots=True)
class _Estimate:
    """A preview on its way to the client."""

    work: Work
    preview: Preview


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A picture that waits for the segment it goes into: until the front end gives one, cancels the job, or is gone."""

    data: bytes
    partial: int


class Desk:
    """Everything between the link and the engine. One instance in a worker process, run by its main thread."""

    def __init__(
        self,
        end: WorkerEnd,
        profile: ModelProfile,
        model: ModelSettings,
        settings: Settings,
        create_engine: CreateEngine,
    ) -> None:
        self._create_engine = create_engine
        self._end = end
        self._profile = profile
        self._model = model
        self._settings = settings
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._is_stopping = False
        self._to_prepare: queue.SimpleQueue[_Held] = queue.SimpleQueue()
        self._to_finish: queue.SimpleQueue[_Finished | _Estimate | Room] = queue.SimpleQueue()
        self._finish_places = threading.Semaphore(_FINISH_LIMIT)
        self._preview_places = threading.Semaphore(_PREVIEW_LIMIT)
        self._waiting: dict[
            tuple[str, int], deque[_Encoded]
        ] = {}  # finish thread only; by job and picture, in order of Need
        self._busy_since: dict[str, float] = {}  # by thread: since when it has been at one item
        self._engine: Engine | None = None
        self._loop: DeviceLoop | None = None

    # --- main thread --------------------------------------------------------------------------------------------------

    def run(self) -> NoReturn:
        """Start the threads, then read commands until the process ends."""
        for name, target in (
            ("prepare", self._prepare_loop),
            ("finish", self._finish_loop),
            ("device", self._device_thread),
        ):
            threading.Thread(target=_or_exit, args=(target,), name=name, daemon=True).start()
        while True:
            try:
                self._obey(self._end.receive())
            except LinkClosed:
                _exit(0)
            except LinkGarbage:
                log.exception("the link carries no messages")
                _exit(BROKEN)

    def _obey(self, message: Message) -> None:
        if isinstance(message, Run):
            held = _Held(message.job, message, Deadline.after(message.timeout_s))
            with self._lock:
                self._held[message.job] = held
            self._to_prepare.put(held)
        elif isinstance(message, Cancel):
            with self._lock:
                found = self._held.get(message.job)
            if found is not None:
                self._fail(found, InternalError("the job was cancelled"))
        elif isinstance(message, Room):
            self._to_finish.put(message)
        elif isinstance(message, Stop):
            self._is_stopping = True
            self._end_if_drained()
        else:
            raise LinkGarbage(f"a front end does not send {message.kind!r}")

    def _end_if_drained(self) -> None:
        with self._lock:
            if not self._is_stopping or self._held:
                return
        if self._loop is None:
            _exit(0)  # told to stop while loading: nothing is held
        self._loop.stop()

    # --- what becomes of a job ----------------------------------------------------------------------------------------

    def _fail(self, held: _Held, error: ApiError) -> None:
        """The job ends with this error as soon as everything has let go of it. Thread-safe; the first error counts."""
        with self._lock:
            if held.error is None:
                held.error = error
        held.stopped.set()
        if self._loop is not None:
            self._loop.wake()
        self._settle(held)

    def _settle(self, held: _Held) -> None:
        """Report the end of a job if it has come. Thread-safe; exactly one report for each job."""
        with self._lock:
            if held.job not in self._held or held.is_preparing or held.returned < held.given:
                return
            if held.error is None and (held.edit is None or held.filled < held.edit.request.n):
                return
            del self._held[held.job]
        if held.error is None:
            self._send(Done(held.job, held.prepare_ms, held.denoise_ms, held.finish_ms))
        else:
            self._send_failed(held.job, held.error)
        self._end_if_drained()

    def _is_wanted(self, work: Work) -> bool:
        if work.cancelled.is_set():
            return False
        with self._lock:
            held = self._held.get(work.job)
        if held is None or not held.deadline.is_expired():
            return held is not None
        self._expire(held)
        return False

    def _expire(self, held: _Held) -> None:
        # Not _fail: this is called by the device loop with its own lock held, and the outcomes to come settle the job.
        with self._lock:
            held.error = held.error or DeadlineExceeded("the job's deadline passed while it was on the device")
        held.stopped.set()

    # --- prepare thread -----------------------------------------------------------------------------------------------

    def _prepare_loop(self) -> None:
        while True:
            held = self._to_prepare.get()
            self._busy_since["prepare"] = time.monotonic()
            try:
                self._prepare(held)
            except ApiError as error:
                self._end_preparing(held, error)
            except FileNotFoundError:
                self._end_preparing(held, InternalError("the exchange has ended"))
            except LinkClosed:
                _exit(0)
            except Exception as error:  # one job's trouble, MemoryError included, is not the worker's
                log.exception("prepare failed", extra=fields(job=held.job))
                self._end_preparing(held, InternalError(f"the request could not be prepared: {type(error).__name__}"))
            finally:
                self._busy_since.pop("prepare", None)

    def _end_preparing(self, held: _Held, error: ApiError) -> None:
        held.is_preparing = False
        self._fail(held, error)

    def _prepare(self, held: _Held) -> None:
        if self._engine is None or self._loop is None:
            raise InternalError("a job came before the worker was ready")
        if held.deadline.is_expired():
            raise DeadlineExceeded("the job's deadline passed before it came to the device")
        if held.stopped.is_set():
            raise InternalError("the job was cancelled")
        started = time.monotonic()
        request = ImageRequest.from_json(Path(held.run.request).read_bytes())
        edit = prepare(request, self._profile, self._model, self._settings, self._engine)
        works = [self._follow(held, request, edit.work(held.job, k, alone=held.run.alone)) for k in range(request.n)]
        held.prepare_ms = (time.monotonic() - started) * 1000
        self._send_prepared(held.job, edit)
        with self._lock:
            held.edit, held.given, held.is_preparing = edit, request.n, False
        self._loop.add(works)

    def _follow(self, held: _Held, request: ImageRequest, work: Work) -> Work:
        """Tie a piece of work to its job: progress, previews, deadline and cancellation."""

        def on_step(step: int, steps: int) -> None:
            if held.deadline.is_expired():
                self._expire(held)
            elif request.progress and not held.stopped.is_set():
                self._send(Progress(held.job, work.picture, step, steps))

        def on_preview(preview: Preview) -> None:
            if self._preview_places.acquire(blocking=False):
                self._to_finish.put(_Estimate(work, preview))

        work.cancelled = held.stopped
        work.on_step = on_step
        if work.previews:
            work.on_preview = on_preview
        return work

    # --- device thread ------------------------------------------------------------------------------------------------

    def _device_thread(self) -> None:
        try:
            engine, loop, why = self._load_any()
        except Exception as error:  # noqa: BLE001 - whatever keeps a model from loading is told to the operator
            self._give_up(error)
        self._engine, self._loop = engine, loop
        capacity = min(engine.capacity + _SPARE_JOBS, MAX_CAPACITY)
        self._send(Ready(capacity, engine.name, why[:_SHORT_TEXT_CHARS], dict(engine.tuned)))
        loop.run()
        engine.close()
        _exit(0)

    def _load_any(self) -> tuple[Engine, DeviceLoop, str]:
        """A loaded engine, its loop, and why it is this one: `auto` gives to genai what our own loop cannot load."""
        engine, why = self._create_engine(self._profile, self._model)
        if self._model.engine != "auto" or engine.name == "genai":
            return engine, self._load(engine), why
        try:
            return engine, self._load(engine), why
        except Exception as error:  # an unfamiliar export shows itself by whatever it lacks; the library may read it
            log.warning(
                "engine %s cannot load this model, genai is tried: %s",
                engine.name,
                error,
                exc_info=None if isinstance(error, ModelError) else error,
            )
            why = f"{engine.name} cannot load this model: {_reason_of(error)}"
        # Only here: within the block above the traceback would keep the first engine's models in memory beside the second's.
        engine.close()
        del engine
        gc.collect()
        engine, _ = self._create_engine(self._profile, dataclasses.replace(self._model, engine="genai"))
        return engine, self._load(engine), why

    def _load(self, engine: Engine) -> DeviceLoop:
        loop = DeviceLoop(engine, self._beat, self._deliver, self._is_wanted, self._settings.hang_limit_s)
        loop.load()
        return loop

    def _give_up(self, error: Exception) -> NoReturn:
        """Tell why the model cannot be loaded, then end."""
        reason = _reason_of(error)
        if not isinstance(error, ModelError):
            log.error("loading failed", exc_info=error)
            reason = f"model {self._profile.name}: {reason}"
        self._send_failed("", InternalError(reason))
        _exit(LOAD_FAILED)

    def _beat(self, phase: str, allow_s: float) -> None:
        """Called by the device loop. A thread that is stuck in one picture silences the beats: only a restart frees it."""
        now = time.monotonic()
        for name, since in list(self._busy_since.items()):
            if now - since > self._settings.hang_limit_s:
                log.error("thread is stuck: no more beats", extra=fields(thread=name, seconds=round(now - since)))
                return
        self._send(Beat(phase, allow_s))

    def _deliver(self, outcome: Outcome, seconds: float) -> bool:
        if not self._finish_places.acquire(timeout=_TICK_S):
            return False
        self._to_finish.put(_Finished(outcome, seconds))
        return True

    # --- finish thread ------------------------------------------------------------------------------------------------

    def _finish_loop(self) -> None:
        while True:
            item = self._to_finish.get()
            self._busy_since["finish"] = time.monotonic()
            self._finish(item)
            self._busy_since.pop("finish", None)
            del item  # not kept while waiting: the last job's picture would stay in memory until the next one

    def _finish(self, item: _Finished | _Estimate | Room) -> None:
        if isinstance(item, _Estimate):
            self._preview_places.release()
        elif isinstance(item, _Finished):
            self._finish_places.release()
        with self._lock:
            held = self._held.get(_job_of(item))
        if held is None:
            return  # a Room or a preview that came after its job had failed
        try:
            if isinstance(item, Room):
                self._fill(held, item)
            elif isinstance(item, _Estimate):
                self._try_preview(held, item)
            else:
                self._finish_outcome(held, item)
        except ApiError as error:
            self._fail(held, error)
        except FileNotFoundError:
            self._fail(held, InternalError("the exchange has ended"))
        except LinkClosed:
            _exit(0)
        except Exception as error:  # one job's trouble, MemoryError included, is not the worker's
            log.exception("finish failed", extra=fields(job=held.job))
            self._fail(held, InternalError(f"the picture could not be encoded: {type(error).__name__}"))
        if isinstance(item, _Finished):
            with self._lock:
                held.returned += 1
        if held.error is not None:
            self._waiting = {key: value for key, value in self._waiting.items() if key[0] != held.job}
        self._settle(held)

    def _finish_outcome(self, held: _Held, item: _Finished) -> None:
        outcome = item.outcome
        held.denoise_ms += item.seconds * 1000
        if outcome.error is not None:
            self._fail(held, outcome.error)
        if outcome.pixels is None or held.edit is None or held.stopped.is_set():
            return
        started = time.monotonic()
        picture = outcome.work.picture
        data = held.edit.encode(held.edit.assemble(outcome.pixels), picture)
        held.finish_ms += (time.monotonic() - started) * 1000
        self._ask_room(held, picture, data, -1)

    def _try_preview(self, held: _Held, item: _Estimate) -> None:
        try:
            self._finish_preview(held, item)
        except Exception:  # a preview is a courtesy: the picture does not depend on it
            log.exception("preview failed", extra=fields(job=held.job))

    def _finish_preview(self, held: _Held, item: _Estimate) -> None:
        if held.edit is None or held.stopped.is_set():
            return
        picture = item.work.picture
        index = held.partials.get(picture, 0)
        if index < held.edit.request.partial_images:
            data = held.edit.encode_preview(item.preview.pixels)
            held.partials[picture] = index + 1  # one that cannot be encoded leaves its number to the next
            self._ask_room(held, picture, data, index)

    def _ask_room(self, held: _Held, picture: int, data: bytes, partial: int) -> None:
        waiting = self._waiting.setdefault((held.job, picture), deque())
        waiting.append(_Encoded(data, partial))
        self._send(Need(held.job, picture, len(data), partial))

    def _fill(self, held: _Held, room: Room) -> None:
        """The dispatcher answers each Need with one Room, in order; a preview without room is left out."""
        waiting = self._waiting.get((held.job, room.picture))
        if not waiting:
            return
        encoded = waiting.popleft()
        if not waiting:
            del self._waiting[held.job, room.picture]
        if not room.path and encoded.partial >= 0:
            return
        if not room.path:
            raise SpoolFull("there is no room for the result", retry_after_s=2)
        fill(room.path, encoded.data)
        seed = seed_of(held.edit.request, room.picture) if held.edit else 0
        self._send(Picture(held.job, room.picture, seed, len(encoded.data), encoded.partial))
        if encoded.partial < 0:
            held.filled += 1

    # --- reports ------------------------------------------------------------------------------------------------------

    def _send(self, message: Message) -> None:
        """Report. The process ends when the front end is gone."""
        try:
            self._end.send(message)
        except LinkClosed:
            _exit(0)

    def _send_failed(self, job: str, error: ApiError) -> None:
        try:
            self._send(Failed(job, error.to_wire()))
        except ValueError:  # characters that take six or twelve bytes in JSON
            short = type(error)(error.message[:_SHORT_TEXT_CHARS], param=error.param, retry_after_s=error.retry_after_s)
            self._send(Failed(job, short.to_wire()))

    def _send_prepared(self, job: str, edit: Edit) -> None:
        message = Prepared(
            job=job,
            mode=edit.mode,
            width=edit.frame.width,
            height=edit.frame.height,
            steps=edit.steps,
            text_tokens=edit.text_tokens,
            image_tokens=edit.image_tokens,
            output_tokens=edit.output_tokens,
            revised_prompt=edit.revised_prompt,
        )
        try:
            self._send(message)
        except ValueError:
            self._send(dataclasses.replace(message, revised_prompt=edit.revised_prompt[:_SHORT_TEXT_CHARS]))


def _reason_of(error: Exception) -> str:
    return str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"


def _job_of(item: _Finished | _Estimate | Room) -> str:
    if isinstance(item, Room):
        return item.job
    return item.work.job if isinstance(item, _Estimate) else item.outcome.work.job


def _or_exit(target: Callable[[], None]) -> None:
    """Run a thread's function; a thread that fails takes the process with it, for the jobs it holds would wait for ever."""
    try:
        target()
    except BaseException:
        log.exception("a worker thread failed")
        _exit(BROKEN)


def _exit(code: int) -> NoReturn:
    """End the process now: other threads sit in native calls that no interpreter shutdown can wait for."""
    logging.shutdown()
    os._exit(code)
