"""The programs in docs/examples run against a live server with the built-in model."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.live import LiveServer

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PACKAGES = Path(__file__).parents[2] / ".venv" / "examples"  # gradio and mcp, with what they need
LIMIT_S = 120


def run(name: str, *arguments: object, cwd: Path, url: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OVSERVE_URL": url},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_every_example_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text("utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f"[{path.name}]({path.name})" in listed


def test_products_keep_their_pixels(server: LiveServer, data: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    source = Image.open(data / "red_circle.png").convert("RGB")
    is_product = np.asarray(source)[:, :, 0] > 150
    alpha = Image.fromarray((is_product * 255).astype(np.uint8))
    for name in ("a.png", "b.png"):
        Image.merge("RGBA", [*source.split(), alpha]).save(tmp_path / "photos" / name)
    output = run("product_backgrounds.py", "photos", "out", "on a green background", cwd=tmp_path, url=server.url)
    assert output.count("seed") == 2
    result = pixels(tmp_path / "out" / "a.png")
    assert np.array_equal(result[is_product], np.asarray(source)[is_product])
    corner = result[:30, :30].mean(axis=(0, 1))
    assert corner[1] > corner[2]  # was blue, is green


def test_segment_is_replaced(server: LiveServer, data: Path, tmp_path: Path) -> None:
    prompt = "a yellow circle on a blue background"
    run("segment_inpaint.py", data / "red_circle.png", 128, 128, prompt, "out.png", cwd=tmp_path, url=server.url)
    source, result = pixels(data / "red_circle.png"), pixels(tmp_path / "out.png")
    assert (result[128, 128] != source[128, 128]).any()
    assert np.array_equal(result[:40], source[:40])


def test_storyboard_has_a_picture_for_each_scene(server: LiveServer, tmp_path: Path) -> None:
    (tmp_path / "scenes.txt").write_text("a red circle on a white background\n\na blue star on a white background\n")
    run("storyboard.py", "scenes.txt", "board.png", 5, cwd=tmp_path, url=server.url)
    first = (tmp_path / "board.png").read_bytes()
    assert Image.open(io.BytesIO(first)).size == (3 * 256, 256)
    run("storyboard.py", "scenes.txt", "board.png", 5, cwd=tmp_path, url=server.url)
    assert (tmp_path / "board.png").read_bytes() == first


def drive(code: str, package: str, url: str, cwd: Path) -> None:
    """Run Python code that imports an example, in a process of its own: these packages leave event loops open."""
    if not (PACKAGES / package).is_dir():
        pytest.skip(f"the package {package} is not installed; scripts/test-all installs it")
    paths = os.pathsep.join(map(str, (EXAMPLES, PACKAGES)))
    environment = os.environ | {"OVSERVE_URL": url, "PYTHONPATH": paths, "GRADIO_ANALYTICS_ENABLED": "False"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.heavy  # the packages are large
def test_mcp_tools_return_pictures(server: LiveServer, data: Path, tmp_path: Path) -> None:
    code = f"""
import asyncio, base64, pathlib
from mcp import Client
import mcp_server

async def call():
    async with Client(mcp_server.server) as session:
        made = await session.call_tool("generate_image", {{"prompt": "a red circle on a blue background", "seed": 3}})
        edited = await session.call_tool(
            "edit_image", {{"path": {str(data / "red_circle.png")!r}, "prompt": "a green circle", "strength": 0.5}})
        for name, result in (("made", made), ("edited", edited)):
            pathlib.Path(name + ".png").write_bytes(base64.b64decode(result.content[0].data))

asyncio.run(call())
"""
    drive(code, "mcp", server.url, tmp_path)
    for name in ("made", "edited"):
        assert pixels(tmp_path / f"{name}.png").shape == (256, 256, 3)


@pytest.mark.heavy  # the packages are large
def test_gradio_app_edits_the_painted_part(server: LiveServer, data: Path, tmp_path: Path) -> None:
    code = f"""
from PIL import Image
import gradio_app

source = Image.open({str(data / "red_circle.png")!r}).convert("RGBA")
layer = Image.new("RGBA", source.size)
layer.paste((255, 0, 0, 255), (64, 64, 192, 192))
prompt = "a yellow star on a blue background"
gradio_app.edit({{"background": source, "layers": [layer], "composite": source}}, prompt, 1.0).save("result.png")
"""
    drive(code, "gradio", server.url, tmp_path)
    changed = (pixels(tmp_path / "result.png") != pixels(data / "red_circle.png")).any(axis=2)
    assert changed[64:192, 64:192].any()
    changed[64:192, 64:192] = False
    assert not changed.any()
