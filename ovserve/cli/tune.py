"""`ovserve tune`: measure plans of a model on a device, and store the fastest one for the option `plan`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ovserve.cli.arguments import ArgumentParser, report_error, usage_error
from ovserve.cli.commands import ExitCode
from ovserve.cli.trials import Candidate, run_rounds
from ovserve.deadline import Deadline
from ovserve.errors import StartupError
from ovserve.models.classes import CLASSES
from ovserve.models.plans import GROUP_SIZE, PRECISION, Plan, write_plan
from ovserve.models.profile import ModelProfile, read_profile
from ovserve.settings.options import ModelSettings, Resolution
from ovserve.worker.trials import Trial, default_steps, edit_size

__all__ = ["candidates_of", "choose", "run", "tune"]

_DESCRIPTION = """Measure plans of a model on this machine: the precisions that the device has, groups of dynamic
quantisation for compressed weights, and a VAE in tiles. Each plan runs in a process of its own, in turns, with a fixed
edit; its picture is compared with that of the default plan. Several directories of one model, with other weight
formats, are compared with the default plan of the first. With --write, the fastest plan of each directory is stored in
it, and served with --plan measured."""
MIN_GAIN = 1.03  # another plan must be faster by this factor, because it makes other pictures
MIN_TILE_PX = 128  # the overlap of smaller tiles costs more than they save
_GROUPS = (0, 64, 128)  # 0: no dynamic quantisation
_PRECISIONS = {"FP32": "f32", "BF16": "bf16", "FP16": "f16"}  # names in OPTIMIZATION_CAPABILITIES
_COMPRESSED = re.compile(rb'element_type="(?:[iu][48]|nf4|f4e2m1|f8e4m3|f8e5m2)"')
_MIB = 1 << 20
_LIMITS = {"steps": (1, 100), "rounds": (1, 20), "edits": (1, 20), "timeout_s": (1, 86400), "total_s": (1, 86400)}


def _parser() -> ArgumentParser:
    parser = ArgumentParser("tune", _DESCRIPTION)
    parser.usage = "ovserve tune [DIRECTORY ...] [options]"
    parser.add_argument("directory", nargs="*", help="directories of a model. Default: the built-in model.")
    parser.add_argument("--device", default="CPU", help="as the option of `serve`. Default: %(default)s.")
    parser.add_argument("--engine", default="auto", choices=("auto", "genai", "stepwise"), help="default: auto")
    parser.add_argument("--plugin_config", default="", metavar="JSON", help="properties of every plan, and of serving")
    parser.add_argument("--size", default="", metavar="WxH", help="size of the edit. Default: that of a warm-up.")
    parser.add_argument(
        "--steps", type=int, default=4, metavar="N", help="steps of the edit; at least 3 run. Default: 4."
    )
    parser.add_argument(
        "--edits", type=int, default=2, metavar="N", help="timed edits in a run, after another one. Default: 2."
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of a plan. Default: %(default)s.")
    parser.add_argument("--timeout_s", type=float, default=600.0, metavar="S", help="limit of a run. Default: 600.")
    parser.add_argument("--total_s", type=float, default=3600.0, metavar="S", help="limit of all runs. Default: 3600.")
    parser.add_argument(
        "--min_psnr",
        type=float,
        default=30.0,
        metavar="DB",
        help="least likeness of a plan's picture to that of the default plan, in dB. Default: 30; inf: the same bits.",
    )
    parser.add_argument("--write", action="store_true", help="store the fastest plan in each directory")
    parser.add_argument("--json", action="store_true", help="print a JSON document")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Measure, print the table and the fastest plan; return the exit code."""
    values = _parser().parse(arguments)
    for name, (low, high) in _LIMITS.items():
        if not low <= float(str(values[name])) <= high:
            usage_error(f"--{name}={values[name]}: expected {low} to {high}")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the process of a run is ended too
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup(1)
            signal.signal(number, signal.default_int_handler)
    try:
        return tune(values)
    except KeyboardInterrupt:
        return ExitCode.CANCELLED
    except StartupError as error:
        return report_error(str(error), ExitCode.USAGE)


