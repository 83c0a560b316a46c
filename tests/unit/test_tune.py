"""`ovserve tune`: candidates, runs in processes that crash or hang, the choice, and a stored plan that is served."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovserve.cli import tune
from ovserve.cli.commands import ExitCode
from ovserve.cli.trials import Candidate, run_one, run_rounds
from ovserve.deadline import Deadline
from ovserve.engines.devices import device_report
from ovserve.engines.protocol import Outcome, Work
from ovserve.engines.stepwise.engine import StepwiseEngine
from ovserve.fleet.desired import desired_models
from ovserve.models.plans import PLAN_FILE, Plan
from ovserve.models.profile import read_profile
from ovserve.settings.options import ModelSettings, Resolution, Settings
from ovserve.wire.local.processes import children_of
from ovserve.worker.main import create_engine
from ovserve.worker.trials import Measured, Trial, default_steps, measure, receive, send
from tests.pictures import directory_of
from tests.quantised import quantised_copy
from tests.tinymodels import copy_model, tiny_model
from tests.tunetoys import (
    CLOSES,
    CODE,
    CRASHES,
    CUTS,
    FAILS,
    HANGS,
    LEAVES,
    MEASURED,
    MEASURES,
    NONSENSE,
    STOPS,
    TOO_LONG,
    toy,
)

pytestmark = pytest.mark.engine

SD = directory_of("sd")
DEVICE = {"capabilities": ["BF16", "WINOGRAD", "FP32", "INT8"], "precision": "bf16", "quantisation_group": 32}
F32, BF16 = (Plan({"INFERENCE_PRECISION_HINT": name}) for name in ("f32", "bf16"))


TOTAL_REACHED = "the total time limit was reached"


def settings_of(directory: Path = SD, **options: Any) -> ModelSettings:
    return ModelSettings(name=str(directory), path=directory, **options)


def candidate(plan: Plan, *edits_s: float, psnr: float = 40.0, failure: str = "", steps: int = 4) -> Candidate:
    runs = [dataclasses.replace(MEASURED, edit_s=seconds, psnr=psnr, steps=steps) for seconds in edits_s]
    return Candidate(ModelSettings(), plan, "", runs, failure)


def titles(directory: Path, device: Mapping[str, Any] = DEVICE, size: str = "", **options: Any) -> list[str]:
    settings = settings_of(directory, **options)
    shape = Resolution.parse(size) if size else None
    return [each.title for each in tune.candidates_of(settings, read_profile(settings), device, shape)]


@pytest.fixture(scope="module", autouse=True)
def _tracker() -> None:
    """Start multiprocessing's own process, which stays, before `leak_guard` counts."""
    resource_tracker.ensure_running()


# --- candidates -------------------------------------------------------------------------------------------------------


def test_candidates_are_what_the_device_and_the_model_have(tmp_path: Path) -> None:
    precision, static = "INFERENCE_PRECISION_HINT=f32", "engine=genai resolution=64x64"
    assert titles(SD) == ["default", precision, static]
    assert titles(SD, {}) == ["default", static]
    assert titles(SD, engine="stepwise") == ["default", precision]
    assert titles(SD, plugin_config='{"INFERENCE_PRECISION_HINT": "bf16"}') == ["default", static]
    assert titles(SD, size="512x256") == ["default", precision, "engine=genai resolution=512x256"]  # of at most 128 px
    tiled = titles(directory_of("builtin"), size="512x256")
    assert tiled[-2:] == ["vae_tile_px=128", "engine=genai resolution=512x256"]
    assert titles(tiny_model("klein")) == ["default", precision]
    compressed, _ = quantised_copy(SD, tmp_path / "m", "unet", 8)
    groups = [f"DYNAMIC_QUANTIZATION_GROUP_SIZE={size}" for size in (0, 64, 128)]
    assert titles(compressed) == ["default", precision, *groups, static]
    assert titles(compressed, {"capabilities": ["FP32"], "precision": "f32"}) == ["default", static]


