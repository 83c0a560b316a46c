"""Conformance with OpenVINO Model Server: each vector passes, or is listed with the rule by which ovserve differs.

This test also writes that list, docs/conformance.md, when it runs with WRITE_PAGES=1.
"""

from __future__ import annotations

import fnmatch
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from ovserve.cli.export import graph_options
from ovserve.cli.serve import parse_arguments
from ovserve.errors import StartupError
from ovserve.front.keys import read_keys
from ovserve.models.classes import class_named
from ovserve.models.profile import builtin_directory
from ovserve.settings.loras import parse_source_loras
from ovserve.settings.modelserver.graph import write_graph
from ovserve.settings.options import ModelSettings
from ovserve.settings.sources import load_settings
from tests.live import BUILTIN_PATH, LiveServer
from tests.loras import write_adapter
from tests.modelserver import graph_text

ROOT = Path(__file__).parents[2]
VECTORS = json.loads((ROOT / "tests" / "data" / "model-server.json").read_text("utf-8"))
PAGE = ROOT / "docs" / "conformance.md"

# Servers of the vectors that differ only in limits: here each is a model with that name in one server.
LIMITS: dict[str, dict[str, Any]] = {
    "default": {"default_num_inference_steps": 2},
    "ut": {"default_num_inference_steps": 2, "max_num_inference_steps": 10, "max_guidance_scale": 200},
    "limit4": {"max_num_images_per_prompt": 4, "default_num_inference_steps": 2},
    "defres": {"default_resolution": "512x256", "default_num_inference_steps": 2},
    "maxres512": {"max_resolution": "512x512", "default_num_inference_steps": 2},
    "static_multi": {"resolution": "512x256 1024x512 2048x1024", "default_num_inference_steps": 2},
    "static_n4": {"resolution": "512x256", "num_images_per_prompt": 4, "default_num_inference_steps": 2},
    "static_g71": {"resolution": "512x256", "guidance_scale": 7.1, "default_num_inference_steps": 2},
}
ADAPTERS = ("xray", "anime", "vector")  # of the last model, which is also the vectors' server with adapters
COMPOSITE = "[[model.composite]]\nalias = 'blend'\ncomponents = {xray = 0.5, anime = 0.5}"
SAME_AS = {
    "mockbackend": "default",
    "ut_mockbackend": "ut",
    "metrics": "default",
    "apikey": "default",
    "apikey_metrics": "default",
    "lora": "maxres512",
    "lora_static": "maxres512",
}
GUARDED = ("apikey", "apikey_metrics")  # servers that require an API key


@dataclass(frozen=True)
class Difference:
    """Vectors (by pattern) for which ovserve differs, with its status code and its rule."""

    pattern: str
    status: int | str | None  # None: not run, because ovserve does not have the tested feature; ok, error: at the start
    rule: str


