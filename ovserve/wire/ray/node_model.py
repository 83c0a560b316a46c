"""The model's directory on the node of a worker: there already, or pulled from a hub before the worker is started.

The pull is a process `ovserve pull`, as on the front end's machine. Its lock lets one worker of a node pull, while the
others wait, and it takes exactly the commit that the front end has: pictures do not depend on the node.

Runs in: actor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Self

import ovserve
from ovserve.deadline import Deadline
from ovserve.errors import ModelError
from ovserve.models.profile import ModelProfile
from ovserve.settings.options import ModelSettings

__all__ = ["await_model"]

_TURN_S = 1.0  # between two reports of what is pulled
_END_S = 5.0  # for a killed process to exit
_READ_BYTES = 65536
_LINE_BYTES = 65536  # longer ones are cut
# The process ends with the thread that has started it.
_PULL = (
    "import os, sys\n"
    "from ovserve.wire.local.processes import die_with\n"
    "die_with(int(sys.argv[1]))\n"
    "os.execv(sys.executable, [sys.executable, '-m', 'ovserve', *sys.argv[2:]])\n"
)


def await_model(profile: ModelProfile, model: ModelSettings, node: str) -> Iterator[str]:
    """Wait until the model's directory is complete on this node; yield about once a second what it waits for.

    A model without `source_model` has to be there already. The commit to pull is the option `revision`.

    Raises:
        ModelError: there is no such directory, or it cannot be pulled.
    """
    directory = profile.directory
    if not model.source_model:
        if not directory.is_dir():
            raise ModelError(
                f"node {node} has no directory {directory}; put it on storage that all nodes see, or copy it there"
            )
        return
    root = directory.parents[model.source_model.count("/")]
    known = [model.source_model, "--revision", model.revision, "--model_repository_path", str(root)]
    with _Pull([*known, "--offline"]) as check:
        yield from check.follow()
    if check.code == 0:
        return
    with _Pull([*known, "--no_conversion"]) as pull:
        for state in pull.follow():
            yield f"node {node} pulls {model.source_model}{state and ': '}{state}"
    if pull.code:
        raise ModelError(f"node {node} cannot pull {model.source_model}: {pull.message or f'exit code {pull.code}'}")


class _Pull:
    """One process `ovserve pull`.

    Attributes:
        code: its exit code, once `follow` has ended.
        message: its last one.
    """

    def __init__(self, arguments: list[str]) -> None:
        own = {name: value for name, value in os.environ.items() if not name.startswith("OVSERVE_")}
        paths = [str(Path(ovserve.__file__).parents[1]), *own.get("PYTHONPATH", "").split(os.pathsep)]
        own["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        self.code = 0
        self.message = ""
        self._state = ""
        self._left = b""  # of an incomplete line
        self._process = subprocess.Popen(  # noqa: S603 - the repository's name was checked, and is one argument
            [sys.executable, "-c", _PULL, str(os.getpid()), "pull", *arguments, "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=own,
        )

    def follow(self) -> Iterator[str]:
        """Yield how far it is, about once a second, until it has ended."""
        if self._process.stdout is None:
            return
        output = self._process.stdout.fileno()
        os.set_blocking(output, False)
        turn = Deadline.after(_TURN_S)
        while True:
            wait([output], max(0.0, turn.remaining()))
            try:
                data = os.read(output, _READ_BYTES)
            except BlockingIOError:
                pass
            else:
                if not data:
                    break
                self._note(data)
            if turn.is_expired():
                turn = Deadline.after(_TURN_S)
                yield self._state
        self.code = self._process.wait()

    def _note(self, data: bytes) -> None:
        *lines, left = (self._left + data).split(b"\n")
        self._left = left[-_LINE_BYTES:]
        for line in lines:
            try:
                event: Any = json.loads(line)
            except ValueError:
                continue
            if not isinstance(event, dict):
                continue
            if event.get("event") == "progress":
                self._state = f"{event.get('percent', 0)} %"
            else:
                self._state = self.message = str(event.get("message", ""))[:500].removeprefix("ovserve: ")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Kill it if it still runs; the next pull continues."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(_END_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
