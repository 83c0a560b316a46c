"""A server whose model is pulled from a hub while it runs, and the files of the reference server, served."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ovserve.models.profile import builtin_directory
from tests.fakehub import FakeHub
from tests.live import LiveServer, is_alive
from tests.loras import write_adapter
from tests.modelserver import graph_text, write_repository

DATA = Path(__file__).parents[1] / "data"
REPOSITORY = "owner/shapes"
LIMIT_S = 120.0


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    shutil.copytree(builtin_directory(), tmp_path / "hub" / REPOSITORY)
    with FakeHub(tmp_path / "hub") as found:
        yield found


def start(hub: FakeHub, tmp_path: Path, *arguments: str, **options: Any) -> LiveServer:
    """Start a server that pulls its model, with the built-in model beside it, so that it is ready at once."""
    config = tmp_path / "c.toml"
    pinned = "streams = 2\nthreads = 1\nmax_batch = 8\n"
    config.write_text(
        f'model_repository_path = "{tmp_path / "models"}"\nready_models = "any"\n'
        f'[[model]]\nsource_model = "{REPOSITORY}"\nname = "pulled"\naliases = ["other"]\n{pinned}'
        f'[[model]]\nname = "shapes"\npath = "builtin:shapes"\n{pinned}'
    )
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret"}
    return LiveServer("--config", str(config), *arguments, spool=tmp_path / "spool", environment=environment, **options)


def edit(server: LiveServer, model: str, **more: str) -> httpx.Response:
    fields = {"model": model, "prompt": "a green circle on a blue background", "num_inference_steps": "2", **more}
    with (DATA / "red_circle.png").open("rb") as image:
        return httpx.post(f"{server.url}/v1/images/edits", data=fields, files={"image": image}, timeout=60)


def await_state(server: LiveServer, wanted: str) -> dict[str, Any]:
    """Return the model's object once it has this state."""
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        status, document = server.fetch("/v3/models/pulled")
        percent = document.get("pulling", {}).get("percent")
        if status == 200 and (document["state"] == wanted or (wanted == "percent" and percent)):
            return dict(document)
        time.sleep(0.05)
    raise AssertionError(f"{wanted}: {document}")


