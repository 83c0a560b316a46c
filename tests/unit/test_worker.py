"""The worker: a real process and link, with the real engine on the built-in model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovserve.engines.genai import GenaiEngine
from ovserve.engines.protocol import Engine
from ovserve.errors import LinkClosed, ModelError
from ovserve.models.profile import ModelProfile, builtin_directory, read_profile
from ovserve.settings.options import ModelSettings, Settings
from ovserve.settings.worker import WorkerSettings
from ovserve.wire.local.processes import resident_bytes
from ovserve.wire.messages import Done, Failed, Need, Picture, Prepared, Progress, Ready, Stop
from ovserve.worker.main import create_engine
from ovserve.worker.main import main as worker_main
from ovserve.worker.runner import LOAD_FAILED, JobRunner
from tests.live import BUILTIN_PATH
from tests.reader import Figure, draw_scene, read_picture
from tests.workerbench import WorkerBench, pixels_of, png

pytestmark = pytest.mark.engine

CIRCLE = draw_scene("blue", [Figure("red", "circle", 64, 64, 34)])
MIDDLE = np.zeros((128, 128), np.uint8)
MIDDLE[24:104, 24:104] = 255
GREEN = "a green circle on a blue background"
MANY_STEPS = 900  # seconds of work for the built-in model


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerBench]:
    with WorkerBench(tmp_path_factory.mktemp("spool")) as worker:
        worker.ready()
        yield worker


@pytest.fixture
def own_bench(tmp_path: Path) -> Iterator[WorkerBench]:
    """A worker that the test may end."""
    with WorkerBench(tmp_path) as worker:
        worker.ready()
        yield worker


def wait_for_exit(worker: WorkerBench) -> int | None:
    """Read until the link is closed; return the worker's exit code."""
    with pytest.raises(LinkClosed):
        worker.until(lambda: False)
    worker.process.join(20)
    return worker.process.exitcode


# --- readiness --------------------------------------------------------------------------------------------------------


def test_ready_follows_a_warm_up_pass_and_reports_spare_capacity(bench: WorkerBench) -> None:
    ready = bench.ready()
    assert ready.engine == "genai"
    assert ready.why == "configured"
    assert ready.capacity == 3
    phases = [heartbeat.phase for heartbeat in bench.heartbeats]
    assert "load" in phases
    assert "warm-up" in phases


def test_worker_has_lower_priority_than_the_front_end(bench: WorkerBench) -> None:
    assert bench.process.pid is not None
    expected = min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)  # 19 is the lowest priority there is
    assert os.getpriority(os.PRIO_PROCESS, bench.process.pid) == expected


def test_heartbeats_are_sent_while_idle(bench: WorkerBench) -> None:
    before = len(bench.heartbeats)
    bench.until(lambda: [heartbeat.phase for heartbeat in bench.heartbeats[before:]].count("idle") >= 2)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_edit_follows_the_prompt(bench: WorkerBench) -> None:
    [data] = bench.make(prompt=GREEN, images=(bench.image(CIRCLE),), seed=1)
    scene = read_picture(pixels_of(data))
    assert scene.background == "blue"
    assert [found.colour for found in scene.objects] == ["green"]


def test_masked_edit_paints_inside_and_keeps_the_rest_bit_for_bit(bench: WorkerBench) -> None:
    [data] = bench.make(prompt=GREEN, images=(bench.image(CIRCLE),), mask=bench.image(MIDDLE), seed=1)
    result = pixels_of(data)
    assert np.array_equal(result[MIDDLE == 0], CIRCLE[MIDDLE == 0])
    assert [found.colour for found in read_picture(result).objects] == ["green"]


def test_generation_follows_the_prompt(bench: WorkerBench) -> None:
    [data] = bench.make(task="generation", prompt="a yellow star on a purple background", seed=1)
    scene = read_picture(pixels_of(data))
    assert scene.background == "purple"
    assert [found.colour for found in scene.objects] == ["yellow"]


def test_equal_seeds_give_equal_bytes_and_other_seeds_other_bytes(bench: WorkerBench) -> None:
    image = bench.image(CIRCLE)
    first, second, other = (bench.make(prompt=GREEN, images=(image,), seed=seed)[0] for seed in (5, 5, 6))
    assert first == second
    assert first != other