def tune(values: Mapping[str, Any]) -> ExitCode:
    """Do what the options say; return the exit code.

    Raises:
        StartupError: a directory is no model, or the directories are not of one model.
    """
    _check_properties(str(values["plugin_config"]))
    models = [_read(str(each), values) for each in values["directory"] or ("",)]
    profiles = [profile for _, profile in models]
    for other in profiles[1:]:
        if other.pipeline_class != profiles[0].pipeline_class or other.native != profiles[0].native:
            usage_error(f"{other.directory} is another model than {profiles[0].directory}")
    device = _report_of(str(values["device"]))
    trial = Trial(models[0][0], Plan(), _size(values["size"]), values["steps"], values["edits"])
    candidates = [each for model in models for each in candidates_of(*model, device, trial.size)]
    run_rounds(
        candidates,
        trial,
        rounds=values["rounds"],
        timeout_s=values["timeout_s"],
        total=Deadline.after(values["total_s"]),
        report=_report,
    )
    asked, strength, steps = default_steps(profiles[0], models[0][0].max_num_inference_steps)
    least = values["min_psnr"]
    if values["json"]:
        print(json.dumps(_document(candidates, steps), indent=1))
    else:
        print("\n".join(_lines(candidates, steps)))
    if not candidates[0].runs:
        return report_error(f"the default plan failed: {candidates[0].failure}", ExitCode.MODELS_FAILED)
    best = choose(candidates, steps, least)
    gain = candidates[0].seconds(steps) / best.seconds(steps)
    if not values["json"]:
        what = (
            "the default plan"
            if best is candidates[0]
            else f"{best.settings.name}, {best.title}, {gain:.2f} times as fast"
        )
        edit = f"an edit of {asked} steps at strength {strength:g}, which runs {steps}"
        print(f"fastest for {edit}, with a picture of at least {least:g} dB: {what}")
    return _write(models, candidates, steps, least, str(values["device"])) if values["write"] else ExitCode.OK


def _read(directory: str, values: Mapping[str, Any]) -> tuple[ModelSettings, ModelProfile]:
    settings = ModelSettings(
        name=directory or "builtin",
        path=Path(directory) if directory else None,
        device=values["device"],
        engine=values["engine"],
        plugin_config=values["plugin_config"],
    )
    return settings, read_profile(settings)


def _check_properties(text: str) -> None:
    with contextlib.suppress(ValueError, RecursionError):
        if not text or isinstance(json.loads(text), dict):
            return
    usage_error(f"--plugin_config={text[:100]}: expected a JSON object")


def _size(text: str) -> Resolution | None:
    try:
        return Resolution.parse(text) if text else None
    except ValueError as error:
        usage_error(f"--size={text[:100]}: {error}")


