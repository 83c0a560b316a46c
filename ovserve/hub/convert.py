"""Conversion of a PyTorch pipeline by optimum-cli, in an environment of its own that uv makes when it is first needed.

It runs in a process of its own, without network for models, without the hub's token, and never with
`--trust-remote-code`. Runs in: the process of `ovserve pull`, never the server.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from ovserve.errors import HubError
from ovserve.hub.progress import Reporter
from ovserve.hub.transfer import Stopped

__all__ = ["WEIGHT_FORMATS", "Converter", "check_arguments"]

WEIGHT_FORMATS = ("fp16", "int8", "int4")
INSTALL_LIMIT_S = 3600.0
CONVERT_LIMIT_S = 24 * 3600.0
REPORT_INTERVAL_S = 10.0
_POLL_S = 0.1
_TERMINATE_S = 5.0
_SHOWN_LINES = 4  # of the log, in the message of a failed conversion
_SHOWN_CHARS = 700
_MADE = ".made"  # file that marks an environment as complete
_TASK = "text-to-image"  # of every class: the class decides what is exported, but a directory needs a task
# The default group of 128 weights does not divide the layers of SD 1.5; layers that 64 does not divide either stay
# at int8.
_INT4 = ("--group-size", "64", "--group-size-fallback", "ignore")
# What a conversion inherits: no token, and nothing that points to a model hub.
_KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "XDG_CACHE_HOME", "http_proxy", "https_proxy", "no_proxy",
         "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "OMP_NUM_THREADS")  # fmt: skip
_FORBIDDEN = (
    "--trust-remote-code", "--model", "--task", "--library", "-m", "--output", "--cache_dir", "--weight-format",
)  # fmt: skip


def check_arguments(arguments: Sequence[str]) -> None:
    """Check further arguments for optimum-cli. Raises ValueError."""
    for argument in arguments:
        name = argument.partition("=")[0]
        if name in _FORBIDDEN or (len(name) > 3 and any(each.startswith(name) for each in _FORBIDDEN)):
            raise ValueError(f"{name} cannot be given to the conversion")


class Converter:
    """Converts pipelines with optimum-cli.

    Args:
        reporter: gets what happens.
        stop: ends a conversion when it is set.
        environments: directory of the environments; None: in the user's cache directory.
        variables: the environment variables.
        requirements: the packages, in pip's format; None: the pinned ones of this version.
    """

    def __init__(
        self,
        reporter: Reporter,
        stop: threading.Event,
        *,
        environments: Path | None = None,
        variables: Mapping[str, str] | None = None,
        requirements: str | None = None,
    ) -> None:
        self._reporter = reporter
        self._stop = stop
        self._variables = dict(os.environ if variables is None else variables)
        self._requirements = requirements or (files("ovserve") / "hub" / "conversion.txt").read_text("utf-8")
        digest = hashlib.sha256(f"{sys.version_info[:2]}\n{self._requirements}".encode()).hexdigest()[:12]
        self._directory = (environments or self._default_directory()) / f"convert-{digest}"

    def _default_directory(self) -> Path:
        base = self._variables.get("CACHE_DIRECTORY") or self._variables.get("XDG_CACHE_HOME")
        return Path(base.partition(":")[0]) / "ovserve" if base else Path.home() / ".cache" / "ovserve"

    def check(self) -> None:
        """Raise HubError if no conversion can be made here, before anything is downloaded."""
        if not (self._directory / _MADE).exists():
            self._find_uv()

    def convert(self, source: Path, target: Path, weight_format: str, arguments: Sequence[str], log: Path) -> None:
        """Convert the pipeline in `source` to OpenVINO in `target`, which must not exist.

        Args:
            source: a pipeline in diffusers layout.
            target: the new directory.
            weight_format: one of WEIGHT_FORMATS.
            arguments: further arguments for optimum-cli.
            log: file for its output; it stays if the conversion fails.

        Raises:
            HubError: the environment cannot be made, or the conversion failed; the message has the end of its log.
            Stopped: `stop` was set.
        """
        self.environment(log)
        command = [
            str(self._directory / "bin" / "optimum-cli"), "export", "openvino",
            "--library", "diffusers", "--task", _TASK,
            "--model", str(source), "--weight-format", weight_format,
            *(_INT4 if weight_format == "int4" and "--group-size" not in arguments else ()), *arguments, str(target),
        ]  # fmt: skip
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        variables = {name: self._variables[name] for name in _KEPT if name in self._variables}
        self._reporter.event("convert", f"converting to {weight_format} with optimum-cli", weight_format=weight_format)
        self._run(command, variables | offline, log, CONVERT_LIMIT_S, "conversion")

    def _find_uv(self) -> str:
        """Return the program uv: of the package of that name, else on PATH. Raises HubError."""
        if importlib.util.find_spec("uv"):
            beside = Path(sys.executable).with_name("uv")
            if beside.exists():
                return str(beside)
        if found := shutil.which("uv", path=self._variables.get("PATH")):
            return found
        raise HubError(
            "the repository must be converted, which needs the program uv: install it with `pip install uv`, or "
            "pull an OpenVINO export of the model"
        )

    def environment(self, log: Path) -> Path:
        """Return the directory of the environment; make it if it is not there.

        Args:
            log: file for the output of uv.

        Raises:
            HubError: it cannot be made.
            Stopped: `stop` was set.
        """
        self._directory.parent.mkdir(parents=True, exist_ok=True)
        with self._lock():
            if (self._directory / _MADE).exists():
                return self._directory
            uv = self._find_uv()
            self._reporter.event(
                "environment",
                f"making the environment of optimum-cli in {self._directory}; this downloads about 1 GB",
                path=str(self._directory),
            )
            shutil.rmtree(self._directory, ignore_errors=True)
            listed = self._directory.with_suffix(".txt")
            listed.write_text(self._requirements, "utf-8")
            names = {name for name in self._variables if name.startswith("UV_")}
            variables = {name: self._variables[name] for name in (*_KEPT, *sorted(names)) if name in self._variables}
            if not names & {"UV_TORCH_BACKEND", "UV_FIND_LINKS", "UV_INDEX", "UV_DEFAULT_INDEX", "UV_INDEX_URL"}:
                variables["UV_TORCH_BACKEND"] = "cpu"  # the default of PyPI brings gigabytes for CUDA
            python = str(self._directory / "bin" / "python")
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            for command in (
                [uv, "venv", "--python", version, str(self._directory)],
                [uv, "pip", "install", "--python", python, "-r", str(listed)],
            ):
                self._run(command, variables, log, INSTALL_LIMIT_S, "making the environment")
            (self._directory / _MADE).touch()
            return self._directory

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        descriptor = os.open(self._directory.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            until = time.monotonic() + INSTALL_LIMIT_S
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        message = f"another process has been making {self._directory} for {INSTALL_LIMIT_S:g} s"
                        raise HubError(message, is_transient=True) from None
                if self._stop.wait(_POLL_S):
                    raise Stopped
            yield
        finally:
            os.close(descriptor)

    def _run(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        log: Path,
        limit_s: float,
        what: str,
    ) -> None:
        """Run a command to its end, with its output in the log. Raises HubError and Stopped."""
        began = time.monotonic()
        with log.open("ab") as output:
            output.write(f"$ {' '.join(command)}\n".encode())
            output.flush()
            try:
                process = subprocess.Popen(  # noqa: S603 - own programs; the paths are arguments of their own
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=dict(variables),
                    start_new_session=True,
                )
            except OSError as error:
                raise HubError(f"{what}: {command[0]}: {error.strerror}", is_transient=True) from None
        reported = began
        try:
            while process.poll() is None:
                now = time.monotonic()
                if now - began > limit_s:
                    raise HubError(f"{what} took longer than {limit_s:g} s; its log is {log}", is_transient=True)
                if now - reported > REPORT_INTERVAL_S:
                    reported = now
                    seconds = round(now - began)
                    self._reporter.event("working", f"{what}: {seconds} s", seconds=seconds)
                if self._stop.wait(_POLL_S):
                    raise Stopped
        finally:
            _end_group(process)
        if process.returncode:
            raise HubError(f"{what} failed with exit code {process.returncode}: {_end_of(log)} (log: {log})")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children, if they still run."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_TERMINATE_S)


def _end_of(log: Path) -> str:
    """Return the last lines of a log as one line."""
    with log.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, 2) - 8192))
        lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
    text = " | ".join(lines[-_SHOWN_LINES:])
    return "".join(char if char.isprintable() else "?" for char in text)[-_SHOWN_CHARS:]