def test_tile_is_one_that_the_edit_of_a_trial_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(tiny_model("klein"))
    profile = dataclasses.replace(
        read_profile(settings), native=Resolution(1024, 1024), min_side_px=64, max_side_px=2048
    )

    def tiles(size: Resolution | None) -> list[str]:
        found = [each.title for each in tune.candidates_of(settings, profile, {}, size)]
        return [title for title in found if title.startswith("vae_tile_px")]

    assert tiles(None) == ["vae_tile_px=512"]
    assert tiles(Resolution(64, 512)) == []
    monkeypatch.setattr("ovserve.engines.protocol.LARGE_DENOISER_BYTES", 1)  # a large transformer: a small warm-up
    assert tiles(None) == ["vae_tile_px=128"]
    assert tiles(Resolution(512, 768)) == ["vae_tile_px=256"]


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "least", "best"),
    [
        ([candidate(F32, 1.0, 1.0)], 30, 1),
        ([candidate(F32, 1.0, 1.0), candidate(BF16, 0.5, 0.5)], 30, 2),
        ([candidate(F32, 1.0, 1.99)], 30, 0),  # not by MIN_GAIN in every round
        ([candidate(F32, 1.0, 1.0, psnr=20)], 30, 0),
        ([candidate(F32, 1.0, 1.0)], math.inf, 0),
        ([candidate(F32, 1.0, 1.0, psnr=math.inf)], math.inf, 1),
        ([candidate(F32, 1.0, failure="crashed")], 30, 0),
        ([candidate(F32)], 30, 0),
        ([], 30, 0),
    ],
)
def test_fastest_is_chosen_only_if_it_wins_in_every_round_and_is_alike(
    others: list[Candidate], least: float, best: int
) -> None:
    candidates = [candidate(Plan(), 2.0, 2.0, psnr=math.inf), *others]
    assert tune.choose(candidates, 4, least) is candidates[best]


def test_seconds_are_those_of_the_models_own_number_of_steps() -> None:
    assert candidate(Plan(), 2.0).seconds(24) == 2.0 + 20 * 0.5


