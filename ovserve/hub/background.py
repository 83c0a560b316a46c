"""Pulls for a running server, each in a process `ovserve pull` of its own, and what they report.

The server itself never talks to a hub, and never converts: a repository that is no OpenVINO export ends in an error
that names the command to run. A pull that failed for a reason that may pass is tried again after a while.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ovserve
from ovserve.hub.environment import is_offline
from ovserve.hub.pull import find_pulled
from ovserve.hub.stored import read_record
from ovserve.logs import fields
from ovserve.models.pending import PendingModel, PullState
from ovserve.settings.options import ModelSettings, Settings
from ovserve.settings.repositories import default_root

__all__ = ["Pulls"]

EX_TEMPFAIL = 75  # exit code of a pull that may succeed later
STOP_LIMIT_S = 5.0
MAX_LINE_CHARS = 65536

log = logging.getLogger(__name__)


class Pulls:
    """The pulls of one server. Thread-safe: yes.

    Args:
        variables: the environment of the pulls, with the hub's token.
        on_pulled: called in a thread of the pull when a repository is complete.
    """

    def __init__(self, variables: Mapping[str, str], on_pulled: Callable[[], None]) -> None:
        own = {name: value for name, value in variables.items() if not name.startswith("OVSERVE_")}
        package = str(Path(ovserve.__file__).parents[1])
        paths = [package, *own.get("PYTHONPATH", "").split(os.pathsep)]
        self._variables = {**own, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        self._on_pulled = on_pulled
        self._lock = threading.Lock()
        self._wanted: dict[str, _Pull] = {}
        self._is_started = False

    def resolve(self, settings: Settings) -> tuple[Settings, dict[str, PendingModel]]:
        """Give each complete `source_model` its directory; the others are pulled from `start` on.

        Returns:
            The settings with only the models that are on disk, and the pending models by name and alias.
        """
        root = settings.model_repository_path or default_root()
        models: list[ModelSettings] = []
        wanted: dict[str, ModelSettings] = {}
        for model in settings.models:
            directory = find_pulled(root, model.source_model, model.revision) if model.source_model else None
            if directory is not None:
                models.append(dataclasses.replace(model, path=directory, revision=_commit(model, directory)))
            elif model.source_model:
                wanted[model.name] = model
            else:
                models.append(model)
        with self._lock:
            for name in [name for name, pull in self._wanted.items() if not pull.is_for(wanted.get(name), root)]:
                self._wanted.pop(name).stop()
            for name, model in wanted.items():
                if name not in self._wanted:
                    self._wanted[name] = _Pull(model, root, self._variables, settings.failed_retry_s, self._on_pulled)
                    if self._is_started:
                        self._wanted[name].start()
            pending = {name: pull.pending for name, pull in self._wanted.items()}
        for name, model in wanted.items():
            pending.update((alias, pending[name]) for alias in model.all_aliases if alias != "*")
        return dataclasses.replace(settings, models=tuple(models)), pending

    def start(self) -> None:
        """Start the pulls that are wanted now; `resolve` starts later ones."""
        with self._lock:
            self._is_started = True
            for pull in self._wanted.values():
                pull.start()

    def stop(self) -> None:
        """End all pulls; the next start continues them. Idempotent."""
        with self._lock:
            pulls, self._wanted = list(self._wanted.values()), {}
        for pull in pulls:
            pull.stop()
        for pull in pulls:
            pull.join()


def _commit(model: ModelSettings, directory: Path) -> str:
    """Return the option `revision` for a pulled model: on a cluster its commit, which each node then pulls."""
    record = read_record(directory) if model.pool == "ray" else None
    return record.commit if record is not None else model.revision


class _Pull:
    """The pull of one model: a thread that runs a process and reads its events."""

    def __init__(
        self,
        model: ModelSettings,
        root: Path,
        variables: Mapping[str, str],
        retry_s: float,
        on_pulled: Callable[[], None],
    ) -> None:
        self.pending = PendingModel(model.name, model.source_model, model.revision)
        self._root = root
        self._variables = variables
        self._retry_s = retry_s
        self._on_pulled = on_pulled
        self._stop = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"pull {model.name}", daemon=True)

    def is_for(self, model: ModelSettings | None, root: Path) -> bool:
        """Return whether this is the pull that a model needs."""
        wanted = self.pending
        same = model is not None and (model.source_model, model.revision) == (wanted.repository, wanted.revision)
        return same and root == self._root and not wanted.state.has_failed

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the process. The thread ends soon after."""
        self._stop.set()
        with self._lock:
            if self._process is not None:
                self._process.terminate()

    def join(self) -> None:
        """Wait for the thread; kill the process at the limit."""
        if not self._thread.is_alive() or self._thread is threading.current_thread():
            return
        self._thread.join(STOP_LIMIT_S)
        with self._lock:
            if self._process is not None:
                self._process.kill()
        self._thread.join(STOP_LIMIT_S)

    def _run(self) -> None:
        name = self.pending.repository
        while not self._stop.is_set():
            code = self._pull()
            if self._stop.is_set():
                return
            if code == 0:
                log.info("pulled", extra=fields(repository=name))
                self._on_pulled()
                return
            message = self.pending.state.message
            log.error("pull failed", extra=fields(repository=name, why=message, exit_code=code))
            if code != EX_TEMPFAIL:
                self.pending.state = PullState(message, has_failed=True)
                return
            self.pending.state = PullState(f"{message}; tried again in {self._retry_s:g} s")
            self._stop.wait(self._retry_s)

    def _pull(self) -> int:
        """Run one process to its end; return its exit code."""
        pending = self.pending
        command = [
            sys.executable, "-m", "ovserve", "pull", pending.repository, "--revision", pending.revision,
            "--model_repository_path", str(self._root), "--no_conversion", "--json",
        ]  # fmt: skip
        if is_offline(self._variables):
            command.append("--offline")
        try:
            process = subprocess.Popen(  # noqa: S603 - the repository's name is checked, and an argument of its own
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
                env=dict(self._variables),
                start_new_session=True,
            )
        except OSError as error:
            pending.state = PullState(f"cannot be started: {error.strerror}")
            return EX_TEMPFAIL
        with self._lock:
            self._process = process
            if self._stop.is_set():
                process.terminate()
        log.info("pulling", extra=fields(repository=pending.repository, pid=process.pid))
        with process:
            if process.stdout is not None:
                while line := process.stdout.readline(MAX_LINE_CHARS):
                    with contextlib.suppress(ValueError):
                        self._note(json.loads(line))
        with self._lock:
            self._process = None
        return process.returncode

    def _note(self, event: Any) -> None:
        """Take over one event of the process."""
        if not isinstance(event, dict):
            return
        if event.get("event") == "progress":
            total, done = event.get("total_bytes", 0), event.get("done_bytes", 0)
            self.pending.state = PullState(
                f"{done} of {total} bytes", float(event.get("percent", 0.0)), event.get("left_s")
            )
        else:
            text = str(event.get("message", ""))[:500].removeprefix("ovserve: ")
            self.pending.state = dataclasses.replace(self.pending.state, message=text)
