"""Start and stop the servers under measurement, ours and the peers, and read their memory and CPU time.

Each peer runs in its own environment under `bench_home()`, which benchmarks/peers/install makes. Callers skip a server
whose environment or model is missing (`Service.missing`) and record that in the result.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.edits import BUILTIN_PATH

__all__ = ["SERVICES", "RunningServer", "Service", "bench_home", "memory_of_tree", "model_path"]

ROOT = Path(__file__).resolve().parents[1]
BUILTIN = "builtin"  # the built-in model in result files; in requests it is benchmarks.edits.BUILTIN_NAME
READY_TIMEOUT_S = 400.0  # a full-size model on a slow machine
STOP_TIMEOUT_S = 15.0
POLL_S = 0.02


def bench_home() -> Path:
    """Return the folder of environments and large models: BENCH_HOME, else in the user's cache directory."""
    named = os.environ.get("BENCH_HOME")
    return Path(named) if named else Path.home() / ".cache" / "ovserve-bench"


def model_path(model: str, form: str = "openvino") -> Path:
    """Return the directory of a model; `form`: openvino or diffusers."""
    return ROOT / "ovserve" / "builtin" if model == BUILTIN else bench_home() / model / form


@dataclass(frozen=True, slots=True)
class Service:
    """How to start one server.

    Attributes:
        name: its name in results.
        module: started with `python -m`.
        environment: folder under `bench_home()`; empty: the environment that runs the benchmark.
        arguments: further arguments.
        form: form of the model that it reads: openvino or diffusers.
        health: path of its health check.
        models: models that it can serve.
    """

    name: str
    module: str
    environment: str = "peers"
    arguments: tuple[str, ...] = ()
    form: str = "openvino"
    health: str = "/health"
    models: tuple[str, ...] = (BUILTIN, "sd15")

    @property
    def is_ours(self) -> bool:
        """Whether this is ovserve: it runs in the environment of the benchmark."""
        return not self.environment

    @property
    def python(self) -> Path:
        """The interpreter."""
        return bench_home() / self.environment / "bin" / "python" if self.environment else Path(sys.executable)

    def missing(self, model: str) -> str:
        """Return why it cannot be started with this model; empty if it can."""
        if model not in self.models:
            return f"does not read {model}"
        if not self.python.exists():
            return f"environment {self.environment} is missing: run benchmarks/peers/install {self.environment}"
        if not model_path(model, self.form).exists():
            return f"model {model} is missing: run benchmarks/peers/install torch {model}"
        return ""

    def command(self, model: str, port: int, extra: Sequence[str] = (), *, plain: bool = False) -> list[str]:
        """Return the command line; if `plain`, with `extra` alone, which then names the models."""
        if plain:
            return [str(self.python), "-m", self.module, "--port", str(port), *extra]
        start = [str(self.python), "-m", self.module, "--port", str(port), *self.arguments, *extra]
        if not self.is_ours:
            return [*start, "--model", str(model_path(model, self.form))]
        if model == BUILTIN:
            return [*start, "--model_path", str(BUILTIN_PATH)]
        return [*start, "--model_name", model, "--model_path", str(model_path(model))]


SERVICES = {
    service.name: service
    for service in (
        Service("ovserve", "ovserve", "", ("--engine", "auto"), health="/v2/health/live"),
        Service("ovserve genai", "ovserve", "", ("--engine", "genai"), health="/v2/health/live"),
        Service("ovserve stepwise", "ovserve", "", ("--engine", "stepwise"), health="/v2/health/live"),
        Service("FastAPI", "benchmarks.peers.fastapi_server"),
        Service("LitServe", "benchmarks.peers.litserve_server"),
        Service("LitServe 2x1", "benchmarks.peers.litserve_server", arguments=("--workers", "2", "--threads", "1")),
        Service("mosec", "benchmarks.peers.mosec_server", health="/"),
        Service(
            "mosec 2x1", "benchmarks.peers.mosec_server", arguments=("--workers", "2", "--threads", "1"), health="/"
        ),
        Service("optimum", "benchmarks.peers.torch_server", "torch", ("--library", "optimum"), models=("sd15",)),
        Service(
            "diffusers",
            "benchmarks.peers.torch_server",
            "torch",
            ("--library", "diffusers"),
            form="diffusers",
            models=("sd15",),
        ),
        Service("sd.cpp", "benchmarks.peers.sdcpp_server", "sdcpp", form="diffusers", models=("sd15",)),
    )
}


class RunningServer:
    """A running server, as a context manager that stops it.

    Attributes:
        service: the service it was started from.
        url: scheme, host and port.
        ready_s: seconds from the start to the first 200 of its health check.
    """

    def __init__(self, service: Service, model: str, extra: Sequence[str] = (), *, plain: bool = False) -> None:
        """Start the server and wait until its health check answers 200.

        Args:
            service: what to start.
            model: the model to serve.
            extra: further arguments.
            plain: without the service's own arguments and without `model`.

        Raises:
            RuntimeError: it did not become ready; the end of its log is in the message.
        """
        self.service = service
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        bench_home().mkdir(parents=True, exist_ok=True)
        self._log = (bench_home() / f"server-{service.name.replace(' ', '-')}.log").open("wb")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("OVSERVE_")}
        command = service.command(model, port, extra, plain=plain)
        began = time.monotonic()
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            self._await_ready()
        except BaseException:
            self.stop()
            raise
        self.ready_s = time.monotonic() - began

    def _await_ready(self) -> None:
        path = "/v2/health/ready" if self.service.is_ours else self.service.health
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            if self.answers(path):
                return
            time.sleep(POLL_S)
        tail = Path(self._log.name).read_text("utf-8", "replace")[-2000:]
        raise RuntimeError(f"{self.service.name} did not become ready:\n{tail}")

    def answers(self, path: str) -> bool:
        """Return whether a GET is answered with 200."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def memory(self) -> int:
        """Return the bytes of all its processes, with shared pages counted once."""
        return memory_of_tree(self._process.pid)

    def cpu_s(self) -> float:
        """Return the CPU seconds that its running processes have used."""
        ticks = 0
        for process in process_tree(self._process.pid):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{process}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])  # utime and stime, proc(5)
        return ticks / os.sysconf("SC_CLK_TCK")

    @property
    def pid(self) -> int:
        """Process id of the first process, which leads its own process group."""
        return self._process.pid

    def stop(self) -> None:
        """Terminate the server, then kill its process group, because some peers leave child processes."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def process_tree(pid: int) -> list[int]:
    """Return the ids of a process and all its descendants."""
    found = []
    pending = [pid]
    while pending:
        found.append(current := pending.pop())
        with contextlib.suppress(OSError):  # it may have exited
            for task in Path(f"/proc/{current}/task").iterdir():
                pending += [int(child) for child in (task / "children").read_text("ascii").split()]
    return found


def memory_of_tree(pid: int) -> int:
    """Return the proportional set size of a process and all its descendants, in bytes."""
    total = 0
    for process in process_tree(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/smaps_rollup").read_text("ascii").splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
