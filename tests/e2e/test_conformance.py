"""The reference server's vectors against ours: each passes, or is listed with the rule on which ours differs on purpose.

The list is a page, docs/conformance.md, made by this test: run it with WRITE_PAGES=1 to write the page anew.
"""

from __future__ import annotations

import fnmatch
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.live import LiveServer

ROOT = Path(__file__).parents[2]
VECTORS = json.loads((ROOT / "tests" / "data" / "model-server.json").read_text("utf-8"))
PAGE = ROOT / "docs" / "conformance.md"

# The vectors' servers that are one model's limits here; each is a model of that name in one process.
LIMITS: dict[str, dict[str, Any]] = {
    "default": {"default_num_inference_steps": 2},
    "ut": {"default_num_inference_steps": 2, "max_num_inference_steps": 10, "max_guidance_scale": 200},
    "limit4": {"max_num_images_per_prompt": 4, "default_num_inference_steps": 2},
    "defres": {"default_resolution": "512x256", "default_num_inference_steps": 2},
    "maxres512": {"max_resolution": "512x512"},
}
SAME_AS = {
    "mockbackend": "default",
    "ut_mockbackend": "ut",
    "metrics": "default",
    "apikey": "default",
    "apikey_metrics": "default",
}
GUARDED = ("apikey", "apikey_metrics")  # servers that ask for a key


@dataclass(frozen=True)
class Difference:
    """Vectors (by pattern) on which ours differs: the status ours gives, and the rule it follows."""

    pattern: str
    status: int | None  # None: not run, for ours has nothing to run it against
    rule: str


