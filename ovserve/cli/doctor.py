"""`ovserve doctor`: check this machine, and say what to do about each problem."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ovserve import __version__
from ovserve.cli.arguments import ArgumentParser, usage_error
from ovserve.cli.commands import ExitCode
from ovserve.machine import machine_memory_bytes

__all__ = ["Finding", "findings", "run"]

_DESCRIPTION = """Check whether this machine can run the server: Python, packages, devices, memory, the spool's
directory, the port. Prints one line for each check, and what to do where one has failed."""
OK, WARNING, PROBLEM = "ok", "warning", "problem"
MIN_MEMORY_BYTES = 2 << 30  # the built-in model takes 0.4 GB, the smallest useful one 2 GB
MIN_SPOOL_BYTES = 256 << 20  # the largest upload at the default limits
DEVICES_TIMEOUT_S = 120.0
_GB = 1e9
_PACKAGES = ("openvino", "openvino-genai", "numpy", "pillow", "multipart", "prometheus-client", "zlib-ng")
_SPOOL = Path("/dev/shm")  # noqa: S108 - the default of spool_dir


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: `ok`, `warning` or `problem`, what was found, and what to do about it."""

    state: str
    text: str
    advice: str = ""


def run(arguments: Sequence[str]) -> int:
    """Print the findings; return the exit code."""
    parser = ArgumentParser("doctor", _DESCRIPTION)
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="the server's port. Default: %(default)s")
    port = parser.parse(arguments)["port"]
    if not isinstance(port, int) or not 0 <= port <= 65535:
        usage_error(f"--port={port}: expected 0 to 65535")
    has_problem = False
    for finding in findings(port):
        print(f"{finding.state:8} {finding.text}", flush=True)
        if finding.advice:
            print(f"{'':8} -> {finding.advice}", flush=True)
        has_problem |= finding.state == PROBLEM
    return ExitCode.MODELS_FAILED if has_problem else ExitCode.OK


def findings(port: int, spool: Path = _SPOOL, devices: Callable[[], Finding] | None = None) -> Iterator[Finding]:
    """Yield the result of each check.

    Args:
        port: the port to listen on.
        spool: the directory of uploads and results.
        devices: the check of the devices; None for the real one, which starts a process.
    """
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding(OK, f"ovserve {__version__}, Python {version}")
    yield _packages()
    yield (devices or _devices)()
    yield _memory()
    yield _spool(spool)
    yield _port(port)


def _packages() -> Finding:
    found, missing = [], []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding(PROBLEM, f"missing packages: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return Finding(OK, ", ".join(found))


def _devices() -> Finding:
    """Return what OpenVINO sees. It is asked in another process: a broken driver can crash the one that loads it."""
    command = [sys.executable, "-m", "ovserve", "devices"]
    try:
        done = subprocess.run(  # noqa: S603 - this package, with fixed arguments
            command, capture_output=True, text=True, timeout=DEVICES_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding(PROBLEM, "OpenVINO did not list its devices in time", "check the drivers of GPU and NPU")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Finding(PROBLEM, f"OpenVINO cannot be used: {reason}", "reinstall openvino, or check the drivers")
    names = [line for line in done.stdout.splitlines() if line and not line.startswith(" ")]
    has_node = any(Path("/dev/dri").glob("renderD*")) if Path("/dev/dri").is_dir() else False
    if has_node and not any(name.startswith("GPU") for name in names):
        advice = "install the driver intel-opencl-icd, and add the user to the groups render and video"
        return Finding(WARNING, f"devices: {'; '.join(names)}; there is a GPU that OpenVINO does not see", advice)
    return Finding(OK, f"devices: {'; '.join(names)}")


def _memory() -> Finding:
    size = machine_memory_bytes()
    text = f"{size / _GB:.1f} GB of memory, {os.cpu_count()} CPUs"
    if size < MIN_MEMORY_BYTES:
        return Finding(WARNING, text, "only small models fit; int8 weights take half of the memory of 16-bit ones")
    return Finding(OK, text)


def _spool(spool: Path) -> Finding:
    try:
        free = shutil.disk_usage(spool).free
    except OSError as error:
        return Finding(PROBLEM, f"{spool}: {error.strerror}", "name another directory with --spool_dir")
    if not os.access(spool, os.W_OK | os.X_OK):
        return Finding(PROBLEM, f"{spool} cannot be written", "name another directory with --spool_dir")
    text = f"{free / _GB:.1f} GB free in {spool} for uploads and results"
    if free < MIN_SPOOL_BYTES:
        advice = "enlarge it (in a container: --shm-size=1g), or name another directory with --spool_dir"
        return Finding(WARNING, text, advice)
    return Finding(OK, text)


def _port(port: int) -> Finding:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return Finding(WARNING, f"port {port} is in use", "a server may run already; --port chooses another")
            return Finding(PROBLEM, f"port {port}: {error.strerror}", "choose a port above 1023 with --port")
    return Finding(OK, f"port {port} is free")