def test_each_of_four_pictures_can_be_reproduced_alone(bench: WorkerBench) -> None:
    values = {"prompt": GREEN, "images": (bench.image(CIRCLE),), "mask": bench.image(MIDDLE)}
    job = bench.start(n=4, seed=2**32 - 2, **values)
    assert isinstance(bench.end(job), Done)
    seeds = {picture.picture: picture.seed for picture in bench.of(job, Picture)}
    assert seeds == {0: 2**32 - 2, 1: 2**32 - 1, 2: 0, 3: 1}
    together = [bench.pictures[job, k, -1] for k in range(4)]
    assert len(set(together)) == 4
    for k, data in enumerate(together):
        assert bench.make(seed=seeds[k], **values) == [data]


def test_result_has_the_requested_size_and_format(bench: WorkerBench) -> None:
    image = bench.image(CIRCLE)
    for form, magic in (("png", b"\x89PNG"), ("jpeg", b"\xff\xd8\xff"), ("webp", b"RIFF")):
        [data] = bench.make(images=(image,), width=200, height=96, output_format=form)
        assert data.startswith(magic)
        assert pixels_of(data).shape == (96, 200, 3)


def test_scheduler_of_a_request_applies_to_its_job_only(bench: WorkerBench) -> None:
    image = bench.image(CIRCLE)
    before, other, after = (
        bench.make(prompt=GREEN, images=(image,), seed=3, scheduler=name, metadata=False)[0]
        for name in ("", "euler_ancestral", "ddim")
    )
    assert before == after
    assert before != other


# --- the order of reports ---------------------------------------------------------------------------------------------


def test_reports_of_a_job_come_in_order(bench: WorkerBench) -> None:
    job = bench.start(prompt=GREEN, images=(bench.image(CIRCLE),), n=2, progress=True)
    done = bench.end(job)
    assert isinstance(done, Done)
    reports = bench.of(job, Prepared, Progress, Need, Picture, Done)
    prepared = reports[0]
    assert isinstance(prepared, Prepared)
    assert (prepared.mode, prepared.width, prepared.height, prepared.steps) == ("image2image", 128, 128, 8)
    assert prepared.text_tokens == 2 + len(GREEN.split())
    steps = [message for message in reports if isinstance(message, Progress) and message.picture == 0]
    assert [message.step for message in steps] == sorted(message.step for message in steps)
    assert {message.steps for message in steps} == {8}
    assert sum(isinstance(message, Picture) for message in reports) == 2
    assert reports[-1] is done
    assert done.denoise_ms > 0
    assert done.finish_ms > 0


def test_progress_is_sent_only_on_request(bench: WorkerBench) -> None:
    job = bench.start(images=(bench.image(CIRCLE),))
    bench.end(job)
    assert not bench.of(job, Progress)


def test_strength_zero_gives_the_source_for_each_picture_and_no_progress(bench: WorkerBench) -> None:
    job = bench.start(images=(bench.image(CIRCLE),), strength=0.0, n=6, progress=True, partial_images=2)
    done = bench.end(job)
    assert isinstance(done, Done)
    assert not bench.of(job, Progress)
    found = [data for (name, _, partial), data in bench.pictures.items() if name == job and partial < 0]
    assert len(found) == 6
    assert all(np.array_equal(pixels_of(data), CIRCLE) for data in found)


def test_long_texts_are_shortened_to_fit_a_message(bench: WorkerBench) -> None:
    prompt = "\U0001f600 " * 2000
    error = bench.fail(task="generation", prompt=prompt)
    assert error["error"] == "PromptTooLong"
    job = bench.start(task="generation", prompt="猫" * 4 + " \U0001f600" * 500, truncate_prompt=True)
    assert isinstance(bench.end(job), Done)
    assert bench.of(job, Prepared)[0].revised_prompt.startswith("猫猫猫猫")
    error = bench.fail(task="generation", scheduler="\U0001f600" * 900)
    assert error["error"] == "InvalidValue"


# --- an error in one job ends that job --------------------------------------------------------------------------------


