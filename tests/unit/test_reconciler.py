"""Reload, scale and unload as changes of the desired state, over workers in memory: which processes change."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ovserve
from ovserve.deadline import Deadline
from ovserve.dispatch.dispatcher import Dispatcher
from ovserve.dispatch.jobs import Client, Job, State
from ovserve.errors import LaunchError, NotReady
from ovserve.fleet.desired import FRONT_END_OPTIONS
from ovserve.fleet.supervisor import Supervisor
from ovserve.models.fingerprint import fingerprint
from ovserve.models.profile import ModelProfile
from ovserve.settings.options import ModelSettings, Settings
from ovserve.settings.worker import WorkerSettings
from ovserve.wire.blobs import WorkerBlobs
from ovserve.wire.launcher import WorkerSpec
from ovserve.wire.link import WorkerLink
from ovserve.wire.memory.blobs import MemoryBlobs
from ovserve.wire.memory.launcher import MemoryLauncher, MemoryProcess
from ovserve.wire.memory.link import MemoryLink
from ovserve.wire.messages import Done, Failed, Grant, Heartbeat, Need, Picture, Prepared, Ready, Run, Stop
from ovserve.wire.request import ImageRequest
from tests.toys import toy_profile

PATIENCE_S = 10.0


def worker_main(
    link: WorkerLink, blobs: WorkerBlobs, profile: ModelProfile, model: ModelSettings, settings: WorkerSettings
) -> None:
    """Serve jobs one at a time; `plugin_config` "fail" cannot load, "hang" never becomes ready."""
    if model.plugin_config == "fail":
        link.send(Failed("", {"message": "cannot load"}))
        return
    if model.plugin_config != "hang":
        link.send(Ready(1, "memory"))
    while True:
        message = link.receive()
        if isinstance(message, Run):
            link.send(Prepared(message.job, "image2image", 8, 8, 1, 1, 1, 1))
            link.send(Need(message.job, 0, 3))
        elif isinstance(message, Grant):
            blobs.fill(message.storage, b"abc")
            link.send(Picture(message.job, 0, 1, 3))
            link.send(Done(message.job, 1.0, 1.0, 1.0))
        elif isinstance(message, Stop):
            return
        link.send(Heartbeat("idle"))


class MemorySystem:
    """Dispatcher and supervisor over workers in memory."""

    def __init__(self, *models: ModelSettings, wait: bool = True, **options: Any) -> None:
        self.blobs = MemoryBlobs()
        self.launcher = MemoryLauncher(worker_main, self.blobs)
        self.settings = self._settings(*models, **options)
        self.dispatcher = Dispatcher(self.blobs, self.settings)
        self.serving: list[ModelSettings] = []
        self.supervisor = Supervisor(
            self.settings, self._profiles(self.settings), self.dispatcher, self.launcher, self._note_serving
        )
        self.supervisor.start()
        self._ids = itertools.count()
        if wait:
            self.until(lambda: all(self.ready(model.name) == model.replicas for model in models))

    @staticmethod
    def _settings(*models: ModelSettings, **options: Any) -> Settings:
        # Workers in memory send no heartbeat while they are idle.
        return Settings(models=models, idle_hang_limit_s=3600, hang_limit_s=3600, restart_delay_s=0.01, **options)

    @staticmethod
    def _profiles(settings: Settings) -> dict[str, ModelProfile]:
        return {
            model.name: dataclasses.replace(toy_profile(model.name), directory=model.path or Path("/nowhere"))
            for model in settings.models
        }

    def _note_serving(self, _: ModelProfile, model: ModelSettings) -> None:
        self.serving.append(model)

    def reload(self, *models: ModelSettings, **options: Any) -> None:
        settings = self._settings(*models, **options)
        self.supervisor.reload(settings, self._profiles(settings))
        assert self.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))

    def workers(self) -> dict[str, int]:
        return self.supervisor.worker_pids()

    def ready(self, model: str) -> int:
        return self.dispatcher.status(model).workers

    def serve(self, model: str) -> State:
        """Run one job to its end."""
        request = ImageRequest(task="edit", prompt="x")
        job = Job(f"job-{next(self._ids)}", model, Client("c"), request, Deadline.after(60))
        try:
            self.dispatcher.admit(job)
            self.until(lambda: job.is_settled)
            return job.state
        finally:
            job.close()

    def until(self, is_so: Any) -> None:
        deadline, pause = Deadline.after(PATIENCE_S), threading.Event()
        while not is_so():
            assert not deadline.is_expired(), self.supervisor.status()
            pause.wait(0.005)

    def close(self) -> None:
        self.dispatcher.drain()
        self.supervisor.stop(Deadline.after(PATIENCE_S))
        self.dispatcher.close()
        assert self.workers() == {}
        assert self.blobs.used_bytes == 0


@pytest.fixture
def system() -> Iterator[MemorySystem]:
    made = MemorySystem(A, B)
    yield made
    made.close()


A = ModelSettings(name="a", replicas=2)
B = ModelSettings(name="b")


def test_unchanged_configuration_keeps_every_process(system: MemorySystem) -> None:
    before = system.workers()
    system.reload(A, B)
    assert system.workers() == before
    assert len(system.launcher.started) == 3
    assert system.serving == []


@pytest.mark.parametrize(
    "options",
    [
        {"api_key": "another"},
        {"max_connections": 7},
        {"restart_delay_s": 9.0},
        {"default_model": "b"},
        {"terminate_timeout_s": 1.0},
    ],
)
def test_option_that_no_worker_reads_keeps_every_process(options: dict[str, Any]) -> None:
    system = MemorySystem(A, B)
    try:
        before = system.workers()
        settings = dataclasses.replace(system.settings, **options)
        system.supervisor.reload(settings, system._profiles(settings))
        assert system.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))
        assert system.workers() == before
    finally:
        system.close()


def test_option_that_workers_read_replaces_every_process(system: MemorySystem) -> None:
    before = system.workers()
    system.reload(A, B, max_image_pixels=1000)
    system.until(lambda: len(system.workers()) == 3)
    assert not before.keys() & system.workers().keys()


def test_changed_model_replaces_its_own_processes_only(system: MemorySystem) -> None:
    before = system.workers()
    changed = dataclasses.replace(B, device="GPU")
    system.reload(A, changed)
    after = system.workers()
    assert {name for name in after if name.startswith("a/")} == {"a/0#0", "a/1#0"}
    assert after["a/0#0"] == before["a/0#0"]
    assert "b/0#0" not in after
    assert "b/0#1" in after
    assert system.serving == [changed]


def test_limits_of_a_model_change_without_new_processes(system: MemorySystem) -> None:
    before = system.workers()
    changed = dataclasses.replace(B, queue_limit=3, max_num_images_per_prompt=2, max_strength=0.9)
    system.reload(A, changed)
    assert system.workers() == before
    assert system.serving == [changed]


def outcomes(system: MemorySystem) -> dict[str, tuple[str, str]]:
    return {name: (outcome.state, outcome.reason) for name, outcome in system.supervisor.outcomes().items()}


def test_outcome_of_a_reload_is_done_when_its_workers_are_ready(system: MemorySystem) -> None:
    system.until(lambda: outcomes(system) == {"a": ("done", ""), "b": ("done", "")})
    system.reload(A, dataclasses.replace(B, device="GPU"))
    system.until(lambda: outcomes(system) == {"a": ("done", ""), "b": ("done", "")})
    system.reload(A)
    system.until(lambda: outcomes(system) == {"a": ("done", "")})


def test_outcome_is_loading_until_the_new_workers_are_ready(system: MemorySystem) -> None:
    settings = system._settings(A, dataclasses.replace(B, plugin_config="hang"))
    system.supervisor.reload(settings, system._profiles(settings))
    system.until(lambda: outcomes(system)["a"] == ("done", ""))
    assert outcomes(system)["b"] == ("loading", "")


def test_outcome_of_a_rejected_record_is_failed_with_the_reason_until_the_next_reload(system: MemorySystem) -> None:
    system.reload(A, dataclasses.replace(B, plugin_config="fail"))
    assert outcomes(system) == {"a": ("done", ""), "b": ("failed", "cannot load")}
    assert system.serve("b") is State.DONE
    system.reload(A, B)
    assert outcomes(system) == {"a": ("done", ""), "b": ("done", "")}


def test_outcome_of_a_new_model_that_cannot_load_is_failed(system: MemorySystem) -> None:
    system.reload(A, B, ModelSettings(name="c", plugin_config="fail"))
    system.until(lambda: outcomes(system).get("c") == ("failed", "cannot load"))


def test_replicas_change_by_single_processes(system: MemorySystem) -> None:
    system.reload(dataclasses.replace(A, replicas=4), B)
    system.until(lambda: system.ready("a") == 4)
    assert system.workers().keys() == {"a/0#0", "a/1#0", "a/2#0", "a/3#0", "b/0#0"}
    system.reload(dataclasses.replace(A, replicas=1), B)
    system.until(lambda: system.workers().keys() == {"a/0#0", "b/0#0"})
    assert system.serve("a") is State.DONE


def test_replaced_file_of_a_model_replaces_its_processes(tmp_path: Path) -> None:
    weights = tmp_path / "a" / "unet.bin"
    weights.parent.mkdir()
    weights.write_bytes(b"old")
    model = dataclasses.replace(A, path=weights.parent)
    system = MemorySystem(model, B)
    try:
        before = system.workers()
        system.reload(model, B)
        assert system.workers() == before
        weights.write_bytes(b"new weights")
        system.reload(model, B)
        assert system.workers().keys() == {"a/0#1", "a/1#1", "b/0#0"}
    finally:
        system.close()


def test_failed_record_is_not_tried_again_before_the_next_reload(system: MemorySystem) -> None:
    broken = dataclasses.replace(B, plugin_config="fail")
    system.reload(A, broken)
    started = len(system.launcher.started)
    assert system.workers().keys() == {"a/0#0", "a/1#0", "b/0#0"}
    assert system.serve("b") is State.DONE
    assert len(system.launcher.started) == started
    system.reload(A, broken)
    assert len(system.launcher.started) == started + 1


def test_reload_back_to_the_serving_record_ends_the_new_workers(system: MemorySystem) -> None:
    hanging = dataclasses.replace(B, plugin_config="hang")
    settings = system._settings(A, hanging)
    system.supervisor.reload(settings, system._profiles(settings))
    system.until(lambda: "b/0#1" in system.workers())
    system.reload(A, B)
    assert system.workers().keys() == {"a/0#0", "a/1#0", "b/0#0"}
    assert system.serving == []


def test_removed_model_that_returns_is_served_again(system: MemorySystem) -> None:
    system.reload(A)
    system.until(lambda: system.dispatcher.models() == ["a"])
    system.reload(A, B)
    system.until(lambda: system.ready("b") == 1)
    assert system.workers().keys() == {"a/0#0", "a/1#0", "b/0#1"}
    assert system.serve("b") is State.DONE


LAZY = dataclasses.replace(A, load="lazy", keep_alive_s=0.0)


def state(system: MemorySystem, model: str) -> str:
    return system.dispatcher.status(model).state


def test_lazy_model_has_workers_only_while_it_has_jobs() -> None:
    system = MemorySystem(LAZY, B, wait=False)
    try:
        assert system.supervisor.wait_ready(Deadline.after(PATIENCE_S))
        system.until(lambda: system.workers().keys() == {"b/0#0"})
        assert (state(system, "a"), system.dispatcher.status("a").ready) == ("unloaded", True)
        assert system.serve("a") is State.DONE
        system.until(lambda: system.workers().keys() == {"b/0#0"} and state(system, "a") == "unloaded")
        assert system.supervisor.loads()["a"] == 1
        system.until(lambda: system.supervisor.unloads() == {"a": 1, "b": 0})
    finally:
        system.close()


def test_server_of_lazy_models_is_ready_without_workers() -> None:
    system = MemorySystem(LAZY, wait=False)
    try:
        assert system.supervisor.wait_ready(Deadline.after(0))
        assert system.launcher.started == []
    finally:
        system.close()


def test_lazy_model_stays_for_its_keep_alive_time(system: MemorySystem) -> None:
    kept = dataclasses.replace(LAZY, keep_alive_s=-1.0)
    system.reload(kept, B)
    system.until(lambda: system.ready("a") == 2)  # it was loaded, and its options alone have changed
    system.reload(LAZY, B)
    system.until(lambda: system.workers().keys() == {"b/0#0"})
    assert system.serve("a") is State.DONE


def test_job_of_a_lazy_model_that_cannot_load_fails_with_the_reason(system: MemorySystem) -> None:
    system.reload(A, B, ModelSettings(name="c", load="lazy", plugin_config="fail"))
    assert system.serve("c") is State.FAILED
    assert system.dispatcher.status("c").reason == "failed: cannot load"
    assert state(system, "c") == "failed"


def test_job_expires_while_its_model_loads(system: MemorySystem) -> None:
    system.reload(A, B, ModelSettings(name="c", load="lazy", plugin_config="hang"))
    job = Job("slow", "c", Client("c"), ImageRequest(task="edit", prompt="x"), Deadline.after(0.2))
    try:
        system.dispatcher.admit(job)
        system.until(lambda: state(system, "c") == "loading")
        system.until(lambda: job.is_settled)
        assert job.state is State.EXPIRED
        assert "while its model was being loaded" in str(job.error)
        assert state(system, "c") == "loading"  # it is finished for the next request
    finally:
        job.close()


def test_eager_model_without_jobs_is_unloaded_and_loaded_again(system: MemorySystem) -> None:
    system.reload(A, dataclasses.replace(B, keep_alive_s=0.0))
    system.until(lambda: state(system, "b") == "unloaded")
    assert system.serve("b") is State.DONE
    system.until(lambda: state(system, "b") == "unloaded")


GIB = 1 << 30


def test_model_is_unloaded_to_make_room_within_the_budget() -> None:
    models = [ModelSettings(name=name, load="lazy") for name in "abc"]
    system = MemorySystem(*models, wait=False, memory_budget_bytes=2 * GIB, min_resident_s=0.0)
    try:
        for name in "abcabc":
            assert system.serve(name) is State.DONE
            assert len(system.workers()) <= 4  # expected to take 350 MiB each at first
            for process in system.launcher.started:
                process.resident = GIB * 9 // 10
            system.until(
                lambda name=name: (  # type: ignore[misc]
                    state(system, name) == "unloaded" or system.supervisor.memory()[name].used_bytes > GIB // 2
                )
            )
        assert system.supervisor.unloads() != {"a": 0, "b": 0, "c": 0}
        system.until(lambda: len(system.workers()) <= 2)
    finally:
        system.close()


def test_model_that_cannot_fit_beside_pinned_ones_is_refused() -> None:
    pinned, lazy = ModelSettings(name="a"), ModelSettings(name="b", load="lazy")
    system = MemorySystem(pinned, lazy, wait=False, memory_budget_bytes=2 * GIB)
    try:
        system.until(lambda: system.ready("a") == 1)
        system.launcher.started[0].resident = 2 * GIB - 1
        system.until(lambda: system.supervisor.memory()["a"].used_bytes > GIB)
        job = Job("refused", "b", Client("c"), ImageRequest(task="edit", prompt="x"), Deadline.after(60))
        system.dispatcher.admit(job)
        system.until(lambda: job.is_settled)
        assert isinstance(job.error, NotReady)
        assert "pinned models (a) 2048 MiB" in job.error.message
        job.close()
    finally:
        system.close()


def test_new_version_loads_in_place_when_there_is_no_memory_for_both() -> None:
    system = MemorySystem(B, wait=False, memory_budget_bytes=2 * GIB)
    try:
        system.until(lambda: system.ready("b") == 1)
        system.launcher.started[0].resident = GIB * 3 // 2
        system.until(lambda: system.supervisor.memory()["b"].used_bytes > GIB)
        changed = dataclasses.replace(B, device="GPU")
        settings = system._settings(changed, memory_budget_bytes=2 * GIB)
        system.supervisor.reload(settings, system._profiles(settings))
        assert system.serve("b") is State.DONE  # it waits for the new worker, or the old one ends it
        assert system.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))
        assert [process.name for process in system.launcher.started] == ["b/0#0", "b/0#1"]
        assert system.launcher.started[0].exit_reason() != "still running"
        assert system.workers().keys() == {"b/0#1"}
        assert system.serving == [changed]
    finally:
        system.close()


def test_version_that_cannot_load_in_place_brings_the_old_one_back() -> None:
    system = MemorySystem(B, wait=False, memory_budget_bytes=2 * GIB)
    try:
        system.until(lambda: system.ready("b") == 1)
        system.launcher.started[0].resident = GIB * 3 // 2
        system.until(lambda: system.supervisor.memory()["b"].used_bytes > GIB)
        system.reload(dataclasses.replace(B, plugin_config="fail"), memory_budget_bytes=2 * GIB)
        system.until(lambda: system.ready("b") == 1)
        assert outcomes(system)["b"] == ("failed", "cannot load")
        assert system.serve("b") is State.DONE
    finally:
        system.close()


def test_job_for_a_model_that_a_reload_adds_waits_for_it(system: MemorySystem) -> None:
    settings = system._settings(A, B, ModelSettings(name="c"))
    system.supervisor.reload(settings, system._profiles(settings))
    assert system.serve("c") is State.DONE


def test_launcher_that_cannot_start_a_worker_is_asked_again_after_a_delay(system: MemorySystem) -> None:
    start, failures = system.launcher.start, iter([LaunchError("no place left")] * 3)

    def fail_first(spec: WorkerSpec) -> tuple[MemoryProcess, MemoryLink]:
        if error := next(failures, None):
            raise error
        return start(spec)

    system.launcher.start = fail_first  # type: ignore[method-assign]
    system.reload(A, B, ModelSettings(name="c"))
    system.until(lambda: system.ready("c") == 1)
    assert next(failures, None) is None


def test_crashed_worker_is_restarted_in_its_slot(system: MemorySystem) -> None:
    system.launcher.started[0].exit("crashed")
    name = system.launcher.started[0].name
    model, _, rest = name.partition("/")
    system.until(lambda: f"{model}/{rest.partition('#')[0]}#1" in system.workers())
    system.until(lambda: system.ready("a") == 2)


# --- a fresh worker after a number of jobs


def test_worn_worker_is_replaced_without_a_moment_without_a_ready_one() -> None:
    system = MemorySystem(dataclasses.replace(B, max_jobs_per_worker=3))
    fewest = 9
    try:
        for _ in range(3):
            assert system.serve("b") is State.DONE
        while "b/0#0" in system.workers():
            fewest = min(fewest, system.ready("b"))
            assert system.serve("b") is State.DONE  # more than three jobs for one worker, but none waits for the other
        assert fewest == 1
        assert system.supervisor.restarts() == {"b": 0}
        for _ in range(3):
            assert system.serve("b") is State.DONE
        system.until(lambda: len(system.launcher.started) >= 3)
    finally:
        system.close()


def test_worn_workers_are_replaced_one_at_a_time() -> None:
    system = MemorySystem(dataclasses.replace(A, max_jobs_per_worker=1))
    start, alive = system.launcher.start, []

    def counted(spec: WorkerSpec) -> tuple[MemoryProcess, MemoryLink]:
        started = start(spec)
        alive.append(sum(process.is_alive() for process in system.launcher.started))
        return started

    system.launcher.start = counted  # type: ignore[method-assign]
    try:
        while len(system.launcher.started) < 8:
            assert system.serve("a") is State.DONE
        assert set(alive) == {3}  # with the new one, at each start
        assert system.ready("a") >= 2
    finally:
        system.close()


def test_worn_worker_serves_on_while_its_successor_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    system = MemorySystem(dataclasses.replace(B, max_jobs_per_worker=1))
    start, attempts = system.launcher.start, itertools.count()

    def fail(*_: Any) -> Any:
        next(attempts)
        raise LaunchError("no process ids left")

    try:
        monkeypatch.setattr(system.launcher, "start", fail)
        assert system.serve("b") is State.DONE
        system.until(lambda: next(attempts) > 6)
        assert system.workers().keys() == {"b/0#0"}
        assert system.serve("b") is State.DONE
        monkeypatch.setattr(system.launcher, "start", start)
        system.until(lambda: "b/0#0" not in system.workers())
        assert system.serve("b") is State.DONE
    finally:
        system.close()


def test_limit_of_jobs_applies_to_running_workers_after_a_reload(system: MemorySystem) -> None:
    assert system.serve("b") is State.DONE
    system.reload(A, dataclasses.replace(B, max_jobs_per_worker=1))
    system.until(lambda: system.workers().keys() == {"a/0#0", "a/1#0", "b/1#0"})
    assert system.serving == [dataclasses.replace(B, max_jobs_per_worker=1)]


def test_model_that_is_not_resident_gets_no_successor() -> None:
    system = MemorySystem(dataclasses.replace(B, max_jobs_per_worker=1, load="lazy", keep_alive_s=0), wait=False)
    try:
        assert system.serve("b") is State.DONE
        system.until(lambda: not system.workers())
        assert len(system.launcher.started) <= 2
    finally:
        system.close()


# --- what makes new workers necessary
# -----------------------------------------------------------------------------------


def test_workers_read_no_option_that_changes_without_new_workers() -> None:
    package = Path(ovserve.__file__).parent
    for path in [*(package / "worker").rglob("*.py"), *(package / "engines").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value).rpartition(".")[2]
                is_settings = owner in ("settings", "_settings", "model", "_model")
                assert not (is_settings and node.attr in FRONT_END_OPTIONS), f"{path.name}: {ast.unparse(node)}"


def test_front_end_options_are_options_of_a_model() -> None:
    assert {field.name for field in dataclasses.fields(ModelSettings)} >= set(FRONT_END_OPTIONS)


def test_fingerprint_changes_with_names_sizes_and_times(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    weights = tmp_path / "unet" / "model.bin"
    weights.write_bytes(b"abc")
    seen = {fingerprint(tmp_path)}
    os.utime(weights, (1, 1))
    seen.add(fingerprint(tmp_path))
    weights.write_bytes(b"abcd")
    os.utime(weights, (1, 1))
    seen.add(fingerprint(tmp_path))
    (tmp_path / "new.json").touch()
    seen.add(fingerprint(tmp_path))
    assert len(seen) == 4
    assert fingerprint(tmp_path) in seen


def test_fingerprint_ignores_hidden_files_and_the_cache(tmp_path: Path) -> None:
    (tmp_path / "model.json").touch()
    before = fingerprint(tmp_path, tmp_path / "cache")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").touch()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "compiled.blob").touch()
    assert fingerprint(tmp_path, tmp_path / "cache") == before


def test_fingerprint_of_a_missing_directory_is_empty(tmp_path: Path) -> None:
    assert fingerprint(tmp_path / "missing") == ""


def test_worker_on_a_drained_node_is_replaced_before_it_is_retired(system: MemorySystem) -> None:
    leaving = next(process for process in system.launcher.started if process.name == "b/0#0")
    leaving.leaving = True
    system.until(lambda: not leaving.is_alive())
    assert leaving.exit_reason() == "ended by itself with exit code 0"
    system.until(lambda: system.ready("b") == 1)
    assert system.serve("b") is State.DONE
    assert system.supervisor.restarts()["b"] == 0


def test_model_whose_workers_wait_for_a_place_is_not_ready(system: MemorySystem) -> None:
    system.launcher.waiting = "no node has room for it"
    for process in [each for each in system.launcher.started if each.name.startswith("a/")]:
        process.exit("its node is gone")
    system.until(lambda: system.dispatcher.status("a").reason == "no node has room for it")
    assert system.serve("b") is State.DONE
    system.launcher.waiting = ""
    for process in [each for each in system.launcher.started if each.waiting]:
        process.exit("not placed")
    system.until(lambda: system.ready("a") == 2)
    assert system.serve("a") is State.DONE
