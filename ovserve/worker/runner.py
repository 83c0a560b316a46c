"""The worker's desk: the jobs it holds, on their way from the link through the device and back.

    main thread      reads commands ──Run──▶ prepare thread      decode, orient, fit, mask, count tokens ──Prepared──▶
                                                  │ works
                                             device thread       the device loop: admit, turn, beat
                                                  │ outcomes
                     Grant ─────────────────▶ finish thread       paste back, encode ──Need──▶ ◀──Grant─ fill ──Picture──▶  (`finish`)

Laws of this file:
- A job that came in goes out in exactly one Done or Failed, when the worker has let go of it: nothing of it is on the device or
  in a queue any more. That holds for a cancelled job too; the front end counts on it to fill the place.
- What goes wrong with one job ends that job. What goes wrong with a thread ends the process: the supervisor starts another.
- End-of-file on the link means that the front end is dead: the process ends at once, whatever it is doing.
- Every queue is bounded: jobs by the capacity reported as ready, outcomes by `finish.FINISH_LIMIT`, encoded pictures by the jobs held.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ovserve.deadline import Deadline
from ovserve.engines.protocol import Engine, Preview, Work
from ovserve.errors import ApiError, DeadlineExceeded, InternalError, LinkClosed, LinkGarbage, ModelError
from ovserve.logs import fields
from ovserve.models.profile import ModelProfile
from ovserve.settings.options import ModelSettings, Settings
from ovserve.wire.local.pipes import MAX_CAPACITY, WorkerEnd
from ovserve.wire.messages import Cancel, Done, Grant, Heartbeat, Message, Progress, Ready, Run, Stop
from ovserve.wire.request import ImageRequest
from ovserve.worker.finish import Finisher, WorkerJob
from ovserve.worker.loop import DeviceLoop
from ovserve.worker.prepare import prepare
from ovserve.worker.reports import SHORT_TEXT_CHARS, ReportSender, end_process

__all__ = ["BROKEN", "LOAD_FAILED", "JobRunner"]

LOAD_FAILED = 3  # exit code: the model cannot be loaded; the reason went out as a Failed without a job
BROKEN = 4  # exit code: a thread of the worker has failed, or the link carries no messages
_SPARE_JOBS = 2  # beside those in the engine: one prepared and one being finished, so that the device never waits

CreateEngine = Callable[[ModelProfile, ModelSettings], tuple[Engine, str]]

log = logging.getLogger(__name__)


class JobRunner:
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
        self._held: dict[str, WorkerJob] = {}
        self._is_stopping = False
        self._to_prepare: queue.SimpleQueue[WorkerJob] = queue.SimpleQueue()
        self._prepare_since: float | None = None  # since when the prepare thread has been at one job
        self._replies = ReportSender(end)
        self._finish = Finisher(self, self._replies)
        self._engine: Engine | None = None
        self._loop: DeviceLoop | None = None

    # --- main thread --------------------------------------------------------------------------------------------------

    def run(self) -> NoReturn:
        """Start the threads, then read commands until the process ends."""
        for name, target in (
            ("prepare", self._prepare_loop),
            ("finish", self._finish.run),
            ("device", self._device_thread),
        ):
            threading.Thread(target=_or_exit, args=(target,), name=name, daemon=True).start()
        while True:
            try:
                self._obey(self._end.receive())
            except LinkClosed:
                end_process(0)
            except LinkGarbage:
                log.exception("the link carries no messages")
                end_process(BROKEN)

    def _obey(self, message: Message) -> None:
        if isinstance(message, Run):
            held = WorkerJob(message.job, message, Deadline.after(message.timeout_s))
            with self._lock:
                self._held[message.job] = held
            self._to_prepare.put(held)
        elif isinstance(message, Cancel):
            found = self.find(message.job)
            if found is not None:
                self.fail(found, InternalError("the job was cancelled"))
        elif isinstance(message, Grant):
            self._finish.room(message)
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
            end_process(0)  # told to stop while loading: nothing is held
        self._loop.stop()

    # --- what becomes of a job ----------------------------------------------------------------------------------------

    def find(self, job: str) -> WorkerJob | None:
        """The job, unless it has ended. Thread-safe."""
        with self._lock:
            return self._held.get(job)

    def fail(self, held: WorkerJob, error: ApiError) -> None:
        """The job ends with this error as soon as everything has let go of it. Thread-safe; the first error counts."""
        with self._lock:
            if held.error is None:
                held.error = error
        held.stopped.set()
        if self._loop is not None:
            self._loop.wake()
        self.settle(held)

    def settle(self, held: WorkerJob, *, returned: int = 0) -> None:
        """So many more of its outcomes are dealt with; report the end of a job if it has come.

        Thread-safe; exactly one report for each job.
        """
        with self._lock:
            held.returned += returned
            if held.job not in self._held or held.is_preparing or held.returned < held.given:
                return
            if held.error is None and (held.edit is None or held.filled < held.edit.request.n):
                return
            del self._held[held.job]
        if held.error is None:
            self._replies.send(Done(held.job, held.prepare_ms, held.denoise_ms, held.finish_ms))
        else:
            self._replies.failed(held.job, held.error)
        self._end_if_drained()

    def _is_wanted(self, work: Work) -> bool:
        if work.cancelled.is_set():
            return False
        held = self.find(work.job)
        if held is None or not held.deadline.is_expired():
            return held is not None
        self._expire(held)
        return False

    def _expire(self, held: WorkerJob) -> None:
        # Not _fail: this is called by the device loop with its own lock held, and the outcomes to come settle the job.
        with self._lock:
            held.error = held.error or DeadlineExceeded("the job's deadline passed while it was on the device")
        held.stopped.set()

    # --- prepare thread -----------------------------------------------------------------------------------------------

    def _prepare_loop(self) -> None:
        while True:
            held = self._to_prepare.get()
            self._prepare_since = time.monotonic()
            try:
                self._prepare(held)
            except ApiError as error:
                self._end_preparing(held, error)
            except FileNotFoundError:
                self._end_preparing(held, InternalError("the exchange has ended"))
            except LinkClosed:
                end_process(0)
            except Exception as error:  # one job's trouble, MemoryError included, is not the worker's
                log.exception("prepare failed", extra=fields(job=held.job))
                self._end_preparing(held, InternalError(f"the request could not be prepared: {type(error).__name__}"))
            finally:
                self._prepare_since = None

    def _end_preparing(self, held: WorkerJob, error: ApiError) -> None:
        held.is_preparing = False
        self.fail(held, error)

    def _prepare(self, held: WorkerJob) -> None:
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
        self._replies.prepared(held.job, edit)
        with self._lock:
            held.edit, held.given, held.is_preparing = edit, request.n, False
        self._loop.add(works)

    def _follow(self, held: WorkerJob, request: ImageRequest, work: Work) -> Work:
        """Tie a piece of work to its job: progress, previews, deadline and cancellation."""

        def on_step(step: int, steps: int) -> None:
            if held.deadline.is_expired():
                self._expire(held)
            elif request.progress and not held.stopped.is_set():
                self._replies.send(Progress(held.job, work.picture, step, steps))

        def on_preview(preview: Preview) -> None:
            self._finish.preview(work, preview)

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
        self._replies.send(Ready(capacity, engine.name, why[:SHORT_TEXT_CHARS], dict(engine.tuned)))
        loop.run()
        engine.close()
        end_process(0)

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
        loop = DeviceLoop(engine, self._beat, self._finish.deliver, self._is_wanted, self._settings.hang_limit_s)
        loop.load()
        return loop

    def _give_up(self, error: Exception) -> NoReturn:
        """Tell why the model cannot be loaded, then end."""
        reason = _reason_of(error)
        if not isinstance(error, ModelError):
            log.error("loading failed", exc_info=error)
            reason = f"model {self._profile.name}: {reason}"
        self._replies.failed("", InternalError(reason))
        end_process(LOAD_FAILED)

    def _beat(self, phase: str, allow_s: float) -> None:
        """Called by the device loop. A thread that is stuck in one picture silences the beats: only a restart frees it."""
        now = time.monotonic()
        for name, since in (("prepare", self._prepare_since), ("finish", self._finish.busy_since)):
            if since is not None and now - since > self._settings.hang_limit_s:
                log.error("thread is stuck: no more beats", extra=fields(thread=name, seconds=round(now - since)))
                return
        self._replies.send(Heartbeat(phase, allow_s))


def _reason_of(error: Exception) -> str:
    return str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"


def _or_exit(target: Callable[[], None]) -> None:
    """Run a thread's function; a thread that fails takes the process with it, for the jobs it holds would wait for ever."""
    try:
        target()
    except BaseException:
        log.exception("a worker thread failed")
        end_process(BROKEN)
