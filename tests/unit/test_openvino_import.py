"""`import openvino` in a worker: without the converter, whose telemetry needs a home directory and sends events."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# argv[1]: HOME, or nothing for a user without HOME and without an entry in the user database.
IMPORT = """
import os, pwd, sys

def unknown(_):
    raise KeyError("uid not found")

pwd.getpwuid = unknown
os.environ.pop("HOME", None)
if sys.argv[1]:
    os.environ["HOME"] = sys.argv[1]
from ovserve.worker.main import reduce_openvino_import
reduce_openvino_import()
import openvino, openvino_genai
print(*(name for name, module in sys.modules.items() if module and ("telemetry" in name or "tools.ovc" in name)))
"""


def import_as_worker(home: str) -> list[str]:
    """Import OpenVINO as a worker does; return the names of the converter's modules that it has loaded."""
    environment = {
        name: value for name, value in os.environ.items() if name != "CI"
    }  # telemetry is off where CI is set
    command = [sys.executable, "-c", IMPORT, home]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_openvino_is_imported_by_a_user_without_a_home() -> None:
    assert import_as_worker("") == []


def test_import_of_openvino_sends_nothing_and_leaves_no_file_in_the_home(tmp_path: Path) -> None:
    assert import_as_worker(str(tmp_path)) == []
    assert not list(tmp_path.iterdir())
