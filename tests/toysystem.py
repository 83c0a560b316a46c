"""Dispatcher and supervisor with toy workers: real processes, links and segments, but no HTTP and no model."""

from __future__ import annotations

import itertools
import json
import select
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ovserve.deadline import Deadline
from ovserve.dispatch.dispatcher import Dispatcher
from ovserve.dispatch.jobs import Client, Job, JobEvent, State
from ovserve.errors import ApiError
from ovserve.fleet.supervisor import Supervisor
from ovserve.models.profile import ModelProfile
from ovserve.settings.options import ModelSettings, Settings
from ovserve.wire.local.launcher import LocalLauncher
from ovserve.wire.local.spool import Spool
from ovserve.wire.request import ImageRequest
from tests import toys

PATIENCE_S = 20.0  # a wait that takes longer fails the test
_QUICK: dict[str, Any] = {"restart_delay_s": 0.02, "max_restart_delay_s": 1.0, "terminate_timeout_s": 2.0}


@dataclass(frozen=True)
class Answer:
    """The outcome of a job: its final state, its error, the bytes of its pictures, and its events."""

    state: State
    error: ApiError | None
    pictures: list[bytes]
    attempts: int
    events: list[JobEvent]


def toy_model(
    name: str = "toy", replicas: int = 1, queue_limit: int = 64, memory: int = 0, **plugin_config: Any
) -> ModelSettings:
    """Return the settings of a model with toy workers; `plugin_config` sets how they load (tests.toys)."""
    return ModelSettings(
        name=name,
        replicas=replicas,
        queue_limit=queue_limit,
        memory_limit_bytes=memory,
        plugin_config=json.dumps(plugin_config),
    )


class ToySystem:
    """`with ToySystem(tmp_path, toy_model()) as system: system.ask("echo hello")`; options are those of Settings."""

    def __init__(self, directory: Path, *models: ModelSettings, wait: bool = True, **options: Any) -> None:
        self.settings = Settings(models=models or (toy_model(),), **{**_QUICK, **options})
        self.spool = Spool(directory, 64 << 20)
        self.dispatcher = Dispatcher(self.spool, self.settings)
        self.serving: list[ModelSettings] = []  # models whose new workers took over, in order
        launcher = LocalLauncher(toys.worker_main, self.spool.worker_blobs())
        self.supervisor = Supervisor(
            self.settings, profiles(self.settings), self.dispatcher, launcher, self._note_serving
        )
        self._ids = itertools.count()
        self.supervisor.start()
        if wait:
            assert self.supervisor.wait_ready(Deadline.after(PATIENCE_S))
            self.until(lambda: all(self.ready(model.name) == model.replicas for model in self.settings.models))

    def job(self, prompt: str, client: str = "c", timeout_s: float = 60.0, model: str = "", **known: Any) -> Job:
        """Admit a job and return it; the caller closes it. Raises what admission raises."""
        request = ImageRequest(task="edit", prompt=prompt, **known)
        name = model or self.settings.models[0].name
        job = Job(f"job-{next(self._ids)}", name, Client(client), request, Deadline.after(timeout_s))
        try:
            self.dispatcher.admit(job)
        except ApiError:
            job.close()
            raise
        return job

    def ask(self, prompt: str, **known: Any) -> Answer:
        """Admit a job and wait until it is settled. Raises what admission raises."""
        return finish(self.job(prompt, **known))

    def ask_all(self, prompts: Sequence[str], **known: Any) -> list[Answer]:
        """Admit several jobs, then wait until all are settled."""
        jobs = [self.job(prompt, **known) for prompt in prompts]
        return [finish(job) for job in jobs]

    def ready(self, model: str = "toy") -> int:
        """Return the number of ready workers of a model."""
        return self.dispatcher.status(model).workers

    def pids(self, model: str = "toy") -> list[int]:
        """Return the process ids of a model's workers."""
        return [pid for name, pid in self.supervisor.worker_pids().items() if name.startswith(model + "/")]

    def until(self, is_so: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
        """Poll until a condition is true that no descriptor signals. Raises AssertionError after `patience_s`."""
        deadline = Deadline.after(patience_s)
        pause = threading.Event()
        while not is_so():
            assert not deadline.is_expired(), f"still not true after {patience_s:g} s: {self.supervisor.status()}"
            pause.wait(0.01)

    def reload(self, *models: ModelSettings, **options: Any) -> None:
        """Reload with other models; options are those of Settings."""
        settings = Settings(models=models, **{**_QUICK, **options})
        self.supervisor.reload(settings, profiles(settings))

    def _note_serving(self, _: ModelProfile, model: ModelSettings) -> None:
        self.serving.append(model)

    def stop(self, grace_s: float = 10.0) -> None:
        """Stop in the order of the server: drain, stop the workers, close the dispatcher."""
        self.dispatcher.drain()
        self.supervisor.stop(Deadline.after(grace_s))
        self.dispatcher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        left = self.supervisor.worker_pids()
        used = self.spool.used_bytes
        self.spool.close()
        if kind is None:
            assert left == {}
            assert used == 0


def profiles(settings: Settings) -> dict[str, Any]:
    """Return a toy profile for each model, by name."""
    return {model.name: toys.toy_profile(model.name) for model in settings.models}


def finish(job: Job, patience_s: float = 60.0) -> Answer:
    """Wait until a job is settled, as a handler does; close it and return its outcome."""
    deadline = Deadline.after(patience_s)
    events: list[JobEvent] = []
    while not job.is_settled:
        assert select.select([job.wakeup], [], [], deadline.remaining())[0], f"{job.id} was never settled"
        events += job.take_events()
    events += job.take_events()
    pictures = [bytes(result.segment.view[: result.size]) for _, result in sorted(job.results.items())]
    answer = Answer(job.state, job.error, pictures, job.attempts, events)
    job.close()
    return answer