def test_damaged_image_fails_only_its_own_job(bench: WorkerBench) -> None:
    pid = bench.process.pid
    error = bench.fail(images=(bench.blob(png(CIRCLE)[:500]),))
    assert (error["error"], error["param"]) == ("ImageError", "image")
    error = bench.fail(images=(bench.image(CIRCLE),), mask=bench.blob(b"x"))
    assert (error["error"], error["param"]) == ("ImageError", "mask")
    assert bench.make(images=(bench.image(CIRCLE),))
    assert bench.process.pid == pid


def test_cancelled_job_stops_within_a_few_steps_and_fails(bench: WorkerBench) -> None:
    job = bench.start(task="generation", num_inference_steps=MANY_STEPS, progress=True)
    bench.until(lambda: len(bench.of(job, Progress)) >= 3)
    reached = bench.of(job, Progress)[-1].step
    bench.cancel(job)
    assert isinstance(bench.end(job), Failed)
    assert bench.of(job, Progress)[-1].step < reached + 100 < MANY_STEPS
    assert not bench.of(job, Picture)


def test_job_cancelled_before_its_turn_fails_at_once(bench: WorkerBench) -> None:
    running = bench.start(task="generation", num_inference_steps=MANY_STEPS, progress=True)
    waiting = bench.start(task="generation", n=4)
    bench.until(lambda: bool(bench.of(waiting, Prepared)))
    bench.cancel(waiting)
    bench.cancel(running)
    assert isinstance(bench.end(waiting), Failed)
    assert isinstance(bench.end(running), Failed)
    assert bench.make(task="generation")


def test_cancel_of_a_done_or_unknown_job_is_ignored(bench: WorkerBench) -> None:
    job = bench.start(task="generation")
    bench.end(job)
    bench.cancel(job)
    bench.cancel("unknown")
    assert bench.make(task="generation")
    assert len(bench.of(job, Done, Failed)) == 1


def test_deadline_ends_a_job_on_the_device(bench: WorkerBench) -> None:
    job = bench.start(timeout_s=0.4, task="generation", num_inference_steps=MANY_STEPS, progress=True)
    end = bench.end(job)
    assert isinstance(end, Failed)
    assert end.error["error"] == "DeadlineExceeded"
    assert bench.of(job, Progress)[-1].step < MANY_STEPS


def test_expired_job_uses_no_device_time(bench: WorkerBench) -> None:
    assert bench.fail(timeout_s=0.0, task="generation")["error"] == "DeadlineExceeded"
    running = bench.start(task="generation", num_inference_steps=MANY_STEPS, progress=True)
    late = bench.start(timeout_s=0.05, task="generation", progress=True)
    passed = time.monotonic() + 0.1
    bench.until(lambda: bool(bench.of(running, Progress)) and time.monotonic() > passed)
    bench.cancel(running)
    end = bench.end(late)
    assert isinstance(end, Failed)
    assert end.error["error"] == "DeadlineExceeded"
    assert not bench.of(late, Progress)


def test_result_without_a_segment_fails_only_its_own_job(bench: WorkerBench) -> None:
    bench.grants_segments = False
    try:
        error = bench.fail(task="generation", n=2)
    finally:
        bench.grants_segments = True
    assert error["error"] == "SpoolFull"
    assert bench.make(task="generation")


def test_job_fails_if_its_exchange_has_released_its_segments(bench: WorkerBench) -> None:
    segment = bench.spool.put(png(CIRCLE))
    blob = segment.blob(0, len(png(CIRCLE)))
    segment.release()
    assert bench.fail(images=(blob,))["error"] == "InternalError"
    assert bench.make(task="generation")


def test_concurrent_jobs_all_succeed(bench: WorkerBench) -> None:
    image = bench.image(CIRCLE)
    jobs = [bench.start(prompt=GREEN, images=(image,), seed=seed, alone=seed == 1) for seed in range(3)]
    ends = [bench.end(job) for job in jobs]
    assert all(isinstance(end, Done) for end in ends)


