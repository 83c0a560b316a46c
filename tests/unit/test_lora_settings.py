"""LoRA adapters in the settings: tables, the flag `source_loras`, names and their conflicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ovserve.errors import ModelError, SettingsError
from ovserve.models.catalog import read_catalog
from ovserve.settings.loras import parse_source_loras
from ovserve.settings.options import ModelSettings
from ovserve.settings.sources import load_settings
from tests.loras import write_adapter

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "model-server.json").read_text("utf-8"))["vectors"]
FLAGS = [
    vector for vector in VECTORS if vector["id"].startswith("cli.lora.") and "--target_device" not in vector["args"]
]


def load(tmp_path: Path, text: str) -> ModelSettings:
    path = tmp_path / "c.toml"
    path.write_text(f"[[model]]\n{text}")
    return load_settings({}, {}, path).models[0]


TABLES = """
[[model.lora]]
alias = "xray"
path = "/loras/x.safetensors"
alpha = 0.8
[[model.lora]]
path = "/loras/anime.safetensors"
[[model.composite]]
alias = "blend"
components = {xray = 0.5, anime = 0.25}
[[model.composite]]
alias = "both"
components = ["xray", "anime"]
"""


def test_tables_give_adapters_and_composites_with_their_weights(tmp_path: Path) -> None:
    model = load(tmp_path, TABLES)
    assert model.adapter_names == ("xray", "anime", "blend", "both")
    assert model.adapters_of("xray") == {"xray": 0.8}
    assert model.adapters_of("anime") == {"anime": 1.0}
    assert model.adapters_of("blend") == {"xray": 0.5, "anime": 0.25}  # a composite's weight before the adapter's
    assert model.adapters_of("both") == {"xray": 0.8, "anime": 1.0}
    assert model.adapters_of(model.name) == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('lora = "x"', "write each entry as such a table"),
        ("[[model.lora]]\nalias = 'a'", "path must be a non-empty string"),
        ("[[model.lora]]\npath = 'a.bin'", "does not end with .safetensors"),
        ("[[model.lora]]\npath = 'a.safetensors'\nrank = 4", "unknown option 'rank'"),
        ("[[model.lora]]\npath = 'a.safetensors'\nalpha = 101", "not a number from -100 to 100"),
        ("[[model.lora]]\npath = 'a.safetensors'\nalpha = nan", "not a number"),
        ("[[model.lora]]\npath = 'a.safetensors'\nalpha = true", "not a number"),
        ("[[model.lora]]\npath = 'a.safetensors'\nalias = '-'", "expected at most 128 letters"),
        ("[[model.composite]]\nalias = 'c'\ncomponents = 1", "components must be"),
        ("[[model.composite]]\nalias = 'c'\ncomponents = []", "name one or more adapters"),
        ("[[model.composite]]\nalias = 'c'\ncomponents = ['x']", "'x' is not one of its adapters: it has none"),
        ("[[model.lora]]\npath = 'a.safetensors'\n" * 65, "65 tables; at most 64"),
        ("[[model.lora]]\npath = 'a.safetensors'\n[[model.lora]]\npath = 'b/a.safetensors'", "alias 'a' is also"),
        (
            "[[model.lora]]\npath = 'a.safetensors'\n[[model.composite]]\nalias = 'a'\ncomponents = ['a']",
            "alias 'a' is",
        ),
        ("name = 'a'\n[[model.lora]]\npath = 'a.safetensors'", "is the name of a model"),
        ("aliases = ['a']\n[[model.lora]]\npath = 'a.safetensors'", "alias 'a' is also an alias"),
        ("[[model.lora]]\npath = 'a.safetensors'\n[[model]]\nname = 'a'", "is the name of a model"),
    ],
)
def test_wrong_table_is_refused_with_the_reason(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, text)
    assert reason in str(caught.value)


def test_missing_file_is_an_error_that_may_pass(tmp_path: Path) -> None:
    settings = load_settings({"source_loras": f"a={tmp_path}/none.safetensors"}, {})
    with pytest.raises(ModelError, match=r"adapter a: .*none\.safetensors: no such file") as caught:
        read_catalog(settings)
    assert caught.value.is_transient


def test_flag_gives_adapters_and_composites(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "x.safetensors", 1)
    flag = f"x={path}:0.5, y={path}, both=@x:0.25+@y"
    model = load_settings({"source-loras".replace("-", "_"): flag}, {}).models[0]
    assert [(each.alias, each.path, each.alpha) for each in model.lora] == [("x", path, 0.5), ("y", path, 1.0)]
    assert model.adapters_of("both") == {"x": 0.25, "y": 1.0}


def test_flag_with_a_repository_says_to_pull_it() -> None:
    with pytest.raises(SettingsError, match="a: owner/repository is not pulled; `ovserve pull --lora owner/repository"):
        load_settings({"source_loras": "a=owner/repository"}, {})


@pytest.mark.parametrize("vector", FLAGS, ids=[vector["id"] for vector in FLAGS])
def test_flag_is_read_as_the_reference_server_reads_it(vector: dict[str, Any]) -> None:
    text = vector["args"][1]
    if "error" in vector["expect"]:
        with pytest.raises(SettingsError, match="source_loras"):
            parse_source_loras(text)
        return
    sources, composites = parse_source_loras(text)
    parsed = vector["expect"]["parsed"]
    kinds = {"HF_REPO": "repository", "DIRECT_URL": "url"}
    first = sources[0]
    shown = {
        "alias": first.alias,
        "source": first.place,
        "type": first.kind,
        "file": first.file,
        "alpha": first.alpha,
        "count": len(sources),
        "composites": {
            each.alias: {name: 1.0 if alpha is None else alpha for name, alpha in each.components}
            for each in composites
        },
    }
    for key, value in parsed.items():
        assert shown[key] == (kinds.get(value, value) if key == "type" else value), key
