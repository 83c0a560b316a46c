"""The three tiers of checks: their scripts are sound, and no test is in the wrong one."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = ["scripts/serve", "scripts/install-service", "scripts/check", "scripts/test", "scripts/test-all", ".ci/run"]
FIRST_LINES = (b"#!/usr/bin/env bash\n", b"# shellcheck shell=bash\n")
SHELL = sorted(
    str(path.relative_to(ROOT))
    for folder in (".ci", "benchmarks", "scripts")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.read_bytes().startswith(FIRST_LINES)
)
BUILT_IN_MARKS = {"filterwarnings", "parametrize", "skip", "skipif", "usefixtures", "xfail"}
MARK = re.compile(r"\bmark\.(\w+)")


def marks_of(folder: Path) -> dict[str, set[str]]:
    """Return the marks that each test file under a folder uses."""
    return {
        str(path.relative_to(ROOT)): set(MARK.findall(path.read_text("utf-8"))) for path in sorted(folder.rglob("*.py"))
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_can_be_run(name: str) -> None:
    path = ROOT / name
    assert os.access(path, os.X_OK)
    assert path.read_text("utf-8").startswith("#!/usr/bin/env bash\n")


def test_every_script_is_found() -> None:
    assert {*COMMANDS, "scripts/lib.sh"} <= set(SHELL)


@pytest.mark.parametrize("name", SHELL)
def test_a_script_has_no_syntax_error(name: str) -> None:
    checked = subprocess.run(["bash", "-n", ROOT / name], check=False, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on this machine")
@pytest.mark.parametrize("name", SHELL)
def test_shellcheck_finds_nothing(name: str) -> None:
    checked = subprocess.run(["shellcheck", "-x", name], cwd=ROOT, check=False, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_each_mark_is_registered() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    registered = {line.partition(":")[0] for line in config["tool:pytest"]["markers"].split("\n") if line}
    assert "heavy" in registered
    assert set().union(*marks_of(ROOT / "tests").values()) - BUILT_IN_MARKS <= registered


def test_no_unit_test_is_heavy() -> None:
    assert [name for name, marks in marks_of(ROOT / "tests" / "unit").items() if "heavy" in marks] == []


def test_only_the_heavy_tier_runs_heavy_tests() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert '-m "not heavy"' in config["tool:pytest"]["addopts"]
    for name in COMMANDS:
        assert ("-m heavy" in (ROOT / name).read_text("utf-8")) == (name == "scripts/test-all"), name