def test_memory_stays_flat_over_two_hundred_edits(own_bench: WorkerBench) -> None:
    image, mask = own_bench.image(CIRCLE), own_bench.image(MIDDLE)
    large = own_bench.image(np.kron(CIRCLE, np.ones((6, 8, 1), np.uint8)))
    resident = []
    for count in range(1, 201):
        values = {"num_inference_steps": 2, "strength": 1.0, "seed": count}
        kinds = {
            0: {"images": (image,)},
            1: {"images": (image,), "mask": mask},
            2: {"images": (large,)},
            3: {"task": "generation"},
        }
        own_bench.make(**kinds[count % 4], **values)
        own_bench.log.clear()
        own_bench.pictures.clear()
        if count >= 60 and count % 20 == 0:
            resident.append(resident_bytes(own_bench.process.pid or 0))
    # A leak raises the peak; the allocator only moves below it, by some MiB from sample to sample.
    assert max(resident[4:]) - max(resident[:4]) < 4 << 20, resident  # 1 MiB for each 20 edits
    assert resident[-1] - resident[0] < 64 << 20, resident


def main_with_a_clock_jump(
    link: Any, blobs: Any, profile: ModelProfile, model: ModelSettings, settings: WorkerSettings
) -> None:
    """Run a worker whose clock jumps by an hour when a file appears in the directory for compiled models."""
    monotonic, path = time.monotonic, Path(str(model.cache_dir)) / "an-hour-later"
    time.monotonic = lambda: monotonic() + (3600.0 if path.exists() else 0.0)
    worker_main(link, blobs, profile, model, settings)


def test_grant_that_comes_an_hour_late_still_completes_the_job(tmp_path: Path) -> None:
    model = ModelSettings(name="shapes", path=Path(BUILTIN_PATH), engine="genai", cache_dir=tmp_path)
    with WorkerBench(tmp_path / "spool", model, main=main_with_a_clock_jump) as worker:
        worker.ready()
        worker.answers_needs = False
        job = worker.start(task="generation", timeout_s=1e6)
        worker.until(lambda: bool(worker.of(job, Need)))
        before = len(worker.heartbeats)
        (tmp_path / "an-hour-later").touch()
        worker.until(lambda: len(worker.heartbeats) > before + 2)  # a second apart: every thread has read the clock
        worker.answer(worker.of(job, Need)[0])
        assert isinstance(worker.end(job), Done)


# --- exit -------------------------------------------------------------------------------------------------------------


def test_stop_finishes_the_jobs_and_exits_with_0(own_bench: WorkerBench) -> None:
    job = own_bench.start(task="generation", n=3)
    own_bench.link.send(Stop())
    assert isinstance(own_bench.end(job), Done)
    assert wait_for_exit(own_bench) == 0


def test_closed_link_ends_the_worker_at_once(own_bench: WorkerBench) -> None:
    job = own_bench.start(task="generation", num_inference_steps=MANY_STEPS, progress=True)
    own_bench.until(lambda: bool(own_bench.of(job, Progress)))
    own_bench.link.close()
    own_bench.process.join(5)
    assert own_bench.process.exitcode == 0


def test_invalid_message_ends_the_worker(own_bench: WorkerBench) -> None:
    os.write(own_bench.link._commands.fileno(), b'{"kind":"nonsense"}\n')
    assert wait_for_exit(own_bench) not in (0, LOAD_FAILED)


def test_killed_worker_reads_as_end_of_file(own_bench: WorkerBench) -> None:
    job = own_bench.start(task="generation", num_inference_steps=MANY_STEPS, progress=True)
    own_bench.until(lambda: bool(own_bench.of(job, Progress)))
    assert own_bench.process.pid is not None
    os.kill(own_bench.process.pid, signal.SIGKILL)
    assert wait_for_exit(own_bench) == -signal.SIGKILL


def test_stop_while_loading_ends_the_worker(tmp_path: Path) -> None:
    with WorkerBench(tmp_path) as worker:
        worker.link.send(Stop())
        assert wait_for_exit(worker) == 0


def failure_of(worker: WorkerBench) -> str:
    code = wait_for_exit(worker)
    assert code == LOAD_FAILED
    assert worker.link.state.failure is not None
    assert not any(isinstance(message, Ready) for message in worker.log)
    return str(worker.link.state.failure.error["message"])


