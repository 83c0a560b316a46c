"""Files of the reference server as settings: text format, graphs, config.json, repositories, contradictions."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.cli import import_ovms, serve
from ovserve.cli.modelserver import read_command_line
from ovserve.errors import SettingsError
from ovserve.models.profile import builtin_directory
from ovserve.settings.modelserver.graph import read_graph, write_graph
from ovserve.settings.modelserver.repository import Repository
from ovserve.settings.modelserver.textproto import Message, Scalar, parse, quoted
from ovserve.settings.options import Resolution, Settings
from ovserve.settings.sources import load_settings
from tests.modelserver import graph_text, write_repository

MODEL = str(builtin_directory())

# --- text format ------------------------------------------------------------------------------------------------------


def test_text_format_has_messages_lists_strings_and_comments() -> None:
    found = parse(
        """# a comment
        a: 1, b: 'it\\'s' "\\303\\244\\x41" ; c { d: TRUE e < f: -0x1F > }  # another
        g: [1, 2.5e3f, -inf] h: [{i: "x"}, {}] [type.example.com / some.Type]: { j: 0 } c: {}
        """
    )
    texts = {name: value.text for name, value in found.fields if isinstance(value, Scalar) and name != "g"}
    assert texts == {"a": "1", "b": "it'säA"}
    assert [value.text for value in found.all("g") if isinstance(value, Scalar)] == ["1", "2.5e3f", "-inf"]
    first = found.messages("c")[0]
    assert first.line == 2
    assert first.messages("e")[0].all("f") == [Scalar("-0x1F", False, 2)]
    assert len(found.messages("c")) == len(found.messages("h")) == 2
    assert found.messages("[type.example.com/some.Type]")[0].all("j") == [Scalar("0", False, 3)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1 }", "line 1"),
        ("a {", "line 1"),
        ("a: {b: 1>", "expected"),
        ("\n\na", "line 3: expected ':'"),
        ('a: "x', "unexpected"),
        ("a: 'x\n'", "unexpected"),
        ("a: [1 2]", "expected ','"),
        ("a: 'x\\q'", "unknown escape"),
        ("a: '\\777'", "above 255"),
        ("a: 1a", "unexpected"),
        ("[a b: 1", "wrong name"),
        ("a {" * 40, "levels deep"),
        ("a:1 " * 50_001, "fields"),
        ("a" * (1 << 20) + "a", "characters"),
    ],
)
def test_wrong_text_format_is_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(text)


@given(st.text(max_size=200) | st.text("ab{}<>[]:;,.\"'\\#\n 01-x", max_size=80))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        found = parse(text)
    except ValueError:
        return
    assert isinstance(found, Message)


@given(st.text(st.characters(codec="utf-8"), max_size=50))
def test_quoted_string_is_read_back(text: str) -> None:
    assert parse(f"a: {quoted(text)}").all("a") == [Scalar(text, True, 1)]


# --- graphs -----------------------------------------------------------------------------------------------------------


def write_graph_file(folder: Path, options: dict[str, Any], **more: Any) -> Path:
    path = folder / "graph.pbtxt"
    path.write_text(graph_text({"models_path": MODEL, **options}, **more))
    return path


def test_graph_gives_options_of_a_model(tmp_path: Path) -> None:
    options = {
        "device": "CPU",
        "plugin_config": '{"NUM_STREAMS": 2, "CACHE_DIR": "/cache"}',
        "max_resolution": "512x256",
        "default_resolution": "256x256",
        "max_num_images_per_prompt": 4,
        "default_num_inference_steps": 10,
        "max_num_inference_steps": 50,
    }
    adapters = (
        'lora_adapters { alias: "x" path: "loras/x.safetensors" alpha: 0.5 mode: STATIC } '
        'lora_adapters { alias: "y" path: "/y.safetensors" } '
        'composite_lora_adapters { alias: "xy" components { adapter_alias: "x" } '
        'components { adapter_alias: "y" alpha: 0.25 } }'
    )
    found = read_graph(write_graph_file(tmp_path, options, extra=adapters))
    assert found.values == {
        "path": MODEL,
        "device": "CPU",
        "plugin_config": '{"NUM_STREAMS": 2}',
        "cache_dir": "/cache",
        "max_resolution": "512x256",
        "default_resolution": "256x256",
        "max_num_images_per_prompt": 4,
        "default_num_inference_steps": 10,
        "max_num_inference_steps": 50,
        "lora": [
            {"alias": "x", "path": str(tmp_path / "loras/x.safetensors"), "alpha": 0.5},
            {"alias": "y", "path": "/y.safetensors", "alpha": 1.0},
        ],
        "composite": [{"alias": "xy", "components": {"x": 1.0, "y": 0.25}}],
    }
    assert [each.partition(":")[0] for each in found.ignored] == ["OVMS_GRAPH_QUEUE_MAX_SIZE", "lora_adapters"]


@pytest.mark.parametrize(
    ("options", "more", "words"),
    [
        ({"colour": 1}, {}, "unknown option 'colour'"),
        ({"max_num_images_per_prompt": -1}, {}, "max_num_images_per_prompt='-1'"),
        ({"max_num_images_per_prompt": "1"}, {}, "expected a whole number"),
        ({"device": 1}, {}, "expected a quoted string"),
        ({"resolution": "64x64 64x64"}, {}, "listed twice"),
        ({"resolution": "64x64", "default_resolution": "65x64"}, {}, "is not in resolution"),
        ({"plugin_config": "[]"}, {}, "plugin_config: expected a JSON object"),
        ({"plugin_config": "{"}, {}, "plugin_config"),
        ({"models_path": "nowhere"}, {}, "no such directory"),
        ({}, {"queue": "many"}, "OVMS_GRAPH_QUEUE_MAX_SIZE is 'many'"),
        ({}, {"extra": "device: 'CPU' device: 'GPU'"}, "device is given twice"),
        ({}, {"extra": "lora_adapters { alias: 'a b' path: 'x' }"}, "alias 'a b'"),
        ({}, {"extra": "lora_adapters { alias: 'a' }"}, "path is missing"),
        ({}, {"extra": "lora_adapters { alias: 'a' path: 'x' mode: FAST }"}, "mode 'FAST'"),
        (
            {},
            {"extra": "composite_lora_adapters { alias: 'a' components { adapter_alias: 'b' } }"},
            "'b' is no adapter",
        ),
    ],
)
def test_wrong_graph_names_file_and_option(
    tmp_path: Path, options: dict[str, Any], more: dict[str, Any], words: str
) -> None:
    path = write_graph_file(tmp_path, options, **more)
    with pytest.raises(SettingsError, match=words) as failure:
        read_graph(path)
    assert str(path) in str(failure.value)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_graph_or_an_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.pbtxt"
    path.write_bytes(content)
    with pytest.raises(SettingsError):
        read_graph(path)


def test_written_graph_is_read_back(tmp_path: Path) -> None:
    options = {
        "models_path": MODEL,
        "device": "CPU",
        "plugin_config": '{"A": "b\\"c"}',
        "resolution": ["512x256"],
        "num_images_per_prompt": 2,
        "guidance_scale": 7.5,
        "lora_adapters": [{"alias": "x", "path": "/x.safetensors", "alpha": 0.5}],
        "composite_lora_adapters": [{"alias": "c", "components": {"x": 1.0}}],
    }
    (tmp_path / "graph.pbtxt").write_text(write_graph(options, "1"))
    found = read_graph(tmp_path / "graph.pbtxt").values
    assert found["resolution"] == ["512x256"]
    assert json.loads(found["plugin_config"]) == {"A": 'b"c'}
    assert (found["num_images_per_prompt"], found["guidance_scale"], found["path"]) == (2, 7.5, MODEL)
    assert found["lora"] == options["lora_adapters"]
    assert found["composite"] == options["composite_lora_adapters"]


# --- settings ---------------------------------------------------------------------------------------------------------


def settings(**flags: str) -> Settings:
    return load_settings(flags, {})


def test_options_of_a_graph_in_the_model_directory_apply(tmp_path: Path) -> None:
    write_graph_file(tmp_path, {"max_num_images_per_prompt": 3, "resolution": "512x256 256x256"})
    found = settings(model_path=str(tmp_path), name="m")
    model = found.models[0]
    assert (model.name, str(model.path), model.max_num_images_per_prompt) == ("m", MODEL, 3)
    assert model.resolution == (Resolution(512, 256), Resolution(256, 256))
    assert (model.default_resolution, model.fixed_num_images) == (Resolution(512, 256), 1)
    assert any("OVMS_GRAPH_QUEUE_MAX_SIZE" in each for each in found.ignored)
    assert settings(model_path=str(tmp_path)).models[0].name == tmp_path.name


def test_option_that_contradicts_the_graph_names_both(tmp_path: Path) -> None:
    write_graph_file(tmp_path, {"max_num_images_per_prompt": 3})
    assert settings(model_path=str(tmp_path), max_num_images_per_prompt="3").models[0].max_num_images_per_prompt == 3
    with pytest.raises(SettingsError, match=r"graph.pbtxt: max_num_images_per_prompt is 3, but flag gives 4"):
        settings(model_path=str(tmp_path), max_num_images_per_prompt="4")


def test_graph_can_be_ignored_as_before(tmp_path: Path) -> None:
    write_graph_file(tmp_path, {"max_num_images_per_prompt": 3})
    model = settings(model_path=str(tmp_path), graph_options="ignore", max_num_images_per_prompt="4").models[0]
    assert (str(model.path), model.max_num_images_per_prompt) == (str(tmp_path), 4)


def test_config_json_lists_models(tmp_path: Path) -> None:
    config = write_repository(
        tmp_path,
        {
            "a": graph_text({"models_path": MODEL}),
            "b": graph_text({"models_path": MODEL, "max_num_inference_steps": 60}),
            "chat": 'node { name: "x" calculator: "HttpLLMCalculator" }',
        },
    )
    document = json.loads(config.read_text())
    document["model_config_list"] = [
        {"config": {"name": "c", "base_path": MODEL, "target_device": "CPU", "nireq": 2}},
        {"config": {"name": "resnet", "base_path": "/nowhere"}},
    ]
    document["monitoring"] = {"metrics": {"enable": True}}
    config.write_text(json.dumps(document))
    found = load_settings({}, {}, config)
    assert [(model.name, str(model.path)) for model in found.models] == [("a", MODEL), ("b", MODEL), ("c", MODEL)]
    assert found.models[1].max_num_inference_steps == 60
    text = " ".join(found.ignored)
    assert all(word in text for word in ("'monitoring'", "chat", "'nireq'", "resnet"))
    assert [model.name for model in settings(model_repository_path=str(tmp_path)).models] == ["a", "b", "c"]


def test_repository_without_config_json_serves_its_directories(tmp_path: Path) -> None:
    write_repository(tmp_path, {"a": graph_text({"models_path": MODEL}), "owner/b": graph_text({"models_path": MODEL})})
    (tmp_path / "config.json").unlink()
    (tmp_path / "owner" / ".b.pull").mkdir()
    found = load_settings({}, {"OVMS_MODEL_REPOSITORY_PATH": str(tmp_path)})
    assert [model.name for model in found.models] == ["a", "owner/b"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "expected a JSON object with mediapipe_config_list"),
        ('{"mediapipe_config_list": 1}', "expected a list"),
        ('{"mediapipe_config_list": [1]}', "expected a list of objects"),
        ('{"mediapipe_config_list": [{}]}', "mediapipe_config_list 1: name is missing"),
        ('{"mediapipe_config_list": [{"name": "a", "base_path": 1}]}', "base_path: expected a string"),
        ('{"mediapipe_config_list": [{"name": "a"}]}', "a/graph.pbtxt: No such file"),
        ('{"model_config_list": [{"config": {"name": "a", "base_path": "/nowhere"}}]}', "names no image model"),
        ("{", "Expecting property name"),
        ("{" + '"a":{' * 20000, "recursion|Expecting"),
    ],
)
def test_wrong_config_json_names_the_file(tmp_path: Path, content: str, words: str) -> None:
    config = tmp_path / "config.json"
    config.write_text(content)
    with pytest.raises(SettingsError, match=words) as failure:
        load_settings({}, {}, config)
    assert str(tmp_path) in str(failure.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"resolution": "512x512", "max_resolution": "512x512"}, "max_resolution cannot be combined with resolution"),
        ({"resolution": "512x512 1x1", "num_images_per_prompt": "2"}, "num_images_per_prompt needs exactly one"),
        ({"guidance_scale": "7"}, "guidance_scale needs exactly one resolution"),
        ({"resolution": "512x512", "max_num_images_per_prompt": "2"}, "max_num_images_per_prompt cannot be combined"),
        ({"resolution": "512x512 512x512"}, "listed twice"),
        ({"resolution": "512"}, "expected WxH"),
        ({"plugin_config": '{"CACHE_DIR": "/a"}', "cache_dir": "/b"}, "plugin_config has CACHE_DIR"),
        ({"plugin_config": '{"NUM_STREAMS": "2"}', "num_streams": "2"}, "plugin_config has NUM_STREAMS"),
    ],
)
def test_contradicting_options_are_an_error(flags: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        settings(**flags)


# --- commands ---------------------------------------------------------------------------------------------------------


def test_import_writes_toml_that_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"models_path": MODEL, "max_num_inference_steps": 60, "plugin_config": '{"A": "\u007f\\"é"}'}
    config = write_repository(
        tmp_path,
        {
            "plain": graph_text({"models_path": MODEL}),
            "owner/few": graph_text(options),
            "fixed": graph_text({"models_path": MODEL, "resolution": "512x256", "guidance_scale": 7.1}),
        },
    )
    assert import_ovms.run([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "# without effect: " in text
    (tmp_path / "c.toml").write_text(text)
    assert load_settings({}, {}, tmp_path / "c.toml").models == load_settings({}, {}, config).models
    assert import_ovms.run([str(config)]) == 0
    assert capsys.readouterr().out == text
    assert import_ovms.run([str(tmp_path / "plain")]) == 0
    assert 'name = "plain"' in capsys.readouterr().out
    assert import_ovms.run([str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_adapters_of_a_graph_become_tables() -> None:
    adapters = [{"alias": "x", "path": "/x.safetensors", "alpha": 0.5}]
    composites = [{"alias": "c", "components": {"x": 0.25}}]
    repository = Repository([("here", {"name": "m", "lora": adapters, "composite": composites})])
    document = tomllib.loads("\n".join(import_ovms.toml_of(repository)))
    assert document == {"model": [{"name": "m", "lora": adapters, "composite": composites}]}


@pytest.mark.parametrize(
    ("arguments", "mode", "passed"),
    [
        (["--rest_port", "8000", "--port=9000", "--rest_workers", "8"], "serve", ["--rest_port=8000"]),
        (["--config_path", "c.json", "--log_level", "TRACE"], "serve", ["--config=c.json", "--log_level=debug"]),
        (["--metrics_enable", "--metrics_list", "a"], "serve", []),
        (["--port", "1", "stray"], "serve", ["--port=1", "stray"]),
        (["--source_model", "a/b", "--pull", "--weight-format", "int4"], "pull", ["--source_model=a/b"]),
        (
            ["--configure", "--model_path", "/m", "--num_streams", "2"],
            "configure",
            ["--model_path=/m", "--num_streams=2"],
        ),
        (["--task", "image_generation", "--source_model=a/b", "--overwrite_models"], "serve", ["--source_model=a/b"]),
    ],
)
def test_command_line_of_the_reference_server(arguments: list[str], mode: str, passed: list[str]) -> None:
    found = read_command_line(arguments)
    assert (found.mode, found.arguments) == (mode, passed)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "text_generation"], "only image_generation"),
        (["--pull"], "--pull needs --source_model"),
        (["--configure"], "--configure needs --model_path"),
        (["--configure", "--model_path", "/m", "--model_name", "m"], "excludes --pull and --model_name"),
        (["--config_path", "c", "--model_name", "m"], "--model_name cannot be combined with --config_path"),
        (["--rest_workers", "1"], "expected 2 to 10000"),
        (["--grpc_workers"], "expected a value"),
        (["--weight_format", "int8"], "--weight_format needs --source_model"),
    ],
)
def test_wrong_command_line_of_the_reference_server(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as failure:
        read_command_line(arguments)
    assert failure.value.code == 2
    assert words in capsys.readouterr().err


def test_configure_writes_a_graph_beside_the_model(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "m")
    arguments = [
        "--configure",
        "--model_path",
        str(tmp_path / "m"),
        "--resolution",
        "512x256",
        "--guidance_scale",
        "7.5",
    ]
    assert serve.run([*arguments, "--cache_dir", "/cache", "--num_streams", "2"]) == 0
    found = settings(model_path=str(tmp_path / "m")).models[0]
    assert (found.resolution, found.guidance_scale) == ((Resolution(512, 256),), 7.5)
    assert str(found.cache_dir) == "/cache"
    assert json.loads(found.plugin_config) == {"NUM_STREAMS": "2"}
