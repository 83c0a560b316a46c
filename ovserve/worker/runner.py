"""Runs the jobs of one worker: from the link through preparation, the device and encoding, back to the link.

    main thread      reads commands ──Run──▶ prepare threads  decode, orient, fit, mask, count tokens ──Prepared──▶
                                                  │ works
                                             device thread    the device loop: admit, turn, heartbeat
                                                  │ outcomes
                     Grant ────────────────▶ finish thread    paste back, encode ──Need──▶ ◀──Grant── fill ──Picture──▶

Invariants:
- Each job ends in exactly one Done or Failed, sent when none of its work is on the device or in a queue any more. This
  holds for a cancelled job too: the front end waits for that report before it sends another job in its place.
- An error in one job ends that job. An error in a thread ends the process: the supervisor starts another.
- End-of-file on the link means that the front end is dead: the process exits at once, whatever it is doing.
- Every queue is bounded: jobs by the capacity reported in Ready and one more, their decoded pixels by
  `max_prepared_bytes`, outcomes by `finish.FINISH_LIMIT`, encoded pictures by the jobs in this worker.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from ovserve.deadline import Deadline
from ovserve.engines.protocol import Engine, Outcome, Preview, Work
from ovserve.errors import ApiError, BlobGone, DeadlineExceeded, InternalError, LinkClosed, LinkGarbage, ModelError
from ovserve.logs import LEVELS, fields, set_level
from ovserve.models.classes import CLASSES
from ovserve.models.profile import ModelProfile, served_by
from ovserve.pixels.decoder import DecodedImage, DecodeLimits, Decoder
from ovserve.pixels.images import Limits
from ovserve.settings.options import ModelSettings
from ovserve.settings.worker import WorkerSettings
from ovserve.wire.blobs import WorkerBlobs
from ovserve.wire.link import MAX_CAPACITY, WorkerLink
from ovserve.wire.messages import Cancel, Counts, Done, Grant, Heartbeat, LogLevel, Message, Progress, Ready, Run, Stop
from ovserve.wire.request import ImageRequest
from ovserve.worker.compiled_cache import CompiledCache, open_cache
from ovserve.worker.finish import Finisher
from ovserve.worker.intake import Intake
from ovserve.worker.jobs import WorkerJob
from ovserve.worker.loop import DeviceLoop
from ovserve.worker.prepare import prepare
from ovserve.worker.reports import SHORT_TEXT_CHARS, ReportSender, end_process

__all__ = ["BROKEN", "LOAD_FAILED", "JobRunner", "prepare_limits"]

LOAD_FAILED = 3  # exit code: the model cannot be loaded; the reason was sent as a Failed without a job
BROKEN = 4  # exit code: a thread of the worker has failed, or the link carried an invalid message
# Jobs whose preparation takes long leave the second thread to the others: they run beside them, and not before them.
_PREPARE_THREADS = ("prepare", "prepare-light")
COUNTS_INTERVAL_S = 1.0  # between two reports of counts while the device is busy
_SPARE_JOBS = 2  # beyond those in the engine: one prepared and one being finished, so that the device never waits

# A decoding process that has not replied within this share of the prepare threads' limit is killed: image and mask
# together, and an attempt to start the process, must not reach the limit, at which the worker itself is killed.
_DECODE_SHARE = 0.3

CreateEngine = Callable[[ModelProfile, ModelSettings], tuple[Engine, str]]
CompleteProfile = Callable[[ModelProfile], ModelProfile]
FindDeviceUse = Callable[[ModelProfile, ModelSettings], dict[str, list[int]]]

log = logging.getLogger(__name__)


class JobRunner:
    """Runs the jobs of one worker. One instance in a worker process; `run` is called by its main thread."""

    def __init__(
        self,
        link: WorkerLink,
        blobs: WorkerBlobs,
        profile: ModelProfile,
        model: ModelSettings,
        settings: WorkerSettings,
        *,
        create_engine: CreateEngine,
        complete_profile: CompleteProfile = lambda profile: profile,
        find_device_use: FindDeviceUse = lambda _profile, _model: {},
    ) -> None:
        self._find_device_use = find_device_use
        self._create_engine = create_engine
        self._complete_profile = complete_profile
        self._link = link
        self._blobs = blobs
        self._profile = profile
        self._model = model
        self._settings = settings
        self._lock = threading.Lock()
        self._jobs: dict[str, WorkerJob] = {}
        self._is_stopping = False
        self._intake = Intake(settings.max_prepared_bytes)
        # Monotonic time at which each prepare thread started its current job; None while it waits.
        self._preparing_since: dict[str, float | None] = dict.fromkeys(_PREPARE_THREADS)
        # Engines count tokens in one thread at a time; that takes milliseconds.
        self._counting = threading.Lock()
        self._reports = ReportSender(link)
        self._counts, self._counted_at = Counts(), 0.0  # the newest that were sent
        self._counts_lock = threading.Lock()  # held while they are sent: their order is part of their meaning
        self._prepare_limit_s, wall_s = prepare_limits(settings)
        limits = DecodeLimits(settings.decode_cpu_limit_s, settings.decode_memory_limit_bytes, wall_s)
        # One for each prepare thread: the decoding process of a heavy file does not keep others waiting.
        self._decoders = {name: Decoder(limits) for name in _PREPARE_THREADS}
        self._finisher = Finisher(self, self._reports, blobs)
        self._engine: Engine | None = None
        self._loop: DeviceLoop | None = None
        self._cache: CompiledCache | None = None

    def decoder_pids(self) -> list[int]:
        """Return the process ids of the decoding processes that run. Thread-safe."""
        return [decoder.pid for decoder in self._decoders.values() if decoder.pid]

    # --- main thread --------------------------------------------------------------------------------------------------

    def run(self) -> NoReturn:
        """Start the threads, then execute commands until the process ends."""
        preparing = [(name, functools.partial(self._prepare_loop, name)) for name in _PREPARE_THREADS]
        for name, target in (*preparing, ("finish", self._finisher.run), ("device", self._run_device)):
            threading.Thread(target=_exit_on_error, args=(target,), name=name, daemon=True).start()
        while True:
            try:
                self._execute(self._link.receive())
            except LinkClosed:
                end_process(0)
            except LinkGarbage:
                log.exception("invalid message on the link")
                end_process(BROKEN)

    def _execute(self, command: Message) -> None:
        if isinstance(command, Run):
            job = WorkerJob(command.job, command, Deadline.after(command.timeout_s))
            with self._lock:
                self._jobs[job.id] = job
            self._intake.put(job)
        elif isinstance(command, Cancel):
            found = self.find(command.job)
            if found is not None:
                self.fail(found, InternalError("the job was cancelled"))
        elif isinstance(command, Grant):
            self._finisher.grant(command)
        elif isinstance(command, LogLevel):
            if command.level not in LEVELS:
                raise LinkGarbage(f"{command.level!r} is no level of the log")
            set_level(command.level)
        elif isinstance(command, Stop):
            self._is_stopping = True
            self._stop_if_drained()
        else:
            raise LinkGarbage(f"a front end does not send {command.kind!r}")

    def _stop_if_drained(self) -> None:
        with self._lock:
            if not self._is_stopping or self._jobs:
                return
        if self._loop is None:
            end_process(0)  # Stop arrived while the model was loading: there are no jobs to finish
        self._loop.stop()

    # --- the end of a job ---------------------------------------------------------------------------------------------

    def find(self, job_id: str) -> WorkerJob | None:
        """Return the job, or None when it has ended. Thread-safe."""
        with self._lock:
            return self._jobs.get(job_id)

    def fail(self, job: WorkerJob, error: ApiError) -> None:
        """Fail the job; it ends as soon as no stage holds any of its work. Thread-safe; the first error counts."""
        with self._lock:
            if job.error is None:
                job.error = error
        job.stopped.set()
        self._intake.wake()
        if self._loop is not None:
            self._loop.wake()
        self.settle_if_complete(job)

    def settle_if_complete(self, job: WorkerJob, *, returned: int = 0) -> None:
        """Count `returned` more outcomes as dealt with; report the end of the job if it is complete.

        Thread-safe; each job gets exactly one report.
        """
        with self._lock:
            job.returned += returned
            if job.id not in self._jobs or job.is_preparing or job.returned < job.added:
                return
            if job.error is None and (job.prepared is None or job.filled < job.prepared.request.n):
                return
            del self._jobs[job.id]
        self._intake.release(job)
        if job.error is None:
            self._reports.send(Done(job.id, job.prepare_ms, job.denoise_ms, job.finish_ms))
        else:
            self._reports.failed(job.id, job.error)
        self._stop_if_drained()

    def _is_active(self, work: Work) -> bool:
        if work.cancelled.is_set():
            return False
        job = self.find(work.job)
        if job is None or not job.deadline.is_expired():
            return job is not None
        self._expire(job)
        return False

    def _expire(self, job: WorkerJob) -> None:
        # Not `fail`: the device loop calls this while it holds its own lock. The job's remaining outcomes settle it.
        with self._lock:
            job.error = job.error or DeadlineExceeded("the job's deadline passed while it was on the device")
        job.stopped.set()

    # --- prepare threads ----------------------------------------------------------------------------------------------

    def _prepare_loop(self, thread: str) -> None:
        while True:
            job = self._intake.take(takes_heavy=thread == _PREPARE_THREADS[0])
            self._preparing_since[thread] = time.monotonic()
            try:
                self._prepare(job, thread)
            except ApiError as error:
                self._fail_preparation(job, error)
            except BlobGone:
                self._fail_preparation(job, InternalError("the exchange has ended"))
            except LinkClosed:
                end_process(0)
            except Exception as error:  # an error of one job, MemoryError included, must not end the worker
                log.exception("prepare failed", extra=fields(job=job.id))
                reason = f"the request could not be prepared: {type(error).__name__}"
                self._fail_preparation(job, InternalError(reason))
            finally:
                self._preparing_since[thread] = None
                self._intake.end_preparation(job)
            del job  # otherwise its pixels would stay in memory until the next job arrives

    def _fail_preparation(self, job: WorkerJob, error: ApiError) -> None:
        job.is_preparing = False
        self.fail(job, error)

    def _prepare(self, job: WorkerJob, thread: str) -> None:
        if self._engine is None or self._loop is None:
            raise InternalError("a job arrived before the worker was ready")
        if job.deadline.is_expired():
            raise DeadlineExceeded("the job's deadline passed before it reached the device")
        if job.stopped.is_set():
            raise InternalError("the job was cancelled")
        started = time.monotonic()
        request = ImageRequest.from_json(self._blobs.read(job.run.request))
        decode = functools.partial(self._decode, job, thread)
        prepared = prepare(
            request,
            self._profile,
            self._model,
            self._settings,
            self._engine,
            blobs=self._blobs,
            decode=decode,
            counting=self._counting,
        )
        works = [
            self._attach_callbacks(job, request, prepared.work(job.id, k, alone=job.run.alone))
            for k in range(request.n)
        ]
        ended = time.monotonic()
        job.prepare_ms = (ended - started) * 1000
        self._reports.span(job, "prepare", started, ended)
        self._reports.prepared(job.id, prepared)
        self._intake.hold(job, prepared.pixel_bytes)
        with self._lock:
            job.prepared, job.added, job.is_preparing = prepared, request.n, False
        if prepared.unchanged is None:
            self._loop.add(works)
            return
        for work in works:  # no step runs: the device is not needed
            outcome = Outcome(work, prepared.unchanged)
            while not self._finisher.deliver(outcome, 0.0):
                pass

    def _decode(
        self, job: WorkerJob, thread: str, data: memoryview, name: str, limits: Limits, *, needs_profile: bool
    ) -> DecodedImage:
        """Decode one file of a job. Runs in: a prepare thread, with which its decoding process ends.

        A request has many files: each of them restarts the time after which the thread counts as stuck.
        """
        if job.stopped.is_set():
            raise InternalError("the job was cancelled")
        try:
            return self._decoders[thread].decode(data, name, limits, needs_profile=needs_profile, job=job.id)
        finally:
            self._preparing_since[thread] = time.monotonic()

    def _attach_callbacks(self, job: WorkerJob, request: ImageRequest, work: Work) -> Work:
        """Connect a piece of work to its job: progress, previews, deadline and cancellation.

        The callbacks do not refer to the work. It refers to them, and to its job's pixels: in a cycle, these would stay
        in memory until a run of the garbage collector, which counts objects and not bytes.
        """
        picture = work.picture

        def on_step(step: int, steps: int) -> None:
            if step == steps:
                self._finisher.announce(job.id, picture)
            if job.deadline.is_expired():
                self._expire(job)
            elif request.progress and not job.stopped.is_set():
                self._reports.send(Progress(job.id, picture, step, steps))

        def on_preview(preview: Preview) -> None:
            self._finisher.preview(job.id, picture, preview)

        def on_span(stage: str, started_at: float, ended_at: float, rows: int) -> None:
            self._reports.span(job, stage, started_at, ended_at, picture=picture, rows=rows)

        if job.run.traced:
            work.on_span = on_span
        work.cancelled = job.stopped
        work.on_step = on_step
        if work.previews:
            work.on_preview = on_preview
        return work

    # --- device thread ------------------------------------------------------------------------------------------------

    def _run_device(self) -> None:
        try:
            engine, loop, why = self._load_with_fallback()
        except Exception as error:  # noqa: BLE001 - any reason why a model does not load is reported to the operator
            self._exit_load_failed(error)
        self._engine, self._loop = engine, loop
        capacity = min(engine.capacity + _SPARE_JOBS, MAX_CAPACITY)
        schedulers = ",".join(sorted(engine.features.schedulers))
        devices = self._find_device_use(self._profile, self._model)
        self._reports.send(
            Ready(capacity, engine.name, why[:SHORT_TEXT_CHARS], dict(engine.tuned), schedulers, devices)
        )
        if self._cache is not None:
            self._cache.record()
        loop.run()
        engine.close()
        if self._cache is not None:
            self._cache.record()  # what was compiled later
        end_process(0)

    def _load_with_fallback(self) -> tuple[Engine, DeviceLoop, str]:
        """Return a loaded engine, its loop, and the reason for the choice.

        With `auto`, a model that our own loop (stepwise) cannot load is loaded with genai.
        """
        self._profile = self._complete_profile(self._profile)
        self._cache = open_cache(self._profile, self._model, self._settings, lambda: self._send_heartbeat("load", 0.0))
        self._model = dataclasses.replace(self._model, cache_dir=self._cache.folder if self._cache else None)
        engine, why = self._create_engine(self._profile, self._model)
        if self._model.engine != "auto" or engine.name == "genai":
            return engine, self._load(engine), why
        try:
            return engine, self._load(engine), why
        except Exception as error:  # an unfamiliar export can fail in any way here; the library may still read it
            if "genai" not in CLASSES[self._profile.pipeline_class].engines:
                raise
            log.warning(
                "engine %s cannot load this model, falling back to genai: %s",
                engine.name,
                error,
                exc_info=None if isinstance(error, ModelError) else error,
            )
            why = f"{engine.name} cannot load this model: {_reason_of(error)}"
        # Outside the except block: inside it, the traceback would keep the first engine's models in memory as well.
        engine.close()
        del engine
        gc.collect()
        self._profile = served_by(self._profile, "genai")
        engine, _ = self._create_engine(self._profile, dataclasses.replace(self._model, engine="genai"))
        return engine, self._load(engine), why

    def _load(self, engine: Engine) -> DeviceLoop:
        loop = DeviceLoop(
            engine, self._send_heartbeat, self._finisher.deliver, self._is_active, self._settings.hang_limit_s
        )
        loop.load()
        return loop

    def _exit_load_failed(self, error: Exception) -> NoReturn:
        """Report why the model cannot be loaded, then exit."""
        reason = _reason_of(error)
        if not isinstance(error, ModelError):
            log.error("loading failed", exc_info=error)
            reason = f"model {self._profile.name}: {reason}"
        self._reports.failed("", InternalError(reason))
        end_process(LOAD_FAILED)

    def _send_heartbeat(self, phase: str, allow_s: float) -> None:
        """Send a heartbeat, unless a prepare or finish thread is stuck in one item: only a restart ends that.

        Called by the device loop.
        """
        now = time.monotonic()
        busy = [(name, since, self._prepare_limit_s) for name, since in self._preparing_since.items()]
        for name, since, limit_s in (*busy, ("finish", self._finisher.busy_since, self._settings.hang_limit_s)):
            if since is not None and now - since > limit_s:
                log.error("thread is stuck: no more heartbeats", extra=fields(thread=name, seconds=round(now - since)))
                return
        self._reports.send(Heartbeat(phase, allow_s))
        self._send_counts(now, is_due=phase == "idle")

    def _send_counts(self, now: float, *, is_due: bool) -> None:
        """Send what the engine has counted, if that has changed and is due: when it is idle, else once a second."""
        if self._engine is None or not (is_due or now - self._counted_at >= COUNTS_INTERVAL_S):
            return
        with self._counts_lock:
            counts = self._engine.counts()
            if counts != self._counts:
                self._counts, self._counted_at = counts, now
                self._reports.send(counts)


def prepare_limits(settings: WorkerSettings) -> tuple[float, float]:
    """Return how long a prepare thread may work on one job, and the decoding process on one file, in seconds.

    A low hang limit, which is meant for the device, does not cut the CPU time that
    `decode_cpu_limit_s` allows a file.
    """
    limit_s = max(settings.hang_limit_s, settings.decode_cpu_limit_s / _DECODE_SHARE)
    return limit_s, max(limit_s * _DECODE_SHARE, settings.decode_cpu_limit_s)


def _reason_of(error: Exception) -> str:
    return str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"


def _exit_on_error(target: Callable[[], None]) -> None:
    """Run a thread's function; exit the process if it raises, because the jobs of a dead thread would never end."""
    try:
        target()
    except BaseException:
        log.exception("a worker thread failed")
        end_process(BROKEN)
