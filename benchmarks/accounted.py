"""Start ovserve with an account of CPU time: every process writes what its parts have used to a file, by name.

    ACCOUNT_FOLDER=DIRECTORY python -m benchmarks.accounted [arguments of ovserve]

The functions in PARTS are wrapped when this module is imported. Workers are spawned, and so they import it too. The
time of a part is the CPU time of the threads in its function, without that in other parts that it calls
(`time.thread_time`). The CPU plugin computes a call of one thread in the thread that makes it, so calls of the model
are counted as well.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino

from ovserve.cli import main as cli

__all__ = ["FOLDER_VARIABLE", "MODEL_PARTS", "WRITE_EVERY_S"]

FOLDER_VARIABLE = "ACCOUNT_FOLDER"
WRITE_EVERY_S = 0.25
# Names of the models of Stable Diffusion, by inputs that no other model has; the first that fits counts.
MODEL_INPUTS = (
    ("encoder_hidden_states", "UNet"),
    ("input_ids", "text encoder"),
    ("latent_sample", "VAE decoder"),
    ("sample", "VAE encoder"),
)
MODEL_PARTS = tuple(part for _, part in MODEL_INPUTS)
# Class and method of each part, and its name.
PARTS = (
    ("ovserve.front.handler:Connection._serve_one", "handler, rest"),
    ("ovserve.front.handler:Connection._read_head", "heads of requests"),
    ("ovserve.front.exchange:HttpExchange.read_form", "bodies: sockets, multipart parser, spool"),
    ("ovserve.api.images:Images._admit_form", "parameters and admission"),
    ("ovserve.front.handler:Connection._write", "replies: base64, JSON, sockets"),
    ("ovserve.dispatch.dispatcher:Dispatcher._run_once", "dispatcher"),
    ("ovserve.worker.runner:JobRunner._execute", "commands"),
    ("ovserve.worker.runner:JobRunner._prepare", "preparation of images"),
    ("ovserve.engines.stepwise.prompts:_Encoder.tokens", "tokenizer"),
    ("ovserve.engines.stepwise.engine:StepwiseEngine.admit", "engine: batches, guidance, scheduler"),
    ("ovserve.engines.stepwise.engine:StepwiseEngine.turn", "engine: batches, guidance, scheduler"),
    ("ovserve.engines.stepwise.slots:Slots._run", "arrays before and after calls"),
    ("ovserve.worker.prepared:PreparedRequest.assemble", "PNG"),
    ("ovserve.worker.prepared:PreparedRequest.encode", "PNG"),
    ("ovserve.worker.finish:Finisher._finish", "results to the spool"),
    ("ovserve.worker.reports:ReportSender.send", "reports to the front end"),
)


class _Account:
    """CPU seconds by part. Thread-safe: each thread has its own sums."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._sums: list[defaultdict[str, float]] = []

    def enter(self) -> list[float]:
        """Begin a part in this thread; return its frame: CPU time at its start, and that of parts inside it."""
        stack = getattr(self._local, "stack", None)
        if stack is None:
            stack = self._local.stack = []
            self._local.sums = defaultdict(float)
            self._sums.append(self._local.sums)
        frame = [time.thread_time(), 0.0]
        stack.append(frame)
        return frame

    def leave(self, part: str, frame: list[float]) -> None:
        """End a part in this thread."""
        used = time.thread_time() - frame[0]
        stack = self._local.stack
        stack.pop()
        self._local.sums[part] += used - frame[1]
        if stack:
            stack[-1][1] += used

    def totals(self) -> dict[str, float]:
        """Return the sums of all threads."""
        totals: defaultdict[str, float] = defaultdict(float)
        for sums in list(self._sums):
            for part, seconds in list(sums.items()):
                totals[part] += seconds
        return dict(totals)


_account = _Account()


def _counted(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        frame = _account.enter()
        try:
            return function(*arguments, **options)
        finally:
            _account.leave(part, frame)

    return wrapped


def _counted_infer(function: Callable[..., Any]) -> Callable[..., Any]:
    names: dict[int, str] = {}  # by the identity of the request; requests live as long as their process

    @functools.wraps(function)
    def infer(request: Any, *arguments: Any, **options: Any) -> Any:
        part = names.get(id(request))
        if part is None:
            inputs = {name for port in request.model_inputs for name in port.get_names()}
            part = next((part for name, part in MODEL_INPUTS if name in inputs), "other models")
            names[id(request)] = part
        frame = _account.enter()
        try:
            return function(request, *arguments, **options)
        finally:
            _account.leave(part, frame)

    return infer


def _write_totals(folder: Path) -> None:
    """Write this process's account again and again, until the process ends."""
    path = folder / f"{os.getpid()}.json"
    while True:
        time.sleep(WRITE_EVERY_S)
        totals = _account.totals()
        document = {"process": _kind_of(totals), "cpu_s": time.process_time(), "parts": totals}
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(document), "utf-8")
        fresh.replace(path)


def _kind_of(totals: dict[str, float]) -> str:
    if totals.keys() & set(MODEL_PARTS):
        return "worker"
    return "front end" if "dispatcher" in totals else "other processes"


def _wrap_all() -> None:
    for target, part in PARTS:
        module, _, path = target.partition(":")
        owner_name, _, method = path.partition(".")
        owner = getattr(importlib.import_module(module), owner_name)
        setattr(owner, method, _counted(getattr(owner, method), part))
    openvino.InferRequest.infer = _counted_infer(openvino.InferRequest.infer)
    folder = Path(os.environ[FOLDER_VARIABLE])
    threading.Thread(target=_write_totals, args=(folder,), name="account", daemon=True).start()


if FOLDER_VARIABLE in os.environ and __name__ in ("__main__", "__mp_main__"):
    _wrap_all()

if __name__ == "__main__":
    sys.exit(cli.main())