def test_unknown_device_is_reported_before_exit(tmp_path: Path) -> None:
    with WorkerBench(
        tmp_path, ModelSettings(name="shapes", path=Path(BUILTIN_PATH), engine="genai", device="TPU")
    ) as worker:
        assert "TPU" in failure_of(worker)


def test_damaged_weights_are_reported_before_exit(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(builtin_directory(), model)
    (model / "unet" / "openvino_model.xml").write_text("no network")
    with WorkerBench(tmp_path / "spool", ModelSettings(name="broken", engine="genai", path=model)) as worker:
        assert "broken" in failure_of(worker)


# --- choice of the engine ---------------------------------------------------------------------------------------------


def test_configured_engine_is_chosen() -> None:
    model = ModelSettings(name="shapes", path=Path(BUILTIN_PATH), engine="genai")
    engine, why = create_engine(read_profile(model), model)
    assert (engine.name, why) == ("genai", "configured")


def test_genai_rejects_a_class_that_it_does_not_serve() -> None:
    import dataclasses

    model = ModelSettings(name="shapes", path=Path(BUILTIN_PATH), engine="genai")
    with pytest.raises(ModelError, match="engine genai does not serve class FluxKontextPipeline"):
        create_engine(dataclasses.replace(read_profile(model), pipeline_class="FluxKontextPipeline"), model)


def test_auto_falls_back_to_genai_and_reports_why(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(builtin_directory(), model)
    path = model / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    # Our own loop rejects an interpolation it does not implement; the library ignores the key.
    path.write_text(json.dumps({**config, "_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"}))
    with WorkerBench(tmp_path / "spool", ModelSettings(name="shapes", engine="auto", path=model)) as worker:
        ready = worker.ready()
        assert ready.engine == "genai"
        assert "stepwise" in ready.why
        assert worker.make(task="generation")


class BrokenEngine(GenaiEngine):
    """Fails to load with an unexpected exception, after it has taken its memory."""

    name = "stepwise"

    def load(self, heartbeat: Callable[[str], None]) -> None:
        heartbeat("load")
        raise KeyError("an input of another name")


def main_with_a_broken_engine(
    link: Any, blobs: Any, profile: ModelProfile, model: ModelSettings, settings: WorkerSettings
) -> None:
    created: list[weakref.ref[Engine]] = []

    def create(profile: ModelProfile, settings: ModelSettings) -> tuple[Engine, str]:
        if settings.engine == "genai":
            if created[0]() is not None:
                raise ModelError("the engine that failed is still in memory")
            return create_engine(profile, settings)
        engine = BrokenEngine(profile, settings)
        created.append(weakref.ref(engine))
        return engine, "proven"

    JobRunner(link, blobs, profile, model, settings, create_engine=create).run()


def test_fallback_to_genai_frees_the_failed_engine_first(tmp_path: Path) -> None:
    auto = ModelSettings(name="shapes", path=Path(BUILTIN_PATH), engine="auto")
    with WorkerBench(tmp_path, auto, main=main_with_a_broken_engine) as worker:
        ready = worker.ready()
        assert ready.engine == "genai"
        assert "KeyError: 'an input of another name'" in ready.why
        assert worker.make(task="generation")


def test_auto_chooses_stepwise_for_the_builtin_model(tmp_path: Path) -> None:
    with WorkerBench(
        tmp_path / "spool", ModelSettings(name="shapes", path=Path(BUILTIN_PATH), engine="auto", threads=1, streams=2)
    ) as worker:
        ready = worker.ready()
        assert ready.engine == "stepwise"
        assert (ready.tuned["threads"], ready.tuned["streams"]) == (1, 2)
        assert ready.tuned["max_batch"] >= 1
        assert worker.make(task="generation")


def test_configured_threads_are_accepted(tmp_path: Path) -> None:
    one = ModelSettings(name="shapes", path=Path(BUILTIN_PATH), engine="genai", threads=1)
    with WorkerBench(tmp_path, one, Settings(models=(one,))) as worker:
        worker.ready()
        assert worker.make(task="generation")
