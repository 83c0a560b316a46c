"""Conversions: with stand-ins for uv and optimum-cli that record how they were called."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ovserve.errors import HubError
from ovserve.hub.client import HubClient
from ovserve.hub.convert import Converter, check_arguments
from ovserve.hub.progress import Reporter
from ovserve.hub.pull import Puller, PullRequest, find_pulled
from ovserve.hub.transfer import Retries, Stopped
from ovserve.models.profile import builtin_directory
from tests.fakehub import FakeHub
from tests.live import is_alive

REPOSITORY = "owner/torch"
# `uv venv --python V DIRECTORY` makes the program; `uv pip install ...` does nothing. Each call is recorded.
UV = """#!{python}
import json, os, pathlib, sys
with open({record!r}, "a") as stream:
    print(json.dumps({{"program": "uv", "arguments": sys.argv[1:], "environment": dict(os.environ)}}), file=stream)
if sys.argv[1] == "venv":
    program = pathlib.Path(sys.argv[-1]) / "bin" / "optimum-cli"
    program.parent.mkdir(parents=True)
    program.write_text({program!r})
    program.chmod(0o755)
"""
OPTIMUM = """#!{python}
import json, os, pathlib, shutil, sys, time
with open({record!r}, "a") as stream:
    entry = {{"program": "optimum", "arguments": sys.argv[1:], "environment": dict(os.environ), "pid": os.getpid()}}
    print(json.dumps(entry), file=stream)
{action}
"""
EXPORTS = "shutil.copytree({source!r}, sys.argv[-1])"


class Tools:
    """The stand-ins, and the converter that uses them."""

    def __init__(self, folder: Path, action: str) -> None:
        self.record = folder / "calls"
        names = {"python": sys.executable, "record": str(self.record)}
        program = OPTIMUM.format(action=action, **names)
        (folder / "bin").mkdir()
        uv = folder / "bin" / "uv"
        uv.write_text(UV.format(program=program, **names))
        uv.chmod(0o755)
        self.environments = folder / "environments"
        self.variables = {"PATH": str(folder / "bin"), "HOME": str(folder), "HF_TOKEN": "hf_secret", "UV_OFFLINE": "1"}

    def converter(self, stop: threading.Event, requirements: str = "optimum-intel==1") -> Converter:
        return Converter(
            Reporter(), stop, environments=self.environments, variables=self.variables, requirements=requirements
        )

    def calls(self, program: str) -> list[dict[str, Any]]:
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [call for line in lines if (call := json.loads(line))["program"] == program]


@pytest.fixture
def without_uv_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the converter look for uv on PATH only."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """Serve a pipeline as PyTorch weights, with files that must not be downloaded."""
    folder = tmp_path / "hub" / REPOSITORY
    shutil.copytree(builtin_directory(), folder, ignore=shutil.ignore_patterns("openvino_*"))
    for component in ("unet", "vae", "text_encoder"):
        (folder / component).mkdir(exist_ok=True)
        (folder / component / "model.safetensors").write_bytes(bytes(2000))
        (folder / component / "model.fp16.safetensors").write_bytes(bytes(1000))
        (folder / component / "model.bin").write_bytes(b"pickle")
    (folder / "model.ckpt").write_bytes(b"pickle")
    with FakeHub(tmp_path / "hub") as found:
        yield found


def puller(hub: FakeHub, tools: Tools, root: Path, stop: threading.Event | None = None, **options: Any) -> Puller:
    stop = stop or threading.Event()
    request = PullRequest(repository=REPOSITORY, root=root, **options)
    retries, converter = Retries(3, 0.001, 0.01), tools.converter(stop)
    return Puller(
        HubClient(hub.url), request, Reporter(), stop, converter=converter, retries=retries, memory_bytes=1 << 40
    )


def test_pipeline_is_converted_in_an_environment_of_its_own(
    hub: FakeHub, tmp_path: Path, without_uv_package: None
) -> None:
    tools = Tools(tmp_path, EXPORTS.format(source=str(builtin_directory())))
    directory = puller(hub, tools, tmp_path / "models", weight_format="int4", arguments=("--ratio", "0.8")).run()
    assert (directory / "unet" / "openvino_model.xml").exists()
    assert not list(directory.rglob("*.safetensors"))
    assert find_pulled(tmp_path / "models", REPOSITORY, "main", "int4") == directory
    assert find_pulled(tmp_path / "models", REPOSITORY, "main", "int8") is None
    wanted = {path for path in hub.downloads() if path.endswith((".bin", ".ckpt", ".safetensors"))}
    assert wanted == {f"{component}/model.safetensors" for component in ("unet", "vae", "text_encoder")}
    install = tools.calls("uv")[1]
    assert install["arguments"][:2] == ["pip", "install"]
    assert "HF_TOKEN" not in install["environment"]
    assert install["environment"]["UV_TORCH_BACKEND"] == "cpu"
    assert install["environment"]["UV_OFFLINE"] == "1"
    (call,) = tools.calls("optimum")
    arguments, environment = call["arguments"], call["environment"]
    assert arguments[:2] == ["export", "openvino"]
    pairs = dict(zip(arguments[2:-1:2], arguments[3:-1:2], strict=True))
    assert pairs == {
        "--library": "diffusers", "--task": "text-to-image", "--model": str(tmp_path / "models/owner/.torch.pull"),
        "--weight-format": "int4", "--group-size": "64", "--group-size-fallback": "ignore", "--ratio": "0.8",
    }  # fmt: skip
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert not {"HF_TOKEN", "UV_OFFLINE"} & environment.keys()
    assert sorted(path.name for path in directory.parent.iterdir()) == [".torch.lock", "torch"]


def test_environment_is_made_once(hub: FakeHub, tmp_path: Path, without_uv_package: None) -> None:
    tools = Tools(tmp_path, EXPORTS.format(source=str(builtin_directory())))
    puller(hub, tools, tmp_path / "a").run()
    (tmp_path / "bin" / "uv").unlink()
    puller(hub, tools, tmp_path / "b").run()
    assert len(tools.calls("uv")) == 2
    assert len(tools.calls("optimum")) == 2


def test_missing_uv_is_an_error_before_the_download(hub: FakeHub, tmp_path: Path, without_uv_package: None) -> None:
    tools = Tools(tmp_path, "")
    (tmp_path / "bin" / "uv").unlink()
    with pytest.raises(HubError, match="pip install uv"):
        puller(hub, tools, tmp_path / "models").run()
    assert set(hub.downloads()) == {"model_index.json"}


def test_failed_conversion_shows_the_end_of_its_log_and_keeps_the_download(
    hub: FakeHub, tmp_path: Path, without_uv_package: None
) -> None:
    tools = Tools(tmp_path, "print('one'); sys.exit('no such\\x1b layer')")
    with pytest.raises(HubError, match=r"exit code 1: .*no such\? layer .*torch\.convert\.log"):
        puller(hub, tools, tmp_path / "models").run()
    assert (tmp_path / "models" / "owner" / "torch.convert.log").exists()
    hub.seen.clear()
    with pytest.raises(HubError, match="exit code 1"):
        puller(hub, tools, tmp_path / "models").run()
    assert set(hub.downloads()) == {"model_index.json"}


def test_result_that_cannot_be_served_is_an_error(hub: FakeHub, tmp_path: Path, without_uv_package: None) -> None:
    action = EXPORTS.format(source=str(builtin_directory()))
    action += "; shutil.rmtree(pathlib.Path(sys.argv[-1]) / 'tokenizer')"
    tools = Tools(tmp_path, action)
    with pytest.raises(HubError, match=r"owner/torch cannot be served: .*'tokenizer'"):
        puller(hub, tools, tmp_path / "models").run()
    assert not (tmp_path / "models" / REPOSITORY).exists()


def test_stop_ends_the_conversion(hub: FakeHub, tmp_path: Path, without_uv_package: None) -> None:
    tools, stop = Tools(tmp_path, "time.sleep(600)"), threading.Event()
    ended: list[BaseException] = []

    def pull() -> None:
        try:
            puller(hub, tools, tmp_path / "models", stop).run()
        except Stopped as error:
            ended.append(error)

    running = threading.Thread(target=pull)
    running.start()
    until = time.monotonic() + 60
    while not tools.calls("optimum") and time.monotonic() < until:
        time.sleep(0.02)
    stop.set()
    running.join(30)
    assert ended
    assert not is_alive(tools.calls("optimum")[0]["pid"])


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_weights_that_can_run_code_are_refused(
    hub: FakeHub, tmp_path: Path, without_uv_package: None, component: str
) -> None:
    for path in (tmp_path / "hub" / REPOSITORY / component).glob("*.safetensors"):
        path.unlink()
    with pytest.raises(HubError, match=rf"'{component}' has no plain safetensors file, only {component}/model\.bin"):
        puller(hub, Tools(tmp_path, ""), tmp_path / "models").run()
    assert not hub.downloads()


@pytest.mark.parametrize("argument", ["--trust-remote-code", "--trust", "--model=x", "-m", "--task", "--weight-format"])
def test_arguments_that_would_change_what_is_converted_are_refused(argument: str) -> None:
    check_arguments(["--ratio", "0.8", "--group-size", "32"])
    with pytest.raises(ValueError, match="cannot be given to the conversion"):
        check_arguments([argument])