DYNAMIC = "The weights of adapters can always be changed by a request; there is no static mode."
BEFORE = "Options that contradict each other are refused at the start, before anything is downloaded."
UNAUTHORIZED = "A missing or wrong API key gets 401."
OPERATORS = "A reload needs an admin key or the admin listener; SIGHUP works as well."
EVERY_PATH = (
    "If API keys are configured, every path requires one, except health checks, the page at `/` and kept pictures."
)
KEY = "1234"
UNKNOWN = "The field table contains every field that existing clients send; each is served where possible."
NULL = "`null` means that the field is absent."
REPEATED = "A repeated field is accepted if its values are equal, and gets 400 if they differ."
SAME_VALUE = "Two fields for one value are accepted if they agree, and get 400 if they differ."
DEFAULT_MODEL = "If `model` is absent or empty, the default model is used, or the only one."
DIFFERENCES = (
    Difference("lora.err.static*", 200, DYNAMIC),
    Difference("lora.ok.base_unknown_alias", 400, "The name of an adapter that the model does not have gets 400."),
    Difference("edit.err.unknown.lora_bracket", 200, "An object may also be sent as `x[key]`."),
    Difference("cli.all", "error", BEFORE),
    Difference("cli.max_below_default_resolution", "error", BEFORE),
    Difference("auth.[2345]", 401, UNAUTHORIZED),
    Difference("auth.before_parsing", 401, UNAUTHORIZED),
    Difference("auth.open.reload", 403, OPERATORS),
    Difference("auth.open.*", 401, EVERY_PATH),
    Difference("auth.empty_key_file", None, "The server does not start with a key file that contains no key."),
    Difference("auth.key_file_right_trim", None, "Blanks around a key in the file are ignored; unit tests check this."),
    Difference("resp.*", None, "Unit and end-to-end tests check how a reply contains the pictures."),
    Difference(
        "*.na.*", None, "The tasks of a model are read from its directory, not configured; unit tests check this."
    ),
    Difference(
        "edit.genai_fields_all",
        400,
        "A field for a text encoder that the model lacks gets 400 before any device time is spent.",
    ),
    Difference(
        "edit.backend.max_sequence_length_513", None, "The package has no model of that family; unit tests check this."
    ),
    Difference("edit.above_max_resolution", 400, "The operator's limits apply to every request."),
    Difference("edit.err.uint64.0", 200, "`seed` = -1 means a random seed, as many clients expect."),
    Difference("edit.seed_absent_is_42", 200, "The seed is random unless given, and is always reported."),
    Difference("edit.duplicate_text_field_first_wins", 400, REPEATED),
    Difference(
        "edit.duplicate_image_first_wins",
        400,
        "A request with several images gets 400; the first one is never used silently.",
    ),
    Difference("edit.mask_empty_file_ignored", 400, "An empty mask file gets 400."),
    Difference("edit.err.image_array_brackets", 200, "`x[]` and `x` are the same field."),
    Difference("edit.err.no_boundary", 400, "A malformed form is a client error: 400."),
    Difference("edit.err.empty_filename", 400, "A malformed form is a client error: 400."),
    Difference("edit.err.text_plain", 415, "A media type that the path does not accept gets 415."),
    Difference("edit.err.float.3", 200, "The text `null` means that the field is absent."),
    Difference("edit.err.unknown.user", 200, UNKNOWN),
    Difference("edit.err.unknown.seed", 200, UNKNOWN),
    Difference("edit.err.unknown.cfg_scale", 200, UNKNOWN),
    Difference("edit.err.size.code3", 200, "A size may also be written `512X512`, `512*512` or `512×512`."),
    Difference("edit.err.unknown.empty_value", 200, "An empty value means that the field is absent."),
    Difference("edit.err.stream_false", 200, UNKNOWN),
    Difference("edit.err.stream_true", 200, "Streams are supported."),
    Difference("edit.backend.size_not_multiple", 200, "Any WxH is served exactly."),
    Difference("edit.err.size_and_width*", 200, SAME_VALUE),
    Difference(
        "edit.default_steps_above_max",
        None,
        "Defaults are checked against the limits at start; the server does not start if they contradict.",
    ),
    Difference(
        "edit.prompt_longer_than_context",
        400,
        "The built-in model cuts the prompt, but one step at its default strength of 0.7 is less than one step.",
    ),
    Difference("edit.err.n_and_num_images", 200, SAME_VALUE),
    Difference("gen.err.n_and_num", 200, SAME_VALUE),
    Difference("gen.err.size_w_h", 200, SAME_VALUE),
    Difference("gen.err.size_h", 200, SAME_VALUE),
    Difference("gen.err.size_type.1", 200, NULL),
    Difference("gen.err.negative_prompt_type.2", 200, NULL),
    Difference("gen.err.int.2", 200, NULL),
    Difference("gen.err.int64.2", 200, NULL),
    Difference("gen.err.uint.4", 200, NULL),
    Difference("gen.err.response_format_null", 200, NULL),
    Difference("gen.err.float.3", 200, "A whole number is accepted where a number is expected."),
    Difference("gen.err.unknown.user", 200, UNKNOWN),
    Difference("gen.ok.image_ignored", 400, "A field that the endpoint does not accept gets 400 and is never ignored."),
    Difference("gen.err.multipart", 200, "Generations also accept multipart forms."),
    Difference("gen.err.model_not_string", 400, "The status code is 400, not 412."),
    Difference("gen.err.json_depth", 400, "The status code is 400, not 412."),
    Difference("*.no_model", 200, DEFAULT_MODEL),
    Difference("gen.err.model_empty", 200, DEFAULT_MODEL),
    Difference("route.multipart_without_model", 200, DEFAULT_MODEL),
    Difference("route.multipart_no_model_empty_path", 404, "An unknown path gets 404."),
    Difference("route.variations", 200, "Variations are supported."),
    Difference("route.other_v3_path", 404, "An unknown path gets 404."),
    Difference("route.get_edits", 405, "A method that the path does not support gets 405 with Allow."),
    Difference("srv.health.post", 405, "A method that the path does not support gets 405 with Allow."),
    Difference("srv.health.not_ready", None, "The start-up tests check this."),
    Difference("srv.models.retrieve_unknown", 404, "An unknown model gets 404."),
    Difference("srv.models.retrieve_empty", 200, "A trailing slash is ignored, so this is the list of models."),
    Difference("srv.config.reload_get", 405, "A method that the path does not support gets 405 with Allow."),
    Difference("srv.config.reload_noop", 403, OPERATORS),
    Difference(
        "srv.config.reload_changed",
        None,
        "The fault tests check reloads; the reply is 200 when the new workers serve, 202 while they load.",
    ),
    Difference("srv.metrics.disabled", 200, "Metrics are always on."),
    Difference("srv.options", 204, "The reply to OPTIONS has no content."),
    Difference(
        "route.path_traversal", 404, "A path that is not in the route table gets 404; no file is served by its path."
    ),
)


