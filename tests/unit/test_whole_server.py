"""The whole server with the built-in model, and the commands that are its clients, called in this process."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from ovserve.cli.commands import ExitCode
from ovserve.cli.main import main
from tests.serverprocess import server_process

pytestmark = pytest.mark.engine

PROMPT = "a green circle on a blue background"
QUICK = ["--steps", "3", "--seed", "3", "--no_show"]
ADMIN = "adm-test"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server_process(tmp_path_factory.mktemp("spool"), "--admin_key", ADMIN, "--log_level", "warning") as url:
        yield url


@pytest.fixture
def folder(tmp_path: Path, data: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current directory of the commands, with one picture in it."""
    shutil.copy(data / "red_circle.png", tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OVSERVE_URL", url)
    for name in ("OVSERVE_API_KEY", "OPENAI_API_KEY", "OVSERVE_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def pixels(source: Path | io.BytesIO) -> np.ndarray:
    with Image.open(source) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def is_green(pixel: np.ndarray) -> bool:
    return bool(pixel[1] > max(pixel[0], pixel[2]))


def test_edit_repaints_the_box_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["edit", "photo.png", "-p", "a yellow star", "--mask_box", "64,64,128,128", "-o", "out.png", *QUICK]
    assert main(command) == ExitCode.OK
    assert capsys.readouterr().out == "out.png  seed 3\n"
    before, after = pixels(folder / "photo.png"), pixels(folder / "out.png")
    changed = np.any(before != after, axis=2)
    assert changed[64:192, 64:192].any()
    changed[64:192, 64:192] = False
    assert not changed.any()


def test_generate_draws_the_prompt_with_the_seed_in_the_report(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "-p", PROMPT, "--seed", "3", "--no_show", "-o", "circle.png", "--json"]
    assert main(command) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["seed"] == 3
    drawn = pixels(folder / "circle.png")
    assert is_green(drawn[drawn.shape[0] // 2, drawn.shape[1] // 2])


def test_vary_writes_a_variation_beside_each_picture(folder: Path) -> None:
    shutil.copy("photo.png", "other.png")
    assert main(["vary", "*.png", *QUICK]) == ExitCode.OK
    assert sorted(path.name for path in folder.glob("*-varied.png")) == ["other-varied.png", "photo-varied.png"]
    assert pixels(folder / "photo-varied.png").shape == pixels(folder / "photo.png").shape


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["edit", "photo.png", "-p", "x", "--strength", "7"], ExitCode.REFUSED, "strength"),
        (["edit", "photo.png", "-p", "x", "--model", "nothing-like-it"], ExitCode.REFUSED, "nothing-like-it"),
        (["edit", "missing.png", "-p", "x"], ExitCode.USAGE, "missing.png"),
        (["generate", "-p", "x", "--url", "http://127.0.0.1:9"], ExitCode.NO_SERVER, "ovserve serve"),
        (["models", "--unload", "ovserve-builtin"], ExitCode.TRANSIENT, "403"),
        (["bench", "http://127.0.0.1:9"], ExitCode.NO_SERVER, "127.0.0.1:9"),
        (["bench", "--picture", "missing.png"], ExitCode.USAGE, "missing.png"),
    ],
)
def test_failure_is_one_line_and_an_exit_code(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: ExitCode, part: str
) -> None:
    assert main(arguments) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert part in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["edit"], ["edit", "photo.png"], ["vary"], ["bench", "--clients", "0"]])