def _report_of(devices: str) -> Mapping[str, Any]:
    """Return what OpenVINO reports of the denoiser's device; nothing of a virtual one."""
    from ovserve.engines.devices import choose_device, device_report  # noqa: PLC0415 - loads OpenVINO

    report = device_report()
    names = choose_device(devices, list(report)).split()
    name = names[len(names) // 2]
    return report.get(name) or report.get(f"{name}.0") or {}


def candidates_of(
    settings: ModelSettings, profile: ModelProfile, device: Mapping[str, Any], size: Resolution | None
) -> Iterator[Candidate]:
    """Yield the candidates for one directory, the library's own plan first. Each other plan differs in one value.

    The last one has static shapes, where the model can have them.

    Args:
        settings: the options of the model.
        profile: the model.
        device: what OpenVINO reports of the device.
        size: of the edit; None: that of a warm-up.
    """
    given = json.loads(settings.plugin_config) if settings.plugin_config else {}
    plans = [Plan()]
    if PRECISION not in given:
        known = [_PRECISIONS[name] for name in device.get("capabilities", ()) if name in _PRECISIONS]
        plans += [Plan({PRECISION: name}) for name in known if name != device.get("precision")]
    graph = profile.component(profile.traits.denoiser) / "openvino_model.xml"
    if "quantisation_group" in device and GROUP_SIZE not in given and _COMPRESSED.search(graph.read_bytes()):
        plans += [Plan({GROUP_SIZE: group}) for group in _GROUPS if group != device["quantisation_group"]]
    shown, edited = size or profile.native, edit_size(profile, size)
    tile = min(edited.width, edited.height) // 2  # so that the edit is in tiles
    if profile.engine == "stepwise" and tile >= MIN_TILE_PX and settings.vae_tile_px != tile:
        plans.append(Plan({}, {"vae_tile_px": tile}))
    yield from (Candidate(settings, plan) for plan in plans)
    if profile.engine == "stepwise" and settings.engine == "auto" and _can_be_static(profile, size):
        fixed = dataclasses.replace(settings, engine="genai", resolution=(shown,))
        yield Candidate(fixed, Plan(), f"engine=genai resolution={shown}")


def _can_be_static(profile: ModelProfile, size: Resolution | None) -> bool:
    """Return whether the model can be compiled for the edit's size alone; that limits requests, so no plan has it."""
    is_known = size is not None or not profile.traits.is_transformer  # a large transformer warms up with a small one
    return is_known and "genai" in CLASSES[profile.pipeline_class].engines and not profile.traits.edits_by_reference


def choose(candidates: Sequence[Candidate], steps: int, min_psnr: float) -> Candidate:
    """Return the fastest candidate; the first one unless another was faster by MIN_GAIN in every round.

    Args:
        candidates: what was measured; the first one was.
        steps: of the edit that counts.
        min_psnr: the least likeness of its picture.
    """
    first, *others = candidates
    usable = [each for each in others if each.runs and not each.failure and each.psnr >= min_psnr]
    faster = [each for each in usable if each.is_faster(first, steps, MIN_GAIN)]
    return min(faster, key=lambda each: each.seconds(steps), default=first)


def _write(
    models: Sequence[tuple[ModelSettings, ModelProfile]],
    candidates: Sequence[Candidate],
    steps: int,
    min_psnr: float,
    device: str,
) -> ExitCode:
    """Store the fastest plan of each directory whose default plan could be measured."""
    for settings, profile in models:
        own = [each for each in candidates if each.settings is settings]
        if not own[0].runs or own[0].failure or own[0].psnr < min_psnr:
            _report(f"{settings.name}: no plan stored: its default plan failed, or makes too different a picture")
            continue
        plan = choose(own, steps, min_psnr).plan
        try:
            path = write_plan(profile.directory, profile.traits.denoiser, device, plan)
        except OSError as error:
            return report_error(f"the plan cannot be stored: {error}", ExitCode.USAGE)
        _report(f"{settings.name}: {plan} stored in {path}; serve it with --plan measured")
    return ExitCode.OK


def _report(line: str) -> None:
    """Print what is no result to standard error, if it is open: standard output may be a JSON document."""
    if sys.stderr is not None:  # else `print` writes to standard output
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


def _likeness(psnr: float) -> str:
    return "same bits" if math.isinf(psnr) else f"{psnr:.1f} dB"


def _lines(candidates: Sequence[Candidate], steps: int) -> Iterator[str]:
    rows = [("model", "plan", "computes in", "s a step", f"s, {steps} steps run", "ready in s", "MiB", "picture")]
    for each in candidates:
        head = (each.settings.name, each.title)
        if not each.runs or each.failure:
            rows.append((*head, "failed", "", "", "", "", each.failure))
            continue
        rows.append(
            (
                *head,
                each.runs[0].precision or "unknown",
                f"{each.median('step_s'):.3g}",
                f"{each.seconds(steps):.3g}",
                f"{each.median('ready_s'):.1f}",
                f"{each.median('memory_bytes') / _MIB:.0f}",
                _likeness(each.psnr),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        yield "  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1])).rstrip()
    sizes = {str(run.size) for each in candidates for run in each.runs}
    yield f"one edit at a time, {' '.join(sizes) or 'none'} px, {os.getloadavg()[0]:.1f} processes waiting or running"


def _document(candidates: Sequence[Candidate], steps: int) -> list[dict[str, Any]]:
    """Return what was measured, for scripts: null for the likeness of the same bits."""
    found: list[dict[str, Any]] = []
    for each in candidates:
        entry: dict[str, Any] = {"model": each.settings.name, "plan": each.title, "failure": each.failure}
        if each.runs:
            entry |= {name: each.median(name) for name in ("step_s", "ready_s", "memory_bytes")}
            entry |= {"edit_s": each.seconds(steps), "steps": steps, "precision": each.runs[0].precision}
            entry |= {"size": str(each.runs[0].size), "same_bits": math.isinf(each.psnr)}
            entry["psnr_db"] = None if math.isinf(each.psnr) else each.psnr
        found.append(entry)
    return found
