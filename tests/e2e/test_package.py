"""The package as an index shows and delivers it: the page, the source distribution, the command."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def run(*command: str | Path, cwd: Path, environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_page_for_the_package_index_has_only_absolute_links() -> None:
    page = (ROOT / PROJECT["readme"]).read_text("utf-8")
    links = re.findall(r"\]\(([^)]+)\)", page) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", page, re.MULTILINE)
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert "<this repository>" not in page


def test_command_and_project_urls() -> None:
    assert PROJECT["scripts"] == {"ovserve": "ovserve.cli.main:main"}
    assert all(url.startswith("https://") for url in PROJECT.get("urls", {}).values())


@pytest.mark.heavy
def test_unit_tests_run_from_the_source_distribution(tmp_path: Path) -> None:
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert uv, "uv is not installed: scripts/test installs it"
    run(uv, "build", "--quiet", "--out-dir", tmp_path, ROOT, cwd=tmp_path)
    [archive], [wheel] = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    [folder] = tmp_path.glob("ovserve-*/")
    for script in ("check", "test", "install-service"):
        assert os.access(folder / "scripts" / script, os.X_OK)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    parallel = ("-n", "3", "--dist", "loadfile")
    run(
        sys.executable, "-m", "pytest", "-q", *parallel, "tests/unit", "tests/protocol",
        cwd=folder, environment=environment,
    )  # fmt: skip
    # The wheel's command, without its dependencies: these are those of this interpreter.
    venv.create(tmp_path / "venv", system_site_packages=False)
    run(uv, "pip", "install", "--quiet", "--no-deps", "--python", tmp_path / "venv/bin/python", wheel, cwd=tmp_path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if "site-packages" in each)}
    assert "model ovserve-builtin" in run(tmp_path / "venv/bin/ovserve", "check", cwd=tmp_path, environment=environment)