def test_model_is_pulled_while_the_server_runs_and_makes_its_first_edit(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults.hold = threading.Event()
    with start(hub, tmp_path) as server:
        assert hub.holding.wait(LIMIT_S)
        document = await_state(server, "percent")
        assert 0 < document["pulling"]["percent"] < 100
        assert document["reason"].startswith(f"pulling {REPOSITORY}")
        assert {"pulled", "other", "shapes"} <= {model["id"] for model in server.fetch("/v3/models")[1]["data"]}
        refused = edit(server, "other")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_not_ready")
        assert f"pulling {REPOSITORY}" in refused.json()["error"]["message"]
        assert server.fetch("/v2/health/ready")[1]["models"]["pulled"]["ready"] is False
        assert server.fetch("/v1/config")[1]["pulled"]["model_version_status"][0]["state"] == "LOADING"
        hub.faults.hold.set()
        await_state(server, "ready")
        made = edit(server, "other")
        assert made.status_code == 200, made.text
        assert base64.b64decode(made.json()["data"][0]["b64_json"]).startswith(b"\x89PNG")
        for pid in server.workers():
            assert b"hf_secret" not in Path(f"/proc/{pid}/environ").read_bytes()
    hub.seen.clear()
    with start(hub, tmp_path) as server:  # complete: the hub is not asked
        await_state(server, "ready")
    assert not hub.seen


def test_stop_during_a_pull_ends_it_and_the_next_start_continues(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults.hold = threading.Event()
    with start(hub, tmp_path) as server:
        assert hub.holding.wait(LIMIT_S)
        await_state(server, "percent")
        pulls = [line for line in server.log if "hub.background: pulling" in line]
        pid = int(pulls[0].rpartition("pid=")[2].split()[0])
        assert server.stop() == 0
        assert not is_alive(pid)
    hub.faults.hold.set()
    hub.faults.hold = None
    hub.seen.clear()
    with start(hub, tmp_path) as server:
        await_state(server, "ready")
    assert [seen for seen in hub.seen if "range" in seen.headers]


def test_repository_that_needs_a_conversion_fails_with_the_command_to_run(hub: FakeHub, tmp_path: Path) -> None:
    for path in (tmp_path / "hub" / REPOSITORY).rglob("openvino_*"):
        path.unlink()
    (tmp_path / "hub" / REPOSITORY / "unet" / "diffusion_pytorch_model.safetensors").touch()
    with start(hub, tmp_path) as server:
        document = await_state(server, "failed")
        assert f"`ovserve pull {REPOSITORY} --model-repository-path {tmp_path / 'models'}`" in document["reason"]


def test_only_model_that_cannot_be_pulled_is_a_start_error(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults.gated = "hf_other"
    arguments = ["--source_model", REPOSITORY, "--model_repository_path", str(tmp_path / "m"), "--port", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "ovserve", *arguments, "--task", "image_generation"],
        env={**os.environ, "HF_ENDPOINT": hub.url}, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 69
    assert "is gated: accept its licence" in done.stderr.splitlines()[-1]


def three_graphs(tmp_path: Path) -> Path:
    """Write a repository with three graphs, of which one has adapters; return its config.json."""
    path = str(builtin_directory())
    adapters = (
        'lora_adapters { alias: "xray" path: "xray.safetensors" alpha: 0.5 } '
        'lora_adapters { alias: "anime" path: "anime.safetensors" } '
        'composite_lora_adapters { alias: "blend" components { adapter_alias: "xray" } '
        'components { adapter_alias: "anime" alpha: 0.25 } }'
    )
    config = write_repository(
        tmp_path / "models",
        {
            "plain": graph_text({"models_path": path, "default_num_inference_steps": 2}, extra=adapters),
            "few": graph_text({"models_path": path, "max_num_inference_steps": 60, "max_num_images_per_prompt": 1}),
            "fixed": graph_text({"models_path": path, "resolution": "256x256 128x256"}),
        },
    )
    for number, name in enumerate(("xray", "anime")):
        write_adapter(tmp_path / "models" / "plain" / f"{name}.safetensors", number)
    return config


def test_reference_servers_repository_is_accepted_by_pointing_at_it(tmp_path: Path) -> None:
    config = three_graphs(tmp_path)
    for arguments in (["--config_path", str(config)], ["--model_repository_path", str(config.parent)]):
        done = subprocess.run(
            [sys.executable, "-m", "ovserve", "check", *arguments, "--rest_workers", "4"],
            capture_output=True, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert all(f"model {name}: stable-diffusion" in done.stdout for name in ("plain", "few", "fixed"))
        assert "without effect: --rest_workers: max_connections limits connections" in done.stdout


@pytest.mark.heavy  # three models measure their threads and streams, which a graph cannot fix
def test_reference_servers_repository_is_served_by_pointing_at_it(tmp_path: Path) -> None:
    config = three_graphs(tmp_path)
    arguments = ["--config_path", str(config), "--rest_port", "0", "--port", "9", "--rest_workers", "4"]
    with LiveServer(*arguments, spool=tmp_path) as server:
        names = {model["id"] for model in server.fetch("/v3/models")[1]["data"]}
        assert names == {"plain", "few", "fixed", "xray", "anime", "blend"}
        ignored = [line for line in server.log if "without effect" in line]
        assert len(ignored) == 1
        assert "--rest_workers" in ignored[0]
        assert "OVMS_GRAPH_QUEUE_MAX_SIZE" in ignored[0]
        with httpx.Client(base_url=server.url) as client:
            while client.get("/v2/models/plain/ready").status_code != 200:
                time.sleep(0.05)
        pictures = [edit(server, name, seed="7").json()["data"][0]["b64_json"] for name in ("plain", "xray", "blend")]
        assert len(set(pictures)) == 3


def test_pull_mode_writes_a_graph_that_a_start_reads(hub: FakeHub, tmp_path: Path) -> None:
    root = str(tmp_path / "models")
    done = subprocess.run(
        [sys.executable, "-m", "ovserve", "--pull", "--source_model", REPOSITORY, "--model_repository_path", root,
         "--task", "image_generation", "--max_num_inference_steps", "60", "--num_streams", "2"],
        env={**os.environ, "HF_ENDPOINT": hub.url}, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "models" / REPOSITORY
    graph = (directory / "graph.pbtxt").read_text()
    assert "max_num_inference_steps: 60" in graph
    assert "NUM_STREAMS" in graph
    checked = subprocess.run(
        [sys.executable, "-m", "ovserve", "check", "--model_path", str(directory), "--model_name", "m"],
        capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    assert "model m" in checked.stdout