LATER_LORA = "LoRA: later"
LATER_HUB = "hub, conversion and the reference server's own configuration files: later, or not planned"
UNAUTHORIZED = "status: a missing or wrong key is 401"
EVERY_PATH = "API keys: every path asks for the key but health, the page, and kept pictures"
KEY = "1234"
UNKNOWN = "unknown field: every name that a shipped client has is in our table, and served where it can be"
DIFFERENCES = (
    Difference("lora.*", None, LATER_LORA),
    Difference("edit.err.unknown.lora_bracket", None, LATER_LORA),
    Difference("route.composite_alias", None, LATER_LORA),
    Difference("cli*", None, LATER_HUB),
    Difference("graph*", None, LATER_HUB),
    Difference("export*", None, LATER_HUB),
    Difference("task_detect*", None, LATER_HUB),
    Difference("auth.[2345]", 401, UNAUTHORIZED),
    Difference("auth.before_parsing", 401, UNAUTHORIZED),
    Difference("auth.open.*", 401, EVERY_PATH),
    Difference("auth.empty_key_file", None, "a key file without a key stops the start"),
    Difference(
        "auth.key_file_right_trim", None, "blanks around a key in the file are no part of it: held by unit tests"
    ),
    Difference("resp.*", None, "what a reply makes of the pictures is held by unit and end-to-end tests"),
    Difference("*.static.*", None, "one compiled shape for a model (NPU): later; ours serves any size within limits"),
    Difference(
        "*.na.*", None, "which tasks a model has is read from its directory, not configured: held by unit tests"
    ),
    Difference(
        "edit.genai_fields_all", 400, "fields of text encoders that a model lacks are 400 before any device time"
    ),
    Difference("edit.backend.max_sequence_length_513", None, "no model of that family is packaged: held by unit tests"),
    Difference("edit.above_max_resolution", 400, "limits: the operator's are enforced on each request"),
    Difference("edit.err.uint64.0", 200, "seed: -1 is a random one, as many clients mean it"),
    Difference("edit.seed_absent_is_42", 200, "seed: random unless given, always reported"),
    Difference("edit.duplicate_text_field_first_wins", 400, "doubles: fine when equal, 400 when not"),
    Difference("edit.duplicate_image_first_wins", 400, "several images: never a silent first image"),
    Difference("edit.mask_empty_file_ignored", 400, "an empty mask is a mistake of the client's, and is told"),
    Difference("edit.err.image_array_brackets", 200, "field forms: x[] is x"),
    Difference("edit.err.no_boundary", 400, "status: a malformed form is the client's mistake"),
    Difference("edit.err.empty_filename", 400, "status: a malformed form is the client's mistake"),
    Difference("edit.err.text_plain", 415, "status: a media type that the path does not take"),
    Difference("edit.err.float.3", 200, "field forms: the text null is absent"),
    Difference("edit.err.unknown.user", 200, UNKNOWN),
    Difference("edit.err.unknown.seed", 200, UNKNOWN),
    Difference("edit.err.unknown.empty_value", 200, "field forms: an empty value is absent"),
    Difference("edit.err.stream_false", 200, UNKNOWN),
    Difference("edit.err.stream_true", 200, "stream: served"),
    Difference("edit.backend.size_not_multiple", 200, "size: any WxH is served exactly"),
    Difference("edit.err.size_and_width*", 200, "doubles: fine when equal, 400 when not"),
    Difference(
        "edit.default_steps_above_max", None, "defaults are checked against the limits at start, which is then refused"
    ),
    Difference("edit.prompt_longer_than_context", 400, "prompt too long: 400 with both numbers, never silently cut"),
    Difference("edit.err.n_and_num_images", 200, "doubles: fine when equal, 400 when not"),
    Difference("gen.err.n_and_num", 200, "doubles: fine when equal, 400 when not"),
    Difference("gen.err.size_w_h", 200, "doubles: fine when equal, 400 when not"),
    Difference("gen.err.size_h", 200, "doubles: fine when equal, 400 when not"),
    Difference("gen.err.size_type.1", 200, "field forms: null is absent"),
    Difference("gen.err.negative_prompt_type.2", 200, "field forms: null is absent"),
    Difference("gen.err.int.2", 200, "field forms: null is absent"),
    Difference("gen.err.int64.2", 200, "field forms: null is absent"),
    Difference("gen.err.uint.4", 200, "field forms: null is absent"),
    Difference("gen.err.response_format_null", 200, "field forms: null is absent"),
    Difference("gen.err.float.3", 200, "numbers: a whole number is a number"),
    Difference("gen.err.unknown.user", 200, UNKNOWN),
    Difference("gen.ok.image_ignored", 400, "a field that an endpoint does not take is told, never ignored"),
    Difference("gen.err.multipart", 200, "body: generations take multipart too"),
    Difference("gen.err.model_not_string", 400, "status: 400, not 412"),
    Difference("gen.err.json_depth", 400, "status: 400, not 412"),
    Difference("*.no_model", 200, "model left out: the configured default"),
    Difference("gen.err.model_empty", 200, "model left out: the configured default"),
    Difference("route.multipart_without_model", 200, "model left out: the configured default"),
    Difference("route.multipart_no_model_empty_path", 404, "status: an unknown path is 404"),
    Difference("route.variations", 200, "variations: served"),
    Difference("route.other_v3_path", 404, "status: an unknown path is 404"),
    Difference("route.get_edits", 405, "status: 405 with Allow"),
    Difference("srv.health.post", 405, "status: 405 with Allow"),
    Difference("srv.health.not_ready", None, "held by the start-up tests"),
    Difference("srv.models.retrieve_unknown", 404, "status: an unknown model is 404"),
    Difference("srv.models.retrieve_empty", 200, "a trailing slash is the list"),
    Difference("srv.config.reload_get", 405, "status: 405 with Allow"),
    Difference(
        "srv.config.reload_changed",
        None,
        "reload: held by the fault tests; the answer is 200 as soon as new workers start",
    ),
    Difference("srv.metrics.disabled", 200, "metrics: always on"),
    Difference("srv.options", 204, "OPTIONS has no content"),
    Difference(
        "route.path_traversal", 404, "status: a path is a name in our table or it is 404; no file is served by path"
    ),
)


