"""Time a newcomer's walk through the quick start of README.md, in an empty directory, until the first edited picture.

    python -m benchmarks.bench_quick_start
    python -m benchmarks.bench_quick_start --save

The commands are those of the page, in its order, with this repository as the address to clone and a free port. The
environment is new; pip and uv use their caches, so a first installation takes the download of about 150 MB longer.

clone             `git clone`
start             `scripts/serve`: make the environment, install the packages, load the built-in model, and be ready
edit with curl    the page's command, until the picture is there
edit with ovserve the same with the page's command for the shell
whole walk        all of it, without the time to read
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if __package__ in (None, ""):  # run as a file: put the repository on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.metadata import collect
from benchmarks.results import Result
from ovserve.models.profile import builtin_directory

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = "http://127.0.0.1:8000"  # of the page's commands
LIMIT_S = 1800.0
PNG = b"\x89PNG"


def commands() -> list[str]:
    """Return the shell commands of README.md, in order."""
    return re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)


@contextmanager
def started(directory: Path, command: str) -> Iterator[str]:
    """Start the server with the page's command on a free port; yield its address when it is ready."""
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command.strip()} --port 0"], cwd=directory, stdout=subprocess.PIPE, text=True
    )
    try:
        for line in process.stdout or ():
            if line.startswith("ready "):
                yield line.removeprefix("ready ").strip()
                break
        else:
            raise RuntimeError(f"{command.strip()} ended with {process.wait()}")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(LIMIT_S)


def run(command: str, directory: Path, picture: str) -> None:
    """Run a command that writes a picture. Raises RuntimeError if it does not."""
    subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=directory, check=True, timeout=LIMIT_S)
    if not (directory / picture).read_bytes().startswith(PNG):
        raise RuntimeError(f"{picture} is no picture")


def main() -> None:
    """Take the walk, print the result, and save it if --save is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write a result file")
    options = parser.parse_args()
    clone, serve, edit, curl, *_ = commands()
    result = Result("quick-start", collect(builtin_directory()))
    with tempfile.TemporaryDirectory() as folder:
        began = at = time.perf_counter()

        def note(name: str) -> None:
            nonlocal at
            now = time.perf_counter()
            result.add(name, [now - at])
            at = now

        subprocess.run(["bash", "-c", clone.replace("<this repository>", f"'{ROOT}' ovserve")], cwd=folder, check=True)
        note("clone")
        directory = Path(folder) / "ovserve"
        with started(directory, serve) as address:
            note("start")
            run(curl.replace(ADDRESS, address), directory, "edited.png")
            note("edit with curl")
            (directory / "edited.png").unlink()
            run(f"OVSERVE_URL={address} {edit}", directory, "edited.png")
            note("edit with ovserve")
            result.add("whole walk", [at - began])
    print(result.report())
    if options.save:
        print(result.save())


if __name__ == "__main__":
    main()
