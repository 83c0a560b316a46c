"""Settings from flags, environment and file."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from ovserve.errors import SettingsError
from ovserve.settings.access import ListenAddress, parse_hosts, parse_listen, parse_networks, parse_origins
from ovserve.settings.options import ModelSettings, Resolution, Settings, options_of
from ovserve.settings.sources import load_settings, service_variables


def test_defaults_serve_the_builtin_model_on_loopback() -> None:
    settings = load_settings({}, {})
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert [model.name for model in settings.models] == ["ovserve-builtin"]
    assert settings.models[0].path is None


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("builtin:shapes", "ovserve-builtin"),
        ("builtin:things", "ovserve-things"),
        ("builtin:unknown", "ovserve-builtin"),
    ],
)
def test_builtin_model_is_served_under_a_name_of_its_own_unless_named(path: str, name: str) -> None:
    [model] = load_settings({"model_path": path}, {}).models
    assert (model.name, model.path) == (name, Path(path))
    assert load_settings({"path": path, "name": "a"}, {}).models[0].name == "a"


@pytest.mark.parametrize("path", ["", "none"])
def test_empty_path_is_the_default_model(path: str) -> None:
    [model] = load_settings({"model_path": path}, {}).models
    assert (model.name, model.path) == ("ovserve-builtin", None)


def test_flag_wins_over_environment_over_file(tmp_path: Path) -> None:
    config = tmp_path / "ovserve.toml"
    config.write_text("port = 1\nlog_level = 'error'\nmax_fields = 7\n")
    settings = load_settings({"port": "3"}, {"OVSERVE_PORT": "2", "OVSERVE_LOG_LEVEL": "debug"}, config)
    assert (settings.port, settings.log_level, settings.max_fields) == (3, "debug", 7)


@pytest.mark.parametrize(
    ("flag", "attribute"),
    [("rest_port", "port"), ("rest_bind_address", "host"), ("target_device", "device"), ("model_name", "name")],
)
def test_names_of_the_reference_server_are_aliases(flag: str, attribute: str) -> None:
    settings = load_settings({flag: "5"}, {})
    owner = settings if hasattr(settings, attribute) else settings.models[0]
    assert str(getattr(owner, attribute)) == "5"


def test_several_models_from_tables(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        "default_model = 'b'\n[[model]]\nname = 'a'\n"
        "[[model]]\nname = 'b'\npath = '/m'\nmax_resolution = '512x256'\nreplicas = 2\n"
    )
    settings = load_settings({}, {}, config)
    assert [model.name for model in settings.models] == ["a", "b"]
    assert settings.models[1].max_resolution == Resolution(512, 256)
    assert settings.models[1].replicas == 2


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"port": "x"}, "--port=x"),
        ({"port": "70000"}, "at most 65535"),
        ({"max_body_bytes": "0"}, "at least 1 bytes"),
        ({"engine": "fast"}, "one of auto, genai, stepwise"),
        ({"grace_period_s": "nan"}, "finite"),
        ({"max_resolution": "512"}, "WxH"),
        ({"colour": "red"}, "colour"),
        ({"port": "1", "rest_port": "2"}, "two names of the same option"),
        ({"default_resolution": "512x512", "max_resolution": "256x256"}, "above max_resolution"),
        ({"default_num_inference_steps": "50", "max_num_inference_steps": "10"}, "above max_num_inference_steps"),
        ({"device": "CPU GPU"}, "three"),
        ({"plugin_config": "[1]"}, "JSON object"),
        ({"default_model": "ghost"}, "ghost"),
        ({"name": "a b"}, "letters"),
        ({"allowed_origins": "https://a.test\r\nX-A: b"}, "allowed_origins: 'https://a.test"),
        ({"allowed_origins": "https://kočka.test"}, "is not an origin"),
        ({"allowed_origins": "https://a.test/"}, "is not an origin"),
        ({"allowed_origins": "https://a.test,*"}, "is not an origin"),
        ({"allowed_origins": "a.test"}, "is not an origin"),
        ({"allowed_origins": "http://*"}, "is not an origin"),
        ({"allowed_hosts": "a.test:8000"}, "allowed_hosts: 'a.test:8000' is not a host name"),
        ({"allowed_hosts": "http://a.test"}, "is not a host name"),
        ({"allowed_hosts": "a.test,*"}, "is not a host name"),
        ({"trusted_proxies": "proxy.test"}, "trusted_proxies: expected IP addresses"),
        ({"trusted_proxies": "192.0.2.1/24"}, "has host bits set"),
        ({"admin_listen": "8001"}, "admin_listen: expected an address with a port"),
        ({"admin_listen": "admin.test:8001"}, "is not an IP address"),
        ({"admin_listen": "127.0.0.1:65536"}, "admin_listen: expected an address with a port"),
        ({"min_strength": "0.9", "max_strength": "0.5"}, "min_strength"),
    ],
)
def test_wrong_option_is_an_error_of_one_line(flags: dict[str, str], expected: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(flags, {})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "origins"),
    [
        ("", ()),
        ("*", ("*",)),
        ("null", ("null",)),
        ("https://a.test, http://localhost:3000,", ("https://a.test", "http://localhost:3000")),
        ("HTTPS://A.Test:8443", ("https://a.test:8443",)),
        ("chrome-extension://abc,http://[::1]:80", ("chrome-extension://abc", "http://[::1]:80")),
        ("app://,vscode-webview://*,tauri://localhost", ("app://", "vscode-webview://", "tauri://localhost")),
    ],
)
def test_origins_are_parsed_as_a_list(text: str, origins: tuple[str, ...]) -> None:
    assert parse_origins(load_settings({"allowed_origins": text}, {}).allowed_origins) == origins


def test_hosts_networks_and_the_admin_listener_are_parsed() -> None:
    assert parse_hosts("A.Test., *.lan.test,a.test") == ("a.test", "*.lan.test")
    assert (parse_hosts(None), parse_hosts("*")) == ((), ("*",))
    assert [str(network) for network in parse_networks("192.0.2.1, 2001:db8::/32")] == ["192.0.2.1/32", "2001:db8::/32"]
    assert parse_listen("localhost:8001") == ListenAddress("127.0.0.1", 8001)
    assert parse_listen("[::1]:0") == ListenAddress("::1", 0)
    assert parse_listen("/run/o.sock") == parse_listen("unix:/run/o.sock") == ListenAddress("", 0, "/run/o.sock")
    assert parse_listen(None) is None


def test_variables_of_the_commands_are_no_options() -> None:
    load_settings({}, {"OVSERVE_URL": "http://host:8000", "OVSERVE_PICTURES": "sixel"})


def test_environment_is_checked_for_unknown_names() -> None:
    with pytest.raises(SettingsError, match="max_bodies"):
        load_settings({}, {"OVSERVE_MAX_BODIES": "1"})


def test_empty_variable_counts_as_unset(tmp_path: Path) -> None:
    for table in (Settings, ModelSettings):
        for name, (_, option) in options_of(table).items():
            for key in (name, *option.aliases):
                assert load_settings({}, {f"OVSERVE_{key.upper()}": ""}) == load_settings({}, {}), key
    config = tmp_path / "c.toml"
    config.write_text("host = '192.0.2.1'\n[[model]]\nname = 'a'\n")
    settings = load_settings({}, {"OVSERVE_HOST": "", "OVSERVE_DEVICE": ""}, config)
    assert settings.host == "192.0.2.1"
    with pytest.raises(SettingsError, match="max_bodies"):
        load_settings({}, {"OVSERVE_MAX_BODIES": ""})


@pytest.mark.parametrize("name", ["host", "rest_bind_address", "device", "engine"])
def test_option_that_needs_a_value_cannot_be_empty(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name}=: must not be empty"):
        load_settings({name: ""}, {})
    config = tmp_path / "c.toml"
    config.write_text(f"{name} = ''\n" if name in ("host", "rest_bind_address") else f"[[model]]\n{name} = ''\n")
    with pytest.raises(SettingsError, match=f"{name}=: must not be empty"):
        load_settings({}, {}, config)


def test_origins_none_allows_no_origin() -> None:
    assert load_settings({"allowed_origins": ""}, {}).allowed_origins is None
    assert load_settings({}, {"OVSERVE_ALLOWED_ORIGINS": "none"}).allowed_origins is None
    assert load_settings({}, {"OVSERVE_ALLOWED_ORIGINS": ""}).allowed_origins is None


# As the kubelet sets them for a Service `ovserve` with the ports http (8000) and dns, and one `ovserve-rest`.
OF_KUBERNETES = {
    "OVSERVE_SERVICE_HOST": "10.0.0.11",
    "OVSERVE_SERVICE_PORT": "8000",
    "OVSERVE_SERVICE_PORT_HTTP": "8000",
    "OVSERVE_PORT": "tcp://10.0.0.11:8000",
    "OVSERVE_PORT_8000_TCP": "tcp://10.0.0.11:8000",
    "OVSERVE_PORT_8000_TCP_PROTO": "tcp",
    "OVSERVE_PORT_8000_TCP_PORT": "8000",
    "OVSERVE_PORT_8000_TCP_ADDR": "10.0.0.11",
    "OVSERVE_PORT_53_UDP": "udp://10.0.0.11:53",
    "OVSERVE_REST_SERVICE_HOST": "10.0.0.12",
    "OVSERVE_REST_PORT": "udp://10.0.0.12:53",
    "OVSERVE_REST_PORT_53_UDP_ADDR": "10.0.0.12",
}


def test_variables_of_a_kubernetes_service_are_ignored() -> None:
    assert load_settings({}, OF_KUBERNETES) == load_settings({}, {})
    assert service_variables({**OF_KUBERNETES, "OVSERVE_HOST": "::", "SERVICE_HOST": "x"}) == list(OF_KUBERNETES)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OVSERVE_PORT", "http://10.0.0.11:8000"),
        ("OVSERVE_PORT_HTTP", "tcp://10.0.0.11:8000"),
        ("OVSERVE_PORT_8000_TCP_NAME", "tcp"),
        ("OVSERVE_SERVICE", "10.0.0.11"),
        ("OVSERVE_SERVICE_HOSTS", "10.0.0.11"),
        ("OVSERVE_service_host", "10.0.0.11"),
    ],
)
def test_variable_similar_to_a_kubernetes_service_is_an_error(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=rf"(?i){name}|{name.removeprefix('OVSERVE_')}"):
        load_settings({}, {name: value})


def test_port_variable_with_a_number_is_an_option() -> None:
    assert load_settings({}, {"OVSERVE_SERVICE_HOST": "10.0.0.11", "OVSERVE_PORT": "9"}).port == 9


@pytest.mark.parametrize(
    ("text", "expected"),
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
def test_wrong_file_is_an_error(tmp_path: Path, text: str, expected: str) -> None:
    config = tmp_path / "c.toml"
    config.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings({}, {}, config)
    assert expected in str(caught.value)


def test_model_flag_with_model_tables_is_an_error(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("[[model]]\nname = 'a'\n")
    with pytest.raises(SettingsError, match="device"):
        load_settings({"device": "GPU"}, {}, config)


def test_missing_file_is_an_error() -> None:
    with pytest.raises(SettingsError, match="No such file"):
        load_settings({}, {}, Path("nowhere.toml"))


@pytest.mark.parametrize("table", [Settings, ModelSettings])
def test_every_default_is_within_its_bounds(table: type) -> None:
    for name, (entry, option) in options_of(table).items():
        assert option.text.endswith("."), name
        if entry.default is None or isinstance(entry.default, str):
            is_declared_by_model = entry.default is None and table is ModelSettings
            assert not option.choices or entry.default in option.choices or is_declared_by_model
            continue
        if option.low is not None:
            assert entry.default >= option.low, name
        if option.high is not None:
            assert entry.default <= option.high, name


def test_settings_cannot_be_changed() -> None:
    settings = load_settings({}, {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.port = 1  # type: ignore[misc]


def test_file_in_another_encoding_is_an_error(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_bytes("# für\n".encode("latin-1"))
    with pytest.raises(SettingsError, match=r"c\.toml"):
        load_settings({}, {}, config)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            f"default_timeout_s = 1{'0' * 400}",
            "{path}: default_timeout_s=a number of 1329 bits: the number is too large",
        ),
        (f"port = 1{'0' * 5000}", "--config {path}: "),
        (f"port = 0x1{'0' * 5000}", "{path}: port=a number of 20001 bits: must be at most 65535"),
        (f"port = '{'9' * 5000}'", "{path}: port=" + "9" * 100 + "...: expected a whole number"),
        ('port = "1\\n2"', "{path}: port=1\\n2: expected a whole number"),
        ('spool_dir = "a\\u0000b"', "{path}: spool_dir="),
        ('host = "a\\u0000b"', "must not contain a NUL character"),
        (f"x = {DEEP}", "--config {path}: nested too deeply"),
        (f"port{'.a' * 5000} = 1", "{path}: port={...}: expected a whole number"),
        (f"[[model]]\nplugin_config = '{DEEP}'", "plugin_config: nested too deeply"),
        (f"[[model]]\nplugin_config = '{{\"a\": 1{'0' * 5000}}}'", "plugin_config: "),
        ("[[model]]\nname = 'a'\n[[model]]\nname = 'b'\nreplicas = 0", "{path}: [[model]] 2 (b): replicas=0: must be"),
        ("[[model]]\n[[model]]\nmodel_name = 'b'\nreplica = 1", "{path}: [[model]] 2 (b): unknown option 'replica'"),
        ("[[model]]\nname = 1\nreplicas = 1", "{path}: [[model]] 1 (1): name=1: expected a string"),
        ("[[model]]\npath = ''\nreplicas = 0", "{path}: [[model]] 1: replicas=0: must be"),
        ("[model]\nname = 'a'", "{path}: write each model as a [[model]] table"),
        ("ports = 1", "{path}: unknown option 'ports'"),
    ],
)
def test_error_in_a_file_is_one_line_with_its_place(tmp_path: Path, text: str, expected: str) -> None:
    config = tmp_path / "c.toml"
    config.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings({}, {}, config)
    assert expected.replace("{path}", str(config)) in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
    assert "\0" not in str(caught.value)


def test_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("port = 9\r\n[[model]]\r\nname = 'a'\r\n", "utf-8-sig")
    settings = load_settings({}, {}, config)
    assert (settings.port, settings.models[0].name) == (9, "a")


def test_loop_of_links_is_reported_by_the_profile(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert load_settings({"path": str(tmp_path / "a")}, {}).models[0].name in ("a", "b")


def test_deleted_working_directory_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(SettingsError, match="model path m: No such file"):
        load_settings({"path": "m"}, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("queue_limit = 5", "'queue_limit': it is an option of a model; put it into a [[model]] table"),
        ("[[model]]\nport = 1", "'port': it is an option of the server; put it before the first [[model]] table"),
        ("max_conections = 5", "'max_conections': did you mean 'max_connections'?"),
        ("xyzzy = 5", "unknown option 'xyzzy'"),
    ],
)
def test_unknown_option_is_an_error_with_a_suggestion(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings({}, {}, path)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).endswith(expected)


def test_aliases_are_a_list_in_the_file_and_separated_by_commas_in_a_flag(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("[[model]]\nname = 'a'\naliases = ['gpt-image-1', '*']\nbuiltin_aliases = false\n")
    from_file = load_settings({}, {}, config).models[0]
    from_flags = load_settings({"name": "a", "aliases": "gpt-image-1, *", "builtin_aliases": "false"}, {}).models[0]
    assert from_file == from_flags == ModelSettings(name="a", aliases=("gpt-image-1", "*"))
    assert load_settings({"builtin_aliases": "true"}, {}).models[0].all_aliases[0] == "gpt-image-1"


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ("[[model]]\nname='a'\naliases=['b']\n[[model]]\nname='b'", "model a: alias 'b' is the name of a model"),
        ("[[model]]\nname='a'\naliases=['*']\n[[model]]\nname='b'\naliases=['*']", "model b: alias '*' is also"),
        (
            "[[model]]\nname='a'\nbuiltin_aliases=true\n[[model]]\nname='dall-e-2'",
            "model a: alias 'dall-e-2' is the name of a model",
        ),
        ("[[model]]\nname='a'\naliases=['x y']", "model a: alias 'x y': expected at most 128 letters"),
        ("[[model]]\nname='a'\naliases=[1]", "expected a list of strings"),
        ("[[model]]\nname='a'\nbuiltin_aliases='yes'", "expected true or false"),
    ],
)
def test_wrong_alias_is_a_configuration_error(tmp_path: Path, tables: str, expected: str) -> None:
    config = tmp_path / "c.toml"
    config.write_text(tables)
    with pytest.raises(SettingsError, match=re.escape(expected)):
        load_settings({}, {}, config)


def test_default_model_may_be_an_alias(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("default_model = 'x'\n[[model]]\nname='a'\naliases=['x']\n[[model]]\nname='b'\n")
    assert load_settings({}, {}, config).default_model == "x"


def test_replicas_are_a_number_or_automatic(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text('[[model]]\nreplicas = "auto"\nmax_replicas = 5\n')
    [model] = load_settings({}, {}, config).models
    assert (model.replicas, model.fewest_workers, model.most_workers) == (0, 1, 5)
    [model] = load_settings({"replicas": "3"}, {}).models
    assert (model.fewest_workers, model.most_workers) == (3, 3)
    [model] = load_settings({"replicas": "auto"}, {}).models
    assert model.most_workers == 2
    with pytest.raises(SettingsError, match="replicas=many: not a number"):
        load_settings({"replicas": "many"}, {})
    with pytest.raises(SettingsError, match="min_replicas 4 is above max_replicas 2"):
        load_settings({"replicas": "auto", "min_replicas": "4"}, {})