def file_bytes() -> dict[str, bytes]:
    """The vectors' named inputs."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    rgb = Image.fromarray(colours).resize((512, 512), Image.Resampling.NEAREST)
    alpha = Image.new("L", (512, 512), 255)
    alpha.paste(0, (0, 0, 100, 100))
    half = np.zeros((512, 512), np.uint8)
    half[:, 256:] = 255

    def save(image: Image.Image, form: str) -> bytes:
        stream = io.BytesIO()
        image.save(stream, form)
        return stream.getvalue()

    whole = save(rgb, "PNG")
    return {
        "png_rgb_512": whole,
        "png_rgba_512": save(Image.merge("RGBA", [*rgb.split(), alpha]), "PNG"),
        "png_gray_512": save(rgb.convert("L"), "PNG"),
        "jpeg_rgb_512": save(rgb, "JPEG"),
        "webp_rgb_64": save(rgb.resize((64, 64)), "WEBP"),
        "mask_half_512": save(Image.fromarray(half), "PNG"),
        "mask_half_256": save(Image.fromarray(half[:256, 128:384]), "PNG"),
        "garbage": bytes(range(16)),
        "empty": b"",
        "text_file": b"hello",
        "png_truncated": whole[: len(whole) // 2],
    }


FILES = file_bytes()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    yield from serving_every_limit(tmp_path_factory.mktemp("conformance"))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer("--api_key", KEY, "--model_name", "default", spool=tmp_path_factory.mktemp("guarded")) as server:
        yield server


def serving_every_limit(folder: Path) -> Iterator[LiveServer]:
    """A server with a model for each set of limits."""
    tables = ['default_model = "default"']
    for name, limits in LIMITS.items():
        pinned = {"streams": 2, "threads": 1, "max_batch": 8}
        lines = [f"{key} = {json.dumps(value)}" for key, value in {**limits, **pinned}.items()]
        tables.append("\n".join(["[[model]]", f'name = "{name}"', *lines]))
    (folder / "c.toml").write_text("\n".join(tables))
    with (
        LiveServer("--config", str(folder / "c.toml"), spool=folder) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        waiting = set(LIMITS)
        while waiting:
            waiting = {name for name in waiting if client.get(f"/v2/models/{name}/ready").status_code != 200}
        yield server


def difference(vector: dict[str, Any]) -> Difference | None:
    return next((d for d in DIFFERENCES if fnmatch.fnmatch(vector["id"], d.pattern)), None)


def send(client: httpx.Client, vector: dict[str, Any]) -> httpx.Response:
    served = SAME_AS.get(vector.get("server", "default"), vector.get("server", "default"))

    def model(value: Any) -> Any:
        return served if value == "m" else value

    headers = dict(vector.get("headers") or {})
    path = vector["endpoint"].replace("/m/", f"/{served}/")
    if vector.get("multipart") is not None:
        parts: list[tuple[str, Any]] = []
        for part in vector["multipart"]:
            if "file" in part:
                parts.append((part["name"], (f"{part['file']}.bin", FILES[part["file"]], "application/octet-stream")))
            else:
                value = model(part["value"]) if part["name"] == "model" else part["value"]
                parts.append((part["name"], (None, value.encode())))
        return client.request(vector["method"], path, files=parts, headers=headers, timeout=120)
    if vector.get("json") is not None:
        document = {key: model(value) if key == "model" else value for key, value in vector["json"].items()}
        return client.request(vector["method"], path, json=document, headers=headers, timeout=120)
    content = vector.get("raw_body")
    if vector.get("content_type"):
        headers["content-type"] = vector["content_type"]
    return client.request(
        vector["method"], path, content=content.encode() if content else None, headers=headers, timeout=120
    )


def pictures_made(client: httpx.Client) -> float:
    lines = client.get("/metrics", headers={"authorization": f"Bearer {KEY}"}).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("ovserve_pictures_total"))


RUN = [v for v in VECTORS["vectors"] if v.get("method") and ((d := difference(v)) is None or d.status is not None)]


@pytest.mark.parametrize("vector", RUN, ids=lambda vector: vector["id"])
def test_a_vector(request: pytest.FixtureRequest, vector: dict[str, Any]) -> None:
    live: LiveServer = request.getfixturevalue("guarded" if vector.get("server") in GUARDED else "live")
    wanted = vector["expect"]["status"]
    differs = difference(vector)
    statuses = [differs.status] if differs else wanted if isinstance(wanted, list) else [wanted]
    with httpx.Client(base_url=live.url) as client:
        before = pictures_made(client)
        reply = send(client, vector)
        if reply.status_code >= 400:
            assert pictures_made(client) == before, "a bad input reached the engine"
    assert reply.status_code in statuses, reply.text[:400]
    if reply.status_code >= 400:
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert reply.headers["x-request-id"]
        if (
            reply.status_code == 400
            and vector["group"] != "route"
            and error["code"] not in ("invalid_request", "malformed_request")
        ):
            assert error["param"], error
            assert error["param"] in error["message"]
    elif reply.status_code == 200 and "images" in vector["endpoint"] and vector["id"] != "edit.err.stream_true":
        document = reply.json()
        expected = vector["expect"]
        assert document["created"]
        if "n_images" in expected:
            assert len(document["data"]) == expected["n_images"]
        if "width" in expected:
            assert document["size"] == f"{expected['width']}x{expected['height']}"


def test_at_least_sixty_bad_inputs_are_among_them(capsys: pytest.CaptureFixture[str]) -> None:
    rules: dict[str, list[str]] = {}
    for vector in RUN:
        differs = difference(vector)
        status = differs.status if differs else vector["expect"]["status"]
        if isinstance(status, int) and 400 <= status < 500:
            rules.setdefault(vector["id"].rsplit(".", 1)[0], []).append(vector["id"])
    with capsys.disabled():
        for rule, cases in rules.items():
            print(f"\n{rule}: {', '.join(case.rsplit('.', 1)[1] for case in cases)}", end="")
    assert sum(min(5, len(cases)) for cases in rules.values()) >= 60


def test_every_difference_is_used_and_has_its_rule() -> None:
    for differs in DIFFERENCES:
        assert any(difference(vector) is differs for vector in VECTORS["vectors"]), differs.pattern


def page() -> str:
    """The page: what passes as it stands, what differs and why, what is for later."""
    passes, differs, later = [], [], []
    for vector in VECTORS["vectors"]:
        found = difference(vector)
        if found is None or not found.rule:
            (passes if vector.get("method") else later).append((vector["id"], ""))
        elif found.status is None:
            later.append((vector["id"], found.rule))
        else:
            differs.append((vector["id"], f"{vector['expect'].get('status')} there, {found.status} here: {found.rule}"))
    lines = [
        "# Conformance with the reference server",
        "",
        "Made by `tests/e2e/test_conformance.py` from vectors that describe OpenVINO Model Server's image endpoint; each is sent to a live",
        "server with the built-in model. `WRITE_PAGES=1 scripts/test tests/e2e/test_conformance.py` writes this page.",
        "",
        f"{len(passes)} vectors pass as they stand, {len(differs)} differ on purpose, {len(later)} have nothing here to run against.",
        "",
        "## Different on purpose",
        "",
        *(f"- `{name}`: {why}" for name, why in differs),
        "",
        "## Not run",
        "",
        *(f"- `{name}`: {why}" for name, why in later),
        "",
        "## The same",
        "",
        ", ".join(f"`{name}`" for name, _ in passes),
        "",
    ]
    return "\n".join(lines)


def test_the_page_is_what_this_test_says() -> None:
    if os.environ.get("WRITE_PAGES"):
        PAGE.write_text(page(), "utf-8")
    assert PAGE.read_text("utf-8") == page()