@pytest.mark.parametrize(
    ("model", "expected"),
    [("builtin", (12, 0.7, 8)), ("sd", (50, 0.8, 41)), ("sdxl", (50, 0.5, 25))],  # PNDM runs one more
)
def test_edit_that_counts_runs_what_the_default_strength_leaves(
    model: str, expected: tuple[int, float, int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = directory_of(model)
    assert default_steps(read_profile(settings_of(directory)), 100) == expected
    monkeypatch.setattr(tune, "run_rounds", lambda candidates, *_, **__: candidates[0].runs.append(MEASURED))
    values = {"directory": [str(directory)], "device": "CPU", "engine": "auto", "plugin_config": "", "size": ""}
    values |= {"steps": 4, "edits": 1, "rounds": 1, "timeout_s": 1, "total_s": 1, "min_psnr": 30}
    tune.tune(values | {"json": False, "write": False})
    asked, strength, steps = expected
    out = capsys.readouterr().out
    assert f"fastest for an edit of {asked} steps at strength {strength}, which runs {steps}, with" in out
    assert f"{MEASURED.edit_s + (steps - MEASURED.steps) * MEASURED.step_s:.3g}" in out.splitlines()[1].split()


# --- processes --------------------------------------------------------------------------------------------------------


def run_toys(*plans: Plan, rounds: int = 1, timeout_s: float = 30.0, total_s: float = 60.0) -> list[Candidate]:
    candidates = [Candidate(ModelSettings(), plan) for plan in plans]
    trial = Trial(ModelSettings(), Plan(), None, 4, 1)
    lines: list[str] = []
    run_rounds(
        candidates,
        trial,
        rounds=rounds,
        timeout_s=timeout_s,
        total=Deadline.after(total_s),
        report=lines.append,
        run=functools.partial(run_one, target=toy),
    )
    expected = [
        f"round {number} of {rounds}, , {each.title}: 0.5 s a step"
        for number in range(1, rounds + 1)
        for each in candidates
        if len(each.runs) >= number
    ]
    assert [line for line in lines if line.endswith(" s a step")] == expected
    failed = [f"round 1 of {rounds}, , {each.title}: {each.failure}" for each in candidates if each.failure]
    others = [line for line in lines if line not in expected]
    if TOTAL_REACHED in others:
        assert others.pop() == TOTAL_REACHED
        failed = [line for line in failed if "not measured" not in line]
    assert others == failed
    return candidates


def test_crash_loses_one_candidate_and_is_reported(leak_guard: None) -> None:
    first, crashed, left, failed, last = run_toys(MEASURES, CRASHES, LEAVES, FAILS, MEASURES, rounds=2)
    assert [len(each.runs) for each in (first, crashed, left, failed, last)] == [2, 0, 0, 0, 2]
    assert crashed.failure == "its process was killed by SIGSEGV, a crash in native code"
    assert left.failure == "its process exited with code 7"
    assert failed.failure == "model: weights are missing"
    assert (first.psnr, last.psnr, last.failure) == (math.inf, math.inf, "")


def test_deadline_ends_a_candidate_that_hangs(leak_guard: None) -> None:
    first, hung, last = run_toys(MEASURES, HANGS, MEASURES, timeout_s=5.0)
    assert (hung.runs, hung.failure) == ([], "ended after 5 s, the time limit")
    assert (len(first.runs), len(last.runs)) == (1, 1)


def test_total_limit_keeps_what_was_measured(leak_guard: None) -> None:
    first, hung, last = run_toys(MEASURES, HANGS, MEASURES, total_s=5.0)
    assert (len(first.runs), first.failure) == (1, "")
    assert "time limit" in hung.failure
    assert (last.runs, last.failure) == ([], "not measured before the total time limit")


def test_run_that_the_total_limit_ends_keeps_the_rounds_before() -> None:
    results: list[Measured | str] = [MEASURED, MEASURED, MEASURED, "ended after 1 s, the time limit"]
    total = Deadline.after(3600.0)

    class Total(Deadline):
        def is_expired(self) -> bool:
            return not results

    candidates = [Candidate(ModelSettings(), plan) for plan in (MEASURES, HANGS)]
    run_rounds(
        candidates,
        Trial(ModelSettings(), Plan(), None, 4, 1),
        rounds=2,
        timeout_s=30.0,
        total=Total(total.at),
        report=lambda _line: None,
        run=lambda _trial, _limit_s: results.pop(0),
    )
    assert [(len(each.runs), each.failure) for each in candidates] == [(2, ""), (1, "")]


def test_process_that_closes_its_pipe_or_stops_while_it_sends_is_ended_at_the_deadline(leak_guard: None) -> None:
    began = time.monotonic()
    first, closed, stopped = run_toys(MEASURES, CLOSES, STOPS, timeout_s=4.0)
    assert time.monotonic() - began < 20
    assert [each.failure for each in (first, closed, stopped)] == ["", *2 * ["ended after 4 s, the time limit"]]


def test_result_that_cannot_be_read_loses_one_candidate(leak_guard: None) -> None:
    first, cut, code, nonsense, long, last = run_toys(MEASURES, CUTS, CODE, NONSENSE, TOO_LONG, MEASURES)
    assert cut.failure == "its process exited with code 9"
    for each in (code, nonsense):
        assert each.failure.startswith("its result cannot be read: ")
    assert long.failure  # it may be ended by a signal, as nothing reads the rest
    assert [len(each.runs) for each in (first, cut, code, nonsense, long, last)] == [1, 0, 0, 0, 0, 1]


class Messages(list[bytes]):
    """A pipe that holds what was sent."""

    def send_bytes(self, content: bytes, /) -> None:
        self.append(content)

    def recv_bytes(self, maxlength: int, /) -> bytes:
        if len(self[0]) > maxlength:
            raise OSError("bad message length")
        return self.pop(0)


@pytest.mark.parametrize("psnr", [math.inf, 31.5])
def test_result_is_received_as_it_was_sent(psnr: float) -> None:
    pixels, link = bytes(range(24)), Messages()
    found = dataclasses.replace(MEASURED, size=Resolution(4, 2), psnr=psnr, pixels=pixels)
    send(link, found)
    assert (receive(link), link) == (found, [])


@pytest.mark.parametrize(
    "changes",
    [
        {"size": [64]},
        {"size": [64, -64]},
        {"size": [1 << 14, 1 << 14]},
        {"size": [64, 63]},
        {"size": [64, 65]},
        {"step_s": math.nan},
        {"edit_s": math.inf},
        {"ready_s": "1"},
        {"psnr": math.nan},
        {"steps": 1.5},
        {"engine": 1},
        {"further": 1},
    ],
)
def test_changed_result_is_refused(changes: dict[str, Any]) -> None:
    link = Messages()
    send(link, MEASURED)
    link[0] = json.dumps(json.loads(link[0]) | changes).encode()
    with pytest.raises((ValueError, OSError)):
        receive(link)


def test_text_of_a_failure_is_one_printable_line() -> None:
    link = Messages()
    send(link, "red \x1b[31m\nline" + "x" * 1000)
    found = receive(link)
    assert isinstance(found, str)
    assert found.isprintable()
    assert len(found) <= 500


def test_nothing_is_measured_without_the_default_plan(leak_guard: None) -> None:
    first, last = run_toys(LEAVES, MEASURES)
    assert (first.failure, last.runs, last.failure) == ("its process exited with code 7", [], "")


# --- with the engine --------------------------------------------------------------------------------------------------


def computed_in(precision: str) -> str:
    """Return what the processor computes in for this hint: f32 without bfloat16."""
    return precision if "BF16" in device_report()["CPU"]["capabilities"] else "f32"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return copy_model(SD, tmp_path / "m", {"unet/config.json": {}})


def options_of_workers(directory: Path, plan: str) -> ModelSettings:
    """Return the options that the workers of a model in this directory get."""
    settings = settings_of(directory, plan=plan, streams=1, threads=1, max_batch=1)
    profiles = {settings.name: read_profile(settings)}
    return desired_models(Settings(models=(settings,)), profiles)[settings.name].model_of_workers


@pytest.fixture
def signals() -> Iterator[None]:
    """Restore the handlers that the command replaces."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_table_has_the_default_plan_with_the_same_bits_and_others_with_their_likeness(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, leak_guard: None
) -> None:
    monkeypatch.setattr(tune, "_report_of", lambda _device: {"capabilities": ["FP32", "BF16"], "precision": ""})
    arguments = [str(model), "--engine", "stepwise", "--rounds", "2", "--edits", "1", "--steps", "2", "--json"]
    assert tune.run(arguments) == ExitCode.OK
    default, *others = json.loads(capsys.readouterr().out)
    assert (default["plan"], default["same_bits"], default["failure"]) == ("default", True, "")
    assert default["size"] == "64x64"
    assert min(default[name] for name in ("step_s", "edit_s", "ready_s", "memory_bytes")) > 0
    assert [other["plan"] for other in others] == [f"INFERENCE_PRECISION_HINT={name}" for name in ("f32", "bf16")]
    assert [other["precision"] for other in others] == ["f32", computed_in("bf16")]
    for other in others:
        assert other["same_bits"] == (other["precision"] == default["precision"])
        assert other["same_bits"] or 20 < other["psnr_db"] < 80


@pytest.mark.usefixtures("signals")
def test_written_plan_is_what_the_engine_compiles(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = {"capabilities": ["FP32"], "precision": "bf16"}
    monkeypatch.setattr(tune, "_report_of", lambda _device: device)
    monkeypatch.setattr(tune, "MIN_GAIN", 1e-9)  # any other plan is fast enough
    arguments = [
        str(model),
        "--engine",
        "stepwise",
        "--rounds",
        "1",
        "--edits",
        "1",
        "--steps",
        "2",
        "--write",
        "--json",
    ]
    assert tune.run(arguments) == ExitCode.OK
    out, err = capsys.readouterr()
    assert f"stored in {model / PLAN_FILE}; serve it with --plan measured" in err
    assert [entry["plan"] for entry in json.loads(out)] == ["default", "INFERENCE_PRECISION_HINT=f32"]
    assert options_of_workers(model, "exact").plugin_config == ""
    served = options_of_workers(model, "measured")
    assert json.loads(served.plugin_config) == {"INFERENCE_PRECISION_HINT": "f32"}
    engine, _ = create_engine(read_profile(served), served)
    assert isinstance(engine, StepwiseEngine)
    engine.load(lambda _phase: None)
    assert engine.precision == "f32"
    engine.close()


@pytest.mark.usefixtures("signals")
def test_plan_that_cannot_be_stored_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tune, "run_rounds", lambda candidates, *_, **__: candidates[0].runs.append(MEASURED))
    model = copy_model(SD, tmp_path / "m", {})
    (model / PLAN_FILE).mkdir()
    assert tune.run([str(model), "--write"]) == ExitCode.USAGE
    assert "the plan cannot be stored" in capsys.readouterr().err


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("stderr", [Closed(), None])
def test_result_is_printed_though_standard_error_is_closed(
    stderr: io.StringIO | None, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounds(candidates: list[Candidate], *_: object, report: Callable[[str], None], **__: object) -> None:
        report("round 1 of 1")
        candidates[0].runs.append(MEASURED)

    monkeypatch.setattr(tune, "run_rounds", rounds)
    monkeypatch.setattr("sys.stderr", stderr)
    assert tune.run([str(model), "--json", "--write"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)[0]["plan"] == "default"
    assert (model / PLAN_FILE).exists()


def test_trial_reports_what_the_denoiser_computes_in() -> None:
    settings = settings_of(streams=1, threads=1, max_batch=1)
    size = Resolution(64, 128)
    f32, bf16 = (measure(Trial(settings, plan, size, 3, 2)) for plan in (F32, BF16))
    assert (f32.precision, bf16.precision) == ("f32", computed_in("bf16"))
    assert (f32.pixels == bf16.pixels) is (bf16.precision == "f32")  # the property is not only reported
    for found in (f32, bf16):
        assert (found.engine, found.psnr, found.size) == ("stepwise", math.inf, size)
        assert len(found.pixels) == 64 * 128 * 3
    assert logging.root.manager.disable == logging.NOTSET


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_trial_runs_steps_enough_to_be_timed(steps: int) -> None:
    settings = settings_of(directory_of("builtin"), streams=1, threads=1, max_batch=1)
    found = measure(Trial(settings, Plan(), Resolution(64, 64), steps, 1))
    assert found.steps == max(3, math.floor(steps * 0.7))  # its default strength
    assert found.step_s * (found.steps - 1) < found.edit_s


class SlowFirst:
    """An engine whose first edit takes 100 s of its own clock, and others 3 s, one for each step."""

    name, precision = "slow", "f32"

    def __init__(self) -> None:
        self.now_s = 0.0
        self.admitted: list[Work] = []

    def monotonic(self) -> float:
        return self.now_s

    def load(self, beat: object) -> None:
        self.now_s += 10

    def close(self) -> None:
        pass

    def admit(self, work: Work) -> None:
        self.admitted.append(work)

    def turn(self) -> list[Outcome]:
        work, number = self.admitted[-1], len(self.admitted)
        for step in range(3):
            self.now_s += 1 if number > 1 else 100 / 3
            assert work.on_step is not None
            work.on_step(step, 3)
        return [Outcome(work, np.full((work.height, work.width, 3), number, np.uint8))]


def test_first_edit_makes_the_picture_and_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SlowFirst()
    monkeypatch.setattr("ovserve.worker.trials.create_engine", lambda *_: (engine, None))
    monkeypatch.setattr("ovserve.worker.trials.time", engine)
    found = measure(Trial(settings_of(), Plan(), Resolution(64, 64), 4, 1))
    assert (found.ready_s, found.edit_s, found.step_s, len(engine.admitted)) == (10, 3, 1, 2)
    assert set(found.pixels) == {1}


# --- wrong command lines ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "0"], "--rounds=0: expected 1 to 20"),
        (["--timeout_s", "nan"], "--timeout_s=nan: expected"),
        (["--size", "big"], "--size=big: expected WxH"),
        (["--plugin_config", "[1]"], "--plugin_config=[1]: expected a JSON object"),
        (["--plugin_config", "{"], "--plugin_config={: expected a JSON object"),
        (["/nowhere"], "/nowhere: no such directory"),
        ([str(SD), str(directory_of("sdxl"))], "is another model than"),
        (["--device", "GPU.7"], "device GPU.7 does not exist"),
    ],
)
@pytest.mark.usefixtures("signals")
def test_wrong_command_line_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "run_rounds", lambda *_, **__: pytest.fail("measured"))
    try:
        code = tune.run(arguments)
    except SystemExit as end:
        code = int(str(end.code))
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (ExitCode.USAGE, "", 1)
    assert words in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_the_command_and_the_process_of_its_run(model: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "ovserve", "tune", str(model)]
    deadline = Deadline.after(60)
    with subprocess.Popen(command) as process:
        while len(children := children_of(process.pid)) < 2:  # multiprocessing's own process, and the run
            assert not deadline.is_expired()
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(60) == ExitCode.CANCELLED
    while left := [pid for pid in children if Path(f"/proc/{pid}").exists()]:
        assert not deadline.is_expired(), left
        time.sleep(0.01)


def test_process_of_a_run_ends_with_a_command_that_is_killed() -> None:
    code = (
        "from ovserve.cli.trials import run_one; from tests.tunetoys import HANGS, toy\n"
        "from ovserve.worker.trials import ModelSettings, Trial\n"
        "run_one(Trial(ModelSettings(), HANGS, None, 4, 1), 60, toy)"
    )
    deadline = Deadline.after(30)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"hangs\n"
        children = children_of(process.pid)
        process.kill()
    try:
        while left := [pid for pid in children if Path(f"/proc/{pid}").exists()]:
            assert not deadline.is_expired(), left
            time.sleep(0.01)
    finally:
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
