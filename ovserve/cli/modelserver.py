"""The command line of OpenVINO Model Server: its flags as those of `serve`, and its modes `--pull` and `--configure`.

Flags that ovserve has are passed on. Those without a meaning here are named in the log once. Those that contradict each
other are usage errors, as there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ovserve.cli.arguments import usage_error

__all__ = ["CommandLine", "read_command_line"]

# Flags with a value that has no meaning here, and why.
_IGNORED: Mapping[str, str] = {
    **dict.fromkeys(
        ("grpc_bind_address", "grpc_workers", "grpc_max_threads", "grpc_memory_quota", "grpc_channel_arguments"),
        "there is no gRPC",
    ),
    "rest_workers": "max_connections limits connections",
    "file_system_poll_wait_seconds": "a reload is asked for",
    "custom_node_resources_cleaner_interval_seconds": "there are no custom nodes",
    "sequence_cleaner_poll_wait_minutes": "there are no sequences",
    "cpu_extension": "there are no custom operations",
    "log_path": "the log goes to standard error",
    "trace_path": "there are no traces of graphs",
    "metrics_list": "all metrics are on",
    "allowed_methods": "every path lists its methods",
    "allowed_headers": "browsers may send any field",
    "allow_credentials": "there are no cookies",
    "allowed_local_media_path": "images are sent in requests",
    "allowed_media_domains": "images are sent in requests",
    "verbose_response": "there is no text generation",
}
_SWITCHES = ("metrics_enable", "pull", "configure", "overwrite_models")
_BOOLEANS = ("true", "false")
# Flags of the modes; what follows them is for `ovserve pull`.
_PULL_FLAGS = ("weight_format", "extra_quantization_params")
_POSITIVE = ("num_streams", "max_num_images_per_prompt", "default_num_inference_steps", "max_num_inference_steps")
_LEVELS = {"TRACE": "debug", "DEBUG": "debug", "INFO": "info", "WARNING": "warning", "ERROR": "error"}
_TASK = "image_generation"
_REST_WORKERS = range(2, 10_001)


@dataclass(slots=True)
class CommandLine:
    """A command line after the reference server's flags have been taken out.

    Attributes:
        arguments: for `serve`.
        mode: serve, pull or configure.
        pull_arguments: for `ovserve pull`, besides the repository and the directory.
        ignored: flags without a meaning here, in words.
    """

    arguments: list[str] = field(default_factory=list)
    mode: str = "serve"
    pull_arguments: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def _pairs(arguments: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return flags, with underscores, and their values; None for a flag without one. Other words come with no flag."""
    found: list[tuple[str, str | None]] = []
    for index, argument in enumerate(arguments):
        if not argument.startswith("--"):
            if not (index and found and found[-1][0] and found[-1][1] == argument and "=" not in arguments[index - 1]):
                found.append(("", argument))
            continue
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        if equals:
            found.append((name, value))
            continue
        following = arguments[index + 1] if index + 1 < len(arguments) else None
        is_value = following is not None and not following.startswith("--")
        if name in _SWITCHES and following not in _BOOLEANS:
            is_value = False
        found.append((name, following if is_value else None))
    return found


def read_command_line(arguments: Sequence[str]) -> CommandLine:
    """Translate a command line. A wrong one ends the process with `ExitCode.USAGE`."""
    found = CommandLine()
    flags: dict[str, str | None] = {}
    for name, value in _pairs(arguments):
        if name:
            flags[name] = value
        _take(found, name, value)
    _check(found, flags)
    return found


def _take(found: CommandLine, name: str, value: str | None) -> None:
    """Sort one flag."""
    if name in _IGNORED:
        if value is None:
            usage_error(f"--{name}: expected a value")
        found.ignored.append(f"--{name}: {_IGNORED[name]}")
    elif name == "metrics_enable":
        found.ignored.append("--metrics_enable: metrics are always on")
    elif name in ("pull", "configure"):
        if value != "false":
            found.mode = name
    elif name == "overwrite_models":
        found.pull_arguments += ["--overwrite_models"] if value != "false" else []
    elif name in _PULL_FLAGS:
        found.pull_arguments.append(f"--{name}={value or ''}")
    elif name == "task":
        if value != _TASK:
            usage_error(f"--task={value}: only {_TASK} is served")
    elif name == "config_path":
        found.arguments.append(f"--config={value or ''}")
    elif name == "log_level" and value in _LEVELS:
        found.arguments.append(f"--log_level={_LEVELS[value]}")
    else:
        if name in _POSITIVE and value == "0":
            usage_error(f"--{name}=0: must be at least 1")
        if not name:
            found.arguments.append(str(value))
        else:
            found.arguments.append(f"--{name}" if value is None else f"--{name}={value}")


def _check(found: CommandLine, flags: Mapping[str, str | None]) -> None:
    """Check flags against each other."""
    if "port" in flags and "rest_port" in flags:
        if flags["port"] == flags["rest_port"]:
            usage_error(f"--port and --rest_port are both {flags['port']}; --port is the gRPC port beside --rest_port")
        found.arguments.remove(f"--port={flags['port']}")
        found.ignored.append("--port beside --rest_port: there is no gRPC")
    workers = flags.get("rest_workers")
    if workers is not None and not (workers.isdigit() and len(workers) < 6 and int(workers) in _REST_WORKERS):
        usage_error(f"--rest_workers={workers}: expected {_REST_WORKERS.start} to {_REST_WORKERS.stop - 1}")
    if "metrics_list" in flags and "metrics_enable" not in flags:
        usage_error("--metrics_list needs --metrics_enable")
    if "config_path" in flags:
        for name in ("model_name", "model_path", "source_model"):
            if name in flags:
                usage_error(f"--{name} cannot be combined with --config_path, which names the models")
    if found.mode == "pull" and not flags.get("source_model"):
        usage_error("--pull needs --source_model")
    if found.mode == "configure" and (not flags.get("model_path") or "pull" in flags or "model_name" in flags):
        usage_error("--configure needs --model_path, and excludes --pull and --model_name")
    if found.mode == "serve" and found.pull_arguments and not flags.get("source_model"):
        usage_error(f"{found.pull_arguments[0].partition('=')[0]} needs --source_model")
