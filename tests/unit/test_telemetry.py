"""OpenVINO's telemetry in a worker: switched off, so that it needs no home directory and sends nothing."""

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
from ovserve.worker.main import disable_telemetry
disable_telemetry()
import openvino, openvino_genai
from openvino.tools.ovc import telemetry_utils
print(telemetry_utils.tm.__name__)
"""


def imported(home: str) -> str:
    """Import OpenVINO as a worker does; return the name of the module that gets its telemetry."""
    environment = {
        name: value for name, value in os.environ.items() if name != "CI"
    }  # telemetry is off where CI is set
    command = [sys.executable, "-c", IMPORT, home]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_openvino_is_imported_by_a_user_without_a_home() -> None:
    assert imported("") == "openvino.tools.ovc.telemetry_stub"


def test_import_of_openvino_sends_nothing_and_leaves_no_file_in_the_home(tmp_path: Path) -> None:
    assert imported(str(tmp_path)) == "openvino.tools.ovc.telemetry_stub"
    assert not list(tmp_path.iterdir())
