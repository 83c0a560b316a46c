"""Replies: formats, transparency, stored pictures, documents about the API."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.live import LiveServer

PROMPT = "a green circle on a blue background"


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def edit(client: httpx.Client, image: bytes, **fields: str) -> httpx.Response:
    return client.post(
        "/v1/images/edits", data={"prompt": PROMPT, "seed": "3", **fields}, files={"image": ("a.png", image)}
    )


def picture(reply: httpx.Response) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(reply.json()["data"][0]["b64_json"])))


@pytest.mark.parametrize(("form", "known_as"), [("png", "PNG"), ("jpeg", "JPEG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_every_output_format(client: httpx.Client, data: Path, form: str, known_as: str) -> None:
    reply = edit(client, (data / "red_circle.png").read_bytes(), output_format=form)
    assert picture(reply).format == known_as
    assert reply.json()["output_format"] == known_as.lower()


def test_lower_compression_quality_makes_smaller_files(client: httpx.Client, data: Path) -> None:
    image = (data / "red_circle.png").read_bytes()
    sizes = [
        len(
            edit(client, image, output_format="jpeg", output_compression=quality, metadata="0").json()["data"][0][
                "b64_json"
            ]
        )
        for quality in ("10", "90")
    ]
    assert sizes[0] < sizes[1]


def test_webp_at_full_quality_is_lossless(client: httpx.Client, data: Path) -> None:
    image = (data / "red_circle.png").read_bytes()
    png, webp = (np.asarray(picture(edit(client, image, output_format=form))) for form in ("png", "webp"))
    assert np.array_equal(png, webp)


def test_transparent_background_keeps_the_alpha_of_the_source(client: httpx.Client, data: Path) -> None:
    source = np.asarray(Image.open(data / "mask_alpha.png"))
    reply = edit(client, (data / "mask_alpha.png").read_bytes(), background="transparent")
    assert reply.json()["background"] == "transparent"
    assert np.array_equal(np.asarray(picture(reply))[..., 3], source[..., 3])


def test_transparent_background_without_alpha_is_rejected(client: httpx.Client, data: Path) -> None:
    reply = edit(client, (data / "red_circle.png").read_bytes(), background="transparent")
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "background"


def test_url_serves_ranges_and_survives_a_restart(tmp_path: Path, data: Path) -> None:
    store = str(tmp_path / "kept")
    with (
        LiveServer("--store_dir", store, "--url_ttl_s", "600", spool=tmp_path) as live,
        httpx.Client(base_url=live.url, timeout=60) as client,
    ):
        reply = edit(client, (data / "red_circle.png").read_bytes(), response_format="url", output_format="webp")
        url = reply.json()["data"][0]["url"]
        assert url.startswith(f"{live.url}/v1/images/files/")
        path = url.removeprefix(live.url)
        whole = client.get(path)
        assert whole.headers["content-type"] == "image/webp"
        assert Image.open(io.BytesIO(whole.content)).size == (256, 256)
        part = client.get(path, headers={"range": "bytes=4-9"})
        assert (part.status_code, part.content) == (206, whole.content[4:10])
        assert part.headers["content-range"] == f"bytes 4-9/{len(whole.content)}"
        assert client.get(path, headers={"range": "bytes=-5"}).content == whole.content[-5:]
        assert client.get(path, headers={"range": "bytes=999999-"}).status_code == 416
        assert client.get(path, headers={"if-none-match": whole.headers["etag"]}).status_code == 304
        for known in (f'"other", W/{whole.headers["etag"]}', "*"):  # a list with a tag that a proxy made weak; any tag
            assert client.get(path, headers={"if-none-match": known}).status_code == 304
        headed = client.head(path, headers={"range": "bytes=0-3"})  # Range applies only to GET
        assert (headed.status_code, headed.headers["content-length"]) == (200, str(len(whole.content)))
        other = path[:-6] + ("b" if path[-6] == "a" else "a") + ".webp"
        for wrong in ("/v1/images/files/x.png", "/v1/images/files/..%2f..%2fetc%2fpasswd", other):
            assert client.get(wrong).status_code == 404
    with LiveServer("--store_dir", store, "--url_ttl_s", "600", spool=tmp_path) as live:
        assert httpx.get(live.url + path).content == whole.content


def test_url_expires(tmp_path: Path, data: Path) -> None:
    with (
        LiveServer("--store_dir", str(tmp_path / "kept"), "--url_ttl_s", "1", spool=tmp_path) as live,
        httpx.Client(base_url=live.url, timeout=60) as client,
    ):
        made = time.time()
        url = edit(client, (data / "red_circle.png").read_bytes(), response_format="url").json()["data"][0]["url"]
        while (status := client.get(url).status_code) == 200:
            assert time.time() < made + 30
        assert status == 404


def test_openapi_document_has_the_fields(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    form = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["image", "prompt"]
    assert {"strength", "mask_mode", "seed", "stream"} <= set(form["properties"])


def test_metrics_count_done_jobs(client: httpx.Client, data: Path) -> None:
    def done() -> float:
        page = client.get("/metrics").text
        lines = [
            line
            for line in page.splitlines()
            if line.startswith('ovserve_jobs_total{model="ovserve-builtin",state="done"}')
        ]
        return float(lines[0].split()[-1]) if lines else 0.0

    before = done()
    assert edit(client, (data / "red_circle.png").read_bytes()).status_code == 200
    assert done() == before + 1


def test_json_edit_with_data_urls_equals_the_form(client: httpx.Client, data: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode((data / "red_circle.png").read_bytes()).decode()
    mask = "data:image/png;base64," + base64.b64encode((data / "mask_white.png").read_bytes()).decode()
    document = {"prompt": PROMPT, "images": [{"image_url": url}], "mask": {"image_url": mask}, "seed": 3, "n": 1}
    reply = client.post("/v1/images/edits", json=document)
    assert reply.status_code == 200
    form = client.post(
        "/v1/images/edits",
        data={"prompt": PROMPT, "seed": "3"},
        files={
            "image": ("a.png", (data / "red_circle.png").read_bytes()),
            "mask": ("m.png", (data / "mask_white.png").read_bytes()),
        },
    )
    assert form.json()["data"] == reply.json()["data"]


@pytest.mark.parametrize(
    "path",
    [
        "/openai/deployments/ovserve-builtin/images/edits?api-version=2025-04-01-preview",
        "/v3/ovserve-builtin/images/edits",
    ],
)
def test_path_names_the_model(client: httpx.Client, data: Path, path: str) -> None:
    reply = client.post(
        path, data={"prompt": PROMPT}, files={"image": ("a.png", (data / "red_circle.png").read_bytes())}
    )
    assert reply.status_code == 200
    other = client.post("/v3/ghost/images/edits", data={"prompt": PROMPT}, files={"image": ("a.png", b"x")})
    assert other.status_code == 404


def test_preflight_of_a_browser(client: httpx.Client) -> None:
    asked = {
        "origin": "http://localhost:3000",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    reply = client.options("/v1/images/edits", headers=asked)
    assert reply.status_code == 204
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert reply.headers["access-control-allow-headers"] == "authorization,content-type"
    assert reply.headers["access-control-allow-origin"] == "http://localhost:3000"


def test_moderation_is_reported_as_unchecked(client: httpx.Client, data: Path) -> None:
    reply = edit(client, (data / "red_circle.png").read_bytes(), moderation="auto", user="me")
    assert reply.json()["moderation"] == {"checked": False}
    assert reply.json()["safety_identifier"] == "me"
