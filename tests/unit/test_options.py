"""Settings from flags, environment and file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ovserve.config import ModelSettings, Resolution, Settings, options_of, parse_origins
from ovserve.errors import SettingsError
from ovserve.options import load_settings


def test_defaults_serve_the_builtin_model_on_loopback() -> None:
    settings = load_settings({}, {})
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert [model.name for model in settings.models] == ["ovserve-builtin"]
    assert settings.models[0].path is None


def test_flag_wins_over_environment_over_file(tmp_path: Path) -> None:
    config = tmp_path / "ovserve.toml"
    config.write_text("port = 1\nlog_level = 'error'\nmax_fields = 7\n")
    settings = load_settings({"port": "3"}, {"OVSERVE_PORT": "2", "OVSERVE_LOG_LEVEL": "debug"}, config)
    assert (settings.port, settings.log_level, settings.max_fields) == (3, "debug", 7)


@pytest.mark.parametrize(
    ("flag", "attribute"),
    [("rest_port", "port"), ("rest_bind_address", "host"), ("target_device", "device"), ("model_name", "name")],
)
def test_the_reference_servers_names_are_aliases(flag: str, attribute: str) -> None:
    settings = load_settings({flag: "5"}, {})
    owner = settings if hasattr(settings, attribute) else settings.models[0]
    assert str(getattr(owner, attribute)) == "5"


def test_several_models_from_tables(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        "default_model = 'b'\n[[model]]\nname = 'a'\n[[model]]\nname = 'b'\npath = '/m'\nmax_resolution = '512x256'\nreplicas = 2\n"
    )
    settings = load_settings({}, {}, config)
    assert [model.name for model in settings.models] == ["a", "b"]
    assert settings.models[1].max_resolution == Resolution(512, 256)
    assert settings.models[1].replicas == 2


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"port": "x"}, "--port=x"),
        ({"port": "70000"}, "at most 65535"),
        ({"max_body_bytes": "0"}, "at least 1 bytes"),
        ({"engine": "fast"}, "one of auto, genai, stepwise"),
        ({"grace_period_s": "nan"}, "finite"),
        ({"max_resolution": "512"}, "WxH"),
        ({"colour": "red"}, "colour"),
        ({"port": "1", "rest_port": "2"}, "two names of one option"),
        ({"default_resolution": "512x512", "max_resolution": "256x256"}, "above max_resolution"),
        ({"default_num_inference_steps": "50", "max_num_inference_steps": "10"}, "above max_num_inference_steps"),
        ({"device": "CPU GPU"}, "three"),
        ({"plugin_config": "[1]"}, "JSON object"),
        ({"default_model": "ghost"}, "ghost"),
        ({"name": "a b"}, "letters"),
        ({"allowed_origins": "https://a.test\r\nX-A: b"}, "allowed_origins: 'https://a.test"),
        ({"allowed_origins": "https://kočka.test"}, "no origin"),
        ({"allowed_origins": "https://a.test/"}, "no origin"),
        ({"allowed_origins": "https://a.test,*"}, "no origin"),
        ({"allowed_origins": "a.test"}, "no origin"),
        ({"min_strength": "0.9", "max_strength": "0.5"}, "min_strength"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(flags: dict[str, str], told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(flags, {})
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "origins"),
    [
        ("", ()),
        ("*", ("*",)),
        ("null", ("null",)),
        ("https://a.test, http://localhost:3000,", ("https://a.test", "http://localhost:3000")),
        ("chrome-extension://abc,http://[::1]:80", ("chrome-extension://abc", "http://[::1]:80")),
    ],
)
def test_origins_are_a_list(text: str, origins: tuple[str, ...]) -> None:
    assert parse_origins(load_settings({"allowed_origins": text}, {}).allowed_origins) == origins


def test_environment_is_checked_for_unknown_names() -> None:
    with pytest.raises(SettingsError, match="max_bodies"):
        load_settings({}, {"OVSERVE_MAX_BODIES": "1"})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("port = 'x'", "port"),
        ("ports = 1", "ports"),
        ("model = 1", "[[model]]"),
        ("[[model]]\nnames = 'a'", "names"),
        ("[[model]]\nname = 'a'\n[[model]]\nname = 'a'", "two models"),
        ("port = ", "c.toml"),
        ("port = true", "port"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, text: str, told: str) -> None:
    config = tmp_path / "c.toml"
    config.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings({}, {}, config)
    assert told in str(caught.value)


def test_a_models_flag_beside_tables_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("[[model]]\nname = 'a'\n")
    with pytest.raises(SettingsError, match="device"):
        load_settings({"device": "GPU"}, {}, config)


def test_a_missing_file_is_told() -> None:
    with pytest.raises(SettingsError, match="No such file"):
        load_settings({}, {}, Path("nowhere.toml"))


@pytest.mark.parametrize("table", [Settings, ModelSettings])
def test_every_default_obeys_its_own_bounds(table: type) -> None:
    for name, (entry, option) in options_of(table).items():
        assert option.text.endswith("."), name
        if entry.default is None or isinstance(entry.default, str):
            assert not option.choices or entry.default in option.choices
            continue
        if option.low is not None:
            assert entry.default >= option.low, name
        if option.high is not None:
            assert entry.default <= option.high, name


def test_settings_cannot_be_changed() -> None:
    settings = load_settings({}, {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.port = 1  # type: ignore[misc]


def test_a_file_in_another_encoding_is_told(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_bytes("# für\n".encode("latin-1"))
    with pytest.raises(SettingsError, match=r"c\.toml"):
        load_settings({}, {}, config)