def file_bytes() -> dict[str, bytes]:
    """Return the files that the vectors use, by name."""
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
    yield from server_with_all_limits(tmp_path_factory.mktemp("conformance"))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer("--api_key", KEY, "--model_name", "default", spool=tmp_path_factory.mktemp("guarded")) as server:
        yield server


def server_with_all_limits(folder: Path) -> Iterator[LiveServer]:
    """Start a server with a model for each set of limits."""
    tables = ['default_model = "default"']
    for name, limits in LIMITS.items():
        pinned = {"streams": 1, "threads": 1, "max_batch": 1}  # these workers load fastest
        lines = [f"{key} = {json.dumps(value)}" for key, value in {**limits, **pinned, "path": BUILTIN_PATH}.items()]
        tables.append("\n".join(["[[model]]", f'name = "{name}"', *lines]))
    for number, alias in enumerate(ADAPTERS):
        path = write_adapter(folder / f"{alias}.safetensors", number)
        tables.append(f"[[model.lora]]\nalias = '{alias}'\npath = '{path}'")
    tables.append(COMPOSITE)
    (folder / "c.toml").write_text("\n".join(tables))
    with (
        LiveServer("--config", str(folder / "c.toml"), spool=folder) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        loading = set(LIMITS)
        while loading:
            loading = {name for name in loading if client.get(f"/v2/models/{name}/ready").status_code != 200}
        yield server


def difference(vector: dict[str, Any]) -> Difference | None:
    """Return the listed difference of a vector, or None."""
    return next((d for d in DIFFERENCES if fnmatch.fnmatch(vector["id"], d.pattern)), None)


def send(client: httpx.Client, vector: dict[str, Any]) -> httpx.Response:
    """Send the request of a vector."""
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
    """Return the number of pictures made since the server started."""
    lines = client.get("/metrics", headers={"authorization": f"Bearer {KEY}"}).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("ovserve_pictures_total"))


RUN = [v for v in VECTORS["vectors"] if v.get("method") and ((d := difference(v)) is None or d.status is not None)]