def test_wrong_command_line_ends_with_the_usage_code(folder: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == ExitCode.USAGE


def test_bench_counts_every_request(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--clients", "2", "--requests", "4", "--steps", "2"]
    assert main([*arguments, "--json"]) == ExitCode.OK
    result = json.loads(capsys.readouterr().out)
    assert (result["answered"], result["failed"]) == (4, 0)
    assert main([*arguments, "--picture", "photo.png"]) == ExitCode.OK
    assert capsys.readouterr().out.startswith("4 pictures in ")
    assert main([*arguments, "--size", "huge"]) == ExitCode.REFUSED
    assert "failed, 4 times: " in capsys.readouterr().out


def test_models_are_listed_unloaded_and_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("OVSERVE_ADMIN_KEY", ADMIN)
    for change, state in (("--load", "ready"), ("--unload", "unloaded"), ("--load", "ready")):
        assert main(["models", "--url", url, change, "ovserve-builtin"]) == ExitCode.OK
        head, row = capsys.readouterr().out.splitlines()
        assert head.split()[:3] == ["MODEL", "STATE", "DEVICE"]
        assert row.split()[:3] == ["ovserve-builtin", state, "CPU"]


def test_pictures_come_as_files_links_streams_and_from_json_bodies(folder: Path, url: str) -> None:
    with httpx.Client(base_url=url, timeout=120) as client:
        picture = (folder / "photo.png").read_bytes()
        common = {"prompt": PROMPT, "num_inference_steps": "3", "seed": "3"}
        reply = client.post("/v3/images/edits", data=common, files={"image": ("a.png", picture, "image/png")})
        expected = base64.b64decode(reply.json()["data"][0]["b64_json"])
        link = client.post(
            "/v1/images/edits", data={**common, "response_format": "url"}, files={"image": ("a.png", picture)}
        ).json()["data"][0]["url"]
        assert client.get(link).content == expected
        images = [{"image_url": "data:image/png;base64," + base64.b64encode(picture).decode()}]
        body = {"prompt": PROMPT, "num_inference_steps": 3, "seed": 3, "images": images}
        assert base64.b64decode(client.post("/v3/images/edits", json=body).json()["data"][0]["b64_json"]) == expected
        for steps, kinds in (("3", {"completed"}), ("40", {"partial_image", "completed"})):
            with client.stream(
                "POST",
                "/v3/images/edits",
                data={**common, "num_inference_steps": steps, "stream": "true", "partial_images": "1"},
                files={"image": ("a.png", picture)},
            ) as reply:
                events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]
            # A preview is left out if the picture is finished first, as with few steps on a busy machine.
            assert kinds <= {event["type"].removeprefix("image_edit.") for event in events}
            assert events[-1]["type"] == "image_edit.completed"
            if steps == "3":
                assert base64.b64decode(events[-1]["b64_json"]) == expected


def test_sdapi_makes_the_same_picture_as_the_images_api(folder: Path, url: str) -> None:
    with httpx.Client(base_url=url, timeout=120) as client:
        body = {"prompt": PROMPT, "steps": 3, "seed": 3, "width": 256, "height": 256}
        drawn = client.post("/sdapi/v1/txt2img", json=body).json()
        reply = client.post(
            "/v3/images/generations",
            json={"prompt": PROMPT, "num_inference_steps": 3, "seed": 3, "size": "256x256"},
        ).json()
        assert np.array_equal(
            pixels(io.BytesIO(base64.b64decode(drawn["images"][0]))),
            pixels(io.BytesIO(base64.b64decode(reply["data"][0]["b64_json"]))),
        )
        assert json.loads(drawn["info"])["seed"] == 3
        body["init_images"] = [base64.b64encode((folder / "photo.png").read_bytes()).decode()]
        assert len(client.post("/sdapi/v1/img2img", json={**body, "batch_size": 2}).json()["images"]) == 2
        text = client.post("/sdapi/v1/png-info", json={"image": drawn["images"][0]}).json()["info"]
        assert text.splitlines()[0] == PROMPT
        assert client.post("/sdapi/v1/interrupt", json={}).status_code == 200
        assert client.get("/sdapi/v1/progress").json()["progress"] == 0
        assert client.post("/sdapi/v1/img2img", json={"prompt": "x"}).status_code == 404
        for route in ("sd-models", "samplers", "schedulers", "options"):
            assert client.get(f"/sdapi/v1/{route}").json()


def test_reload_is_reported_and_needs_the_admin_key(url: str) -> None:
    with httpx.Client(base_url=url, timeout=120) as client:
        assert client.post("/v1/config/reload").status_code == 403
        reply = client.post("/v1/config/reload?wait_s=60", headers={"authorization": f"Bearer {ADMIN}"})
        assert reply.status_code == 200, reply.text
        assert client.get("/v2/health/ready").status_code == 200
        assert client.get("/metrics").text.count("ovserve_") > 50
