"""A real conversion: a small pipeline is written with diffusers, pulled, converted by optimum-cli, and makes an edit.

The environment of optimum-cli is made from a package index, which takes about 2 GB and some minutes. uv's own
variables, such as UV_FIND_LINKS, choose other places.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from ovserve.errors import HubError
from ovserve.hub.convert import Converter
from ovserve.hub.progress import QuietReporter
from tests.fakehub import FakeHub
from tests.live import LiveServer

ROOT = Path(__file__).parents[2]
REPOSITORY = "tiny/sd"
LIMIT_S = 1800


@pytest.mark.heavy
@pytest.mark.parametrize("weight_format", ["int8", "int4", "fp16"])
def test_pipeline_is_pulled_converted_and_makes_an_edit(tmp_path: Path, weight_format: str) -> None:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    environments = Path(cache) / "ovserve"
    try:
        directory = Converter(QuietReporter(), threading.Event(), environments=environments).environment(
            tmp_path / "log"
        )
    except HubError as error:
        pytest.skip(f"the environment of optimum-cli cannot be made here: {error}")
    variables = {**os.environ, "XDG_CACHE_HOME": cache}
    variables.pop("CACHE_DIRECTORY", None)
    source = tmp_path / "hub" / REPOSITORY
    subprocess.run(
        [directory / "bin" / "python", ROOT / "tests" / "tinypipeline.py", source],
        check=True, timeout=LIMIT_S, env=variables,
    )  # fmt: skip
    arguments = ["--weight-format", weight_format, "--model-repository-path", str(tmp_path / "models")]
    with FakeHub(tmp_path / "hub") as hub:
        done = subprocess.run(
            [sys.executable, "-m", "ovserve", "pull", REPOSITORY, *arguments],
            env={**variables, "HF_ENDPOINT": hub.url}, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip
    assert done.returncode == 0
    model = Path(done.stdout.strip())
    weights = sum(path.stat().st_size for path in model.glob("unet/*.bin"))
    original = sum(path.stat().st_size for path in source.glob("unet/*.safetensors"))
    assert weights < original * (0.55 if weight_format == "fp16" else 0.35)  # the source is float32
    with LiveServer("--model_name", "tiny", "--model_path", str(model), spool=tmp_path / "spool") as server:
        fields = {"model": "tiny", "prompt": "abc", "num_inference_steps": "2", "strength": "1"}
        with (ROOT / "tests" / "data" / "red_circle.png").open("rb") as image:
            made = httpx.post(f"{server.url}/v1/images/edits", data=fields, files={"image": image}, timeout=120)
    assert made.status_code == 200, made.text