@pytest.mark.parametrize("vector", RUN, ids=lambda vector: vector["id"])
def test_vector_gives_the_expected_reply(request: pytest.FixtureRequest, vector: dict[str, Any]) -> None:
    live: LiveServer = request.getfixturevalue("guarded" if vector.get("server") in GUARDED else "live")
    wanted = vector["expect"]["status"]
    differs = difference(vector)
    statuses = [differs.status] if differs else wanted if isinstance(wanted, list) else [wanted]
    with httpx.Client(base_url=live.url, verify=False) as client:  # no certificates to read, 300 times
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


# --- configuration ----------------------------------------------------------------------------------------------------

CONFIGURATION = ("cli", "graph_options", "graph_export", "task_detect")  # groups of vectors without a request
BROKEN = {
    "node without node_options": 'node: { name: "x" calculator: "ImageGenCalculator" }',
    "node without name": graph_text({"models_path": "."}).replace('name: "ImageGenExecutor"', ""),
}


def expected_outcome(vector: dict[str, Any]) -> Any:
    """Return a vector's status, or `ok` or `error` for one about the configuration."""
    expect = vector["expect"]
    if vector["group"] not in CONFIGURATION:
        return expect["status"]
    return "error" if "error" in expect or expect.get("load") == "error" else "ok"


def read_configuration(vector: dict[str, Any], folder: Path) -> ModelSettings:
    """Read the configuration of a vector; return its model. Raises StartupError, or SystemExit for a wrong flag."""
    if "--source_loras" in vector.get("args", ()):
        parse_source_loras(vector["args"][vector["args"].index("--source_loras") + 1])
        return ModelSettings()
    if vector["group"] == "cli":
        settings = parse_arguments(vector["args"], {})
        if settings.api_key_file:
            read_keys(settings)
        if settings.host != "127.0.0.1":  # the address is looked up when the server listens
            command = [sys.executable, "-m", "ovserve", "--port", "0", *vector["args"]]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode:
                raise StartupError(done.stderr)
        return settings.models[0]
    if vector["group"] == "graph_options":
        options = dict(vector["options"])
        broken = options.pop("broken", None)
        options["models_path"] = str(builtin_directory())
        (folder / "graph.pbtxt").write_text(BROKEN[broken] if broken else graph_text(options))
        return load_settings({"model_path": str(folder)}, {}).models[0]
    if vector["group"] == "graph_export":
        values = {name: str(value) for name, value in vector["settings"].items() if name != "loras"}
        if "loras" in vector["settings"]:
            values["source_loras"] = ",".join(vector["settings"]["loras"])
        model = load_settings({**values, "model_path": str(folder)}, {}).models[0]
        assert json.loads(graph_options(model)["plugin_config"]) == vector["expect"]["plugin_config"]
        (folder / "graph.pbtxt").write_text(write_graph(graph_options(model), "1"))
        return load_settings({"model_path": str(folder)}, {}).models[0]
    name = vector["model_index"]["_class_name"]
    assert class_named(name, folder).engines
    return ModelSettings()


def option_names(vector: dict[str, Any]) -> set[str]:
    """Return the names that the error of a vector about the configuration may contain: those of the options in it."""
    if "broken" in vector.get("options", {}):
        return {vector["options"]["broken"].removeprefix("node without ")}
    names = {*vector.get("options", ()), *vector.get("settings", ())} - {"models_path"}
    arguments = vector.get("args", [])
    names |= {argument.removeprefix("--") for argument in arguments if argument.startswith("--")}
    if "--rest_bind_address" in arguments:  # the error of the listener names the address
        names.add(arguments[arguments.index("--rest_bind_address") + 1])
    if "model_index" in vector:
        names.add(vector["model_index"]["_class_name"])
    return names


@pytest.mark.parametrize(
    "vector",
    [
        v
        for v in VECTORS["vectors"]
        if v["group"] in CONFIGURATION and ((d := difference(v)) is None or d.status is not None)
    ],
    ids=lambda vector: vector["id"],
)
def test_configuration_vector_gives_the_expected_outcome(
    vector: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    differs, expect = difference(vector), vector["expect"]
    wanted = differs.status if differs else expected_outcome(vector)
    if wanted == "error":
        with pytest.raises((StartupError, SystemExit)) as failure:
            read_configuration(vector, tmp_path)
        message = str(failure.value) + capsys.readouterr().err
        if vector["group"] == "graph_options":
            assert str(tmp_path / "graph.pbtxt") in message
        assert any(name in message for name in option_names(vector)), message
        return
    model = read_configuration(vector, tmp_path)
    for name in ("max_resolution", "default_resolution"):
        if isinstance(expect.get(name), list):
            assert str(getattr(model, name)) == "x".join(map(str, expect[name]))
    if "static_resolutions" in expect:
        assert [[size.width, size.height] for size in model.resolution] == expect["static_resolutions"]
    if "device" in expect:
        assert model.device.split() == expect["device"]


def test_vectors_contain_at_least_sixty_bad_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    rules: dict[str, list[str]] = {}
    for vector in RUN:
        differs = difference(vector)
        status: Any = differs.status if differs else vector["expect"]["status"]
        if isinstance(status, int) and 400 <= status < 500:
            rules.setdefault(vector["id"].rsplit(".", 1)[0], []).append(vector["id"])
    with capsys.disabled():
        for rule, cases in rules.items():
            print(f"\n{rule}: {', '.join(case.rsplit('.', 1)[1] for case in cases)}", end="")
    assert sum(min(5, len(cases)) for cases in rules.values()) >= 60


def test_every_difference_matches_a_vector() -> None:
    for differs in DIFFERENCES:
        assert any(difference(vector) is differs for vector in VECTORS["vectors"]), differs.pattern


def page() -> str:
    """Return the page: vectors that differ on purpose, vectors that are not run, and vectors that pass."""
    passes: list[str] = []
    differs: list[str] = []
    skipped: dict[str, list[str]] = {}  # names by reason
    for vector in VECTORS["vectors"]:
        name, found = f"`{vector['id']}`", difference(vector)
        if found is None:
            assert vector.get("method") or vector["group"] in CONFIGURATION, vector["id"]
            passes.append(name)
        elif found.status is None:
            skipped.setdefault(found.rule, []).append(name)
        else:
            wanted = expected_outcome(vector)
            shown = " or ".join(map(str, wanted)) if isinstance(wanted, list) else wanted
            differs.append(f"| {name} | {shown} | {found.status} | {found.rule} |")
    lines = [
        "# Conformance with OpenVINO Model Server",
        "",
        "This page compares ovserve with the image endpoint of OpenVINO Model Server. Each test vector describes one",
        "request and the server's reply, or a configuration: flags, a graph, a model's directory.",
        "`tests/e2e/test_conformance.py` sends the requests to a live ovserve server with the built-in model. It reads",
        "the configurations as a start does. It also writes this page: run",
        "`WRITE_PAGES=1 scripts/test tests/e2e/test_conformance.py`.",
        "",
        f"{len(passes)} vectors give the same result. {len(differs)} differ on purpose.",
        f"{sum(map(len, skipped.values()))} are not run: ovserve does not have the tested feature, or others cover it.",
        "",
        "## Different on purpose",
        "",
        "| vector | Model Server | ovserve | reason |",
        "|---|---|---|---|",
        *differs,
        "",
        "## Not run",
        "",
        *(f"- {reason} {', '.join(names)}" for reason, names in skipped.items()),
        "",
        "## The same",
        "",
        ", ".join(passes),
        "",
    ]
    return "\n".join(lines)


def test_conformance_page_is_up_to_date() -> None:
    if os.environ.get("WRITE_PAGES"):
        PAGE.write_text(page(), "utf-8")
    assert PAGE.read_text("utf-8") == page()
