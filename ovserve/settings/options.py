"""The tables of options: name, type, default, unit, text and the reason for the default.

Flags (`--max_body_bytes`, also `--max-body-bytes`), the environment (`OVSERVE_MAX_BODY_BYTES`), the TOML file and the
reference page are generated from the two tables below: `Settings` (the server) and `ModelSettings` (one `[[model]]`).
`ovserve.settings.sources` reads the values. Nothing reads the environment at import.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ovserve.settings.loras import CompositeSettings, LoraSettings

__all__ = [
    "BUILTIN_ALIASES",
    "BUILTIN_NAMES",
    "BUILTIN_PREFIX",
    "CATCH_ALL",
    "DEFAULT_NAME",
    "NO_CACHE",
    "ModelSettings",
    "Option",
    "Resolution",
    "Settings",
    "options_of",
]

MIB = 1024 * 1024
BUILTIN_PREFIX = "builtin:"  # of the option `path`: a model in the package, `builtin:shapes`
DEFAULT_BUILTIN = f"{BUILTIN_PREFIX}shapes"  # served where `path` is not given
# Served names of the built-in models, if the option `name` is empty.
DEFAULT_NAME = "ovserve-builtin"
BUILTIN_NAMES = {"things": "ovserve-things"}  # of the others
# What clients send that do not let their users choose a name, or have it as a default (measured).
BUILTIN_ALIASES = ("gpt-image-1", "gpt-image-1-mini", "gpt-image-1.5", "gpt-image-2", "dall-e-2", "dall-e-3", "default")
NO_CACHE = Path("off")  # of the option `cache_dir`
LAZY_KEEP_ALIVE_S = 300.0  # of a lazy model whose option `keep_alive_s` is not set
CATCH_ALL = "*"  # the alias for every name that no model has


Replicas = int  # of the option `replicas`: 0 is written `auto`


@dataclass(frozen=True, slots=True)
class Option:
    """The description of one option; its name, type and default are those of the dataclass field.

    Attributes:
        text: what it does, one sentence for the reference page.
        reason: why the default has its value; empty where it is obvious.
        unit: the unit in words; empty for names and switches.
        low, high: inclusive bounds of a number.
        choices: the values that a name may have.
        aliases: other spellings of the flag (the reference server's).
    """

    text: str
    reason: str = ""
    unit: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Resolution:
    """A width and a height in pixels, written `WxH`."""

    width: int
    height: int

    @classmethod
    def parse(cls, text: str) -> Resolution:
        """Parse `WIDTHxHEIGHT`, such as `512x256`. Raises ValueError."""
        match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
        if not match:
            raise ValueError("expected WxH in pixels, such as 512x512")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def _option(default: Any, text: str, *, is_secret: bool = False, **known: Any) -> Any:
    return field(default=default, metadata={"option": Option(text, **known)}, repr=not is_secret)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """The options of one served model: a `[[model]]` table, or the flags for the only one.

    None means the value that the model declares.
    """

    name: str = _option(
        "",
        "Name for the request field `model`; empty: the directory's name, `ovserve-builtin` for `builtin:shapes`, "
        "`ovserve-things` for `builtin:things`.",
        aliases=("model_name",),
    )
    path: Path | None = _option(
        None,
        "Directory in diffusers layout with OpenVINO IR files, or a built-in model, `builtin:shapes` or "
        "`builtin:things`; none: `builtin:shapes`.",
        aliases=("model_path",),
    )
    source_model: str = _option(
        "",
        "Repository of a model hub, OWNER/NAME, that is downloaded as `ovserve pull` does, if it is not complete in "
        "model_repository_path; in place of `path`. Until then, requests for the model get 503.",
    )
    revision: str = _option("main", "Branch, tag or commit of source_model.")
    graph_options: str = _option(
        "read",
        "A `graph.pbtxt` of OpenVINO Model Server in the model's directory: `read`: its options apply; `ignore`.",
        choices=("read", "ignore"),
        reason="a directory that was made for that server keeps its limits and adapters",
    )
    aliases: tuple[str, ...] = _option(
        (),
        "Further names for the request field `model`, separated by commas; `*` stands for every name that no model "
        "has. They load nothing more.",
    )
    builtin_aliases: bool = _option(
        False,
        f"Add names that clients send on their own: {', '.join(f'`{name}`' for name in BUILTIN_ALIASES)}.",
    )
    vae: Path | None = _option(
        None,
        "Directory with the `vae_decoder` and `vae_encoder` to use, such as those of a tiny autoencoder; none: the "
        "model's.",
    )
    preview_vae: Path | None = _option(
        None,
        "Directory with the `vae_decoder` for previews, such as a tiny autoencoder; none: that of the pictures.",
    )
    lora: tuple[LoraSettings, ...] = ()
    composite: tuple[CompositeSettings, ...] = ()
    source_loras: str = _option(
        "",
        "LoRA adapters, separated by commas: `ALIAS=FILE.safetensors[:ALPHA]`, and composites of them: "
        "`ALIAS=@ALIAS[:ALPHA]+@ALIAS[:ALPHA]`. In the file, `[[model.lora]]` and `[[model.composite]]` tables say the "
        "same.",
    )
    prompt_loras: bool = _option(
        False,
        "Read `<lora:ALIAS:ALPHA>` in prompts: the text is removed, and the adapter or composite is applied.",
        reason="such a text could be meant for another program, or come from a page's template",
    )
    lora_denoiser: str = _option(
        "auto",
        "Compiled denoisers and text encoders of a model with adapters: `separate`: a second one for pictures without "
        "adapters; `shared`: one for all pictures, with half of the memory, but pictures without adapters may differ "
        "in the last bits from those of a server without adapters; `auto`: one for a large model where the bits are "
        "the same, which is measured at warm-up, else two (engine `genai`: always two).",
        choices=("auto", "separate", "shared"),
        reason="adding an adapter must not change the pictures of requests that do not use it",
    )
    text_encoder: str = _option(
        "auto",
        "Text encoders of engine `stepwise` between prompts: `keep` them in memory; `release` them after each new "
        "prompt, and load them again for the next one, from the cache if there is one; `auto`: release them if the "
        "model is expected to take more memory than is free when it is loaded. Those with adapters are kept.",
        choices=("auto", "keep", "release"),
        reason="the text encoder of a large transformer is as large as its denoiser",
    )
    vae_tile_px: int = _option(
        1024,
        "Side of the tiles in which engine `stepwise` decodes and encodes pictures of more than twice a tile's area; "
        "0: never in tiles.",
        low=0,
        high=8192,
        unit="pixels",
        reason="the memory of a VAE grows with the area, and that of its attention with the square of the area",
    )
    device: str = _option(
        "CPU",
        "OpenVINO device (`CPU`, `GPU.1`, `AUTO`, `HETERO:GPU,CPU`), or three separated by spaces: text encoder, "
        "denoiser, VAE. `auto`: the first GPU, or the CPU where there is none. `ovserve devices` lists them.",
        aliases=("target_device",),
        reason="it is always there",
    )
    pool: str = _option(
        "",
        "Where this model's workers run: `local`: on this machine, `ray`: on a Ray cluster (`ray_address`); empty: as "
        "the option default_pool of the server says.",
        choices=("", "local", "ray"),
    )
    placement: str = _option(
        "",
        "What a node of the cluster must have free for one worker, separated by commas: `cpus=4`, `memory=8GiB`, and "
        "custom resources as the nodes declare them, such as `ovserve_gpu=1`. Empty: `cpus=1`.",
        reason="Ray counts what is asked for; it measures and limits nothing",
    )
    engine: str = _option("auto", "Denoising engine.", choices=("auto", "genai", "stepwise"))
    replicas: Replicas = _option(
        1,
        "Worker processes for this model; `auto`: between min_replicas and max_replicas, one more while jobs wait and "
        "memory allows, one less when fewer would do.",
        low=0,
        high=1024,
        reason="each replica holds its own copy of the repacked weights",
    )
    load: str = _option(
        "eager",
        "When the model is loaded: `eager`: at the start; `lazy`: when the first request for it arrives, which waits.",
        choices=("eager", "lazy"),
        reason="the first request is then as fast as the others",
    )
    keep_alive_s: float | None = _option(
        None,
        "Time without a job after which the model is unloaded; the next request loads it again. 0: at once, -1: never; "
        "none: never for `load` = `eager`, 300 for `lazy`.",
        low=-1,
        high=86400 * 365,
        unit="seconds",
    )
    pinned: bool | None = _option(
        None, "Never unload the model to make room for another; none: true for `load` = `eager`, false for `lazy`."
    )
    priority: int = _option(
        0,
        "Of models that wait for memory, the one with the higher priority loads first: each level counts as much as "
        "10 s of waiting.",
        low=-100,
        high=100,
    )
    min_replicas: int = _option(1, "Minimum number of workers with `replicas` = `auto`.", low=1, high=1024)
    max_replicas: int = _option(2, "Maximum number of workers with `replicas` = `auto`.", low=1, high=1024)
    queue_limit: int = _option(
        64,
        "Maximum number of waiting jobs for this model; further requests get 429.",
        low=1,
        high=100_000,
        unit="jobs",
        reason="a minute of work for a small model, hours for a large one",
    )
    cache_dir: Path | None = _option(
        None,
        "Directory for compiled models, with a folder for each model; none: `ovserve/compiled` in the user's cache "
        "directory; `off`: compiled models are not kept.",
        reason="the second load of a model is faster, and quantised weights take less memory",
    )
    plugin_config: str = _option("", "Additional OpenVINO properties, as a JSON object.")
    plan: str = _option(
        "exact",
        "Precision, quantisation group and tiles: `exact`: the library's own, with the same bits; `measured`: as "
        "`ovserve tune --write` has stored them in the model's directory for this device. `plugin_config`, and options "
        "that are not at their default, win.",
        choices=("exact", "measured"),
        reason="a faster plan makes other pictures",
    )
    threads: int = _option(
        0, "CPU threads for one inference request; 0: measured and chosen at warm-up.", low=0, high=1024, unit="threads"
    )
    streams: int = _option(
        0,
        "Concurrent inference requests on a CPU; 0: measured and chosen at warm-up.",
        low=0,
        high=256,
        aliases=("num_streams",),
    )
    max_batch: int = _option(
        0,
        "Maximum number of pictures denoised in one call; 0: measured and chosen at warm-up.",
        low=0,
        high=256,
        unit="pictures",
    )
    default_resolution: Resolution | None = _option(None, "Result size when the request gives none.", unit="WxH")
    max_resolution: Resolution = _option(Resolution(4096, 4096), "Maximum width and height of a result.", unit="WxH")
    resolution: tuple[Resolution, ...] = _option(
        (),
        "The only sizes that a request may name, as WxH, separated by blanks; the first is the default. With it, `n` "
        "must be num_images_per_prompt (1), and `guidance_scale` the option of that name, or the model's own. With one "
        "size and engine `genai`, the model is compiled for it, which an NPU needs.",
        unit="WxH",
    )
    num_images_per_prompt: int | None = _option(
        None, "The only number of pictures of a request. Needs exactly one resolution.", low=1, high=64, unit="pictures"
    )
    guidance_scale: float | None = _option(
        None, "The only guidance scale of a request. Needs exactly one resolution.", low=0, high=1000
    )
    max_num_images_per_prompt: int = _option(
        10, "Maximum number of pictures for one request.", low=1, high=64, unit="pictures", reason="OpenAI's limit"
    )
    default_num_inference_steps: int | None = _option(
        None, "Denoising steps when the request gives none.", low=1, high=1000, unit="steps"
    )
    max_num_inference_steps: int = _option(
        100, "Maximum number of denoising steps for one request.", low=1, high=1000, unit="steps"
    )
    default_guidance_scale: float | None = _option(None, "Guidance scale when the request gives none.", low=0, high=100)
    max_guidance_scale: float = _option(50.0, "Maximum guidance scale.", low=0, high=1000)
    default_strength: float | None = _option(
        None, "Strength of an edit without a mask when the request gives none.", low=0, high=1
    )
    min_strength: float = _option(0.0, "Minimum strength.", low=0, high=1)
    max_strength: float = _option(1.0, "Maximum strength.", low=0, high=1)
    extra_images: str = _option(
        "refuse",
        "More images than the model takes: `refuse` (400), or `first`: the first ones are used, and the reply names "
        "the others (`ignored`).",
        choices=("refuse", "first"),
        reason="a picture made from a part of the request can surprise",
    )
    truncate_prompt: str | None = _option(
        None,
        "A prompt that is too long, where the request field `truncate_prompt` is left out: `refuse` (400) or `cut`; "
        "none: what the model declares, else `refuse`.",
        choices=("refuse", "cut"),
    )
    default_response_format: str = _option(
        "b64_json",
        "Pictures in a reply whose request does not choose with `response_format`; `openai`: as OpenAI does, `url` for "
        "a request that names `dall-e-...`, else base64. Streams always contain base64.",
        choices=("b64_json", "url", "openai"),
        reason="clients of current models expect base64, those written for dall-e a URL",
    )
    unknown_fields: str = _option(
        "refuse",
        "Request fields that no model has: `refuse` (400), or `ignore`: the reply names them (`ignored`).",
        choices=("refuse", "ignore"),
        reason="a mistyped name would change nothing, unnoticed",
    )
    missing_alpha: str = _option(
        "refuse",
        "`background` = `transparent` for an image without an alpha channel, or without an image: `refuse` (400), or "
        "`opaque`: the result is opaque, and the reply's `background` says so.",
        choices=("refuse", "opaque"),
        reason="an opaque result can surprise; but some chat models ask for transparency on their own",
    )
    memory_limit_bytes: int = _option(
        0,
        "Resident memory, without mapped files, above which a worker is killed; 0: three quarters of the memory of "
        "the machine"
        " or of its control group, whichever is less.",
        low=0,
        unit="bytes",
    )
    max_jobs_per_worker: int = _option(
        0,
        "Finished jobs after which a fresh worker takes over from a worker; it is ready before the old one stops, so "
        "it needs its memory beside that. 0: never.",
        low=0,
        high=1_000_000_000,
        unit="jobs",
        reason="a worker's memory stays flat; this is for a driver or a library whose memory does not",
    )

    @property
    def fewest_workers(self) -> int:
        """Workers that a loaded model has at least."""
        return self.replicas or self.min_replicas

    @property
    def most_workers(self) -> int:
        """Workers that a loaded model has at most."""
        return self.replicas or self.max_replicas

    @property
    def is_lazy(self) -> bool:
        """Whether the model is loaded when it is first requested, and not at the start."""
        return self.load == "lazy"

    @property
    def kept_s(self) -> float:
        """Seconds without a job after which the model is unloaded; infinity: never."""
        if self.keep_alive_s is None:
            return LAZY_KEEP_ALIVE_S if self.is_lazy else math.inf
        return math.inf if self.keep_alive_s < 0 else self.keep_alive_s

    @property
    def is_pinned(self) -> bool:
        """Whether the model is never unloaded to make room for another."""
        return not self.is_lazy if self.pinned is None else self.pinned

    @property
    def fixed_num_images(self) -> int | None:
        """The only number of pictures that a request may ask for; None: up to the maximum."""
        return (self.num_images_per_prompt or 1) if self.resolution else None

    @property
    def further_names(self) -> tuple[str, ...]:
        """Every value of the request field `model` that this model serves, besides its name."""
        return (*self.all_aliases, *self.adapter_names)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The aliases of the adapters, then those of the composites."""
        return (*(adapter.alias for adapter in self.lora), *(composite.alias for composite in self.composite))

    def adapters_of(self, name: str) -> dict[str, float]:
        """Return the adapters that a name for the request field `model` stands for, with their weights, by alias.

        Empty for the name of the model itself. The weight is a composite's, else the adapter's own.
        """
        own = {adapter.alias: adapter.alpha for adapter in self.lora}
        if name in own:
            return {name: own[name]}
        for composite in self.composite:
            if composite.alias == name:
                return {alias: own[alias] if alpha is None else alpha for alias, alpha in composite.components}
        return {}

    @property
    def builtin_name(self) -> str:
        """Which built-in model `path` means, e.g. `shapes`; empty for a directory."""
        text = str(self.path or DEFAULT_BUILTIN)
        return text.removeprefix(BUILTIN_PREFIX) if text.startswith(BUILTIN_PREFIX) else ""

    @property
    def exact_aliases(self) -> tuple[str, ...]:
        """The aliases without the one that stands for every other name."""
        return tuple(alias for alias in self.all_aliases if alias != CATCH_ALL)

    @property
    def all_aliases(self) -> tuple[str, ...]:
        """The aliases, with those of `builtin_aliases`; without the model's own name."""
        added = BUILTIN_ALIASES if self.builtin_aliases else ()
        return tuple(dict.fromkeys(alias for alias in (*self.aliases, *added) if alias != self.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options of the server."""

    host: str = _option(
        "127.0.0.1",
        "Address to listen on.",
        aliases=("rest_bind_address",),
        reason="nothing is reachable from the network by default",
    )
    port: int = _option(8000, "Port to listen on; 0: any free port.", low=0, high=65535, aliases=("rest_port",))
    listen: tuple[str, ...] = _option(
        (),
        "Addresses to listen on in place of `host` and `port`, separated by commas: `127.0.0.1:8000`, `[::1]:8000`, "
        "`unix:/run/ovserve/http.sock`. With `tls_certificate`, IP addresses serve TLS; one written as "
        "`http://127.0.0.1:8000` does not. Sockets from systemd (`LISTEN_FDS`) replace all of them.",
    )
    socket_mode: str = _option(
        "600",
        "Mode of the files of Unix sockets in `listen`, in octal digits: who may open one needs write permission.",
        reason="only the server's user, until the operator decides for others",
    )
    socket_owner: str = _option("", "User (name or number) who owns those files; empty: the server's.")
    socket_group: str = _option(
        "", "Group (name or number) of those files; empty: the server's. Others than its own groups need root."
    )
    tls_certificate: Path | None = _option(
        None,
        "PEM file with the server's certificate and those of the authorities between it and the root; it is read again "
        "when it changes. None: no TLS.",
    )
    tls_key: Path | None = _option(
        None, "PEM file with the certificate's private key, unencrypted; none: it is in the certificate's file."
    )
    tls_client_ca: Path | None = _option(
        None,
        "PEM file with the authorities of client certificates; clients without such a certificate are refused. None: "
        "clients need no certificate.",
    )
    tls_handshake_timeout_s: float = _option(10.0, "Time limit for a TLS handshake.", low=0.1, high=300, unit="seconds")
    models: tuple[ModelSettings, ...] = ()
    ignored: tuple[str, ...] = ()  # what a reference server's files and flags say that has no meaning here
    model_repository_path: Path | None = _option(
        None,
        "Directory of pulled models; without other models, those in it are served: its config.json, else each "
        "directory with a graph.pbtxt or a model_index.json. None: `ovserve/models` in the user's data directory.",
    )
    default_model: str = _option("", "Model for requests that name none; empty: the only model, if there is one.")
    ready_models: str = _option(
        "default",
        "Models that readiness waits for: `default`: the model for requests that name none, or one of the models if "
        "there is no such model; `any`: one of the models; `all`: every model.",
        reason="a load balancer must not send requests to a server that answers them with 503",
        choices=("default", "any", "all"),
    )
    watch: bool = _option(
        False,
        "Reload when the configuration file, a file with keys or a file of a model's directory changes.",
    )
    watch_interval_s: float = _option(
        1.0,
        "Time between two looks at the watched files; a change counts when two looks in a row see the same.",
        low=0.05,
        high=3600,
        unit="seconds",
    )
    log_level: str = _option("info", "Lowest level that is logged.", choices=("debug", "info", "warning", "error"))
    log_format: str = _option("text", "Format of log lines.", choices=("text", "json"))
    traces: bool = _option(
        False,
        "Export the spans of requests for OpenTelemetry, with the standard variables `OTEL_EXPORTER_OTLP_ENDPOINT`, "
        "`OTEL_TRACES_SAMPLER` and others. Needs the extra `otel`.",
    )
    usage_log: Path | None = _option(
        None,
        "File to which one line of JSON is appended for each request for pictures: key, model, pictures, pixels, "
        "steps, outcome, times; never prompts. It needs a local disk. None: no usage log.",
    )
    usage_log_bytes: int = _option(
        100 * MIB,
        "Size of the usage log above which it is renamed to a name with the time, and a new one is begun.",
        low=4096,
        high=1024 * 1024 * MIB,
        unit="bytes",
        reason="some hundred thousand requests",
    )
    usage_log_files: int = _option(
        0,
        "Maximum number of renamed usage logs; above it the oldest are deleted. 0: all stay.",
        low=0,
        high=1_000_000,
        unit="files",
        reason="a bill may still need them",
    )
    # Access.
    api_key: str = _option(
        "",
        "API key that requests must have. Prefer the environment: other users of the machine can read flags.",
        is_secret=True,
    )
    api_key_file: Path | None = _option(
        None,
        "File of API keys that requests must have, one on each line, with `#` for comments; none, and no api_key: no "
        "key is needed.",
    )

    named_keys_file: Path | None = _option(
        None,
        "File of named API keys with limits, `[[key]]` tables as `ovserve key add` writes them; they are valid beside "
        "those of `api_key` and `api_key_file`.",
    )

    admin_key: str = _option(
        "",
        "Key for the admin routes, such as reload, from any address. Prefer the environment or a file.",
        is_secret=True,
    )
    admin_key_file: Path | None = _option(
        None,
        "File of keys for the admin routes, in the format of api_key_file; none, and no admin_key: no key is valid.",
    )
    admin_listen: str | None = _option(
        None,
        "Second listener, on which admin routes need no key: an address with a port such as 127.0.0.1:8001, or the "
        "path of a Unix socket, which only the server's user can open. `/metrics` and `/v1/config` are then served "
        "there, and elsewhere only with an admin key. None: no second listener.",
        reason="a peer's address does not identify an operator: a local proxy or browser has it too",
    )
    allowed_hosts: str | None = _option(
        None,
        "Host names that requests may have in Host, separated by commas, such as images.example, *.lan.example; they "
        "are added to IP addresses, localhost, host.docker.internal, host.containers.internal, the machine's own name "
        "and the host of public_url. Other names get 421. None: Host is checked only while every listening address is "
        "loopback and no API key is configured. `*`: it is never checked.",
        reason="a web page can make its own name mean 127.0.0.1 (DNS rebinding)",
    )
    allowed_origins: str | None = _option(
        None,
        "Origins of web pages and apps that may call the API from a browser, separated by commas, such as "
        "https://a.example, app://obsidian.md, or `vscode-webview://` for every origin with that scheme; `*`: all. The "
        "server's own origin and loopback origins are always allowed; others get 403. None: no others.",
        reason="any page that a user opens could otherwise use the server",
    )
    trusted_proxies: str | None = _option(
        None,
        "IP addresses and networks of reverse proxies, separated by commas; `unix`: the peers of Unix sockets. Only "
        "their X-Forwarded-For and Forwarded fields, and their PROXY headers, name the client's address, for fairness "
        "between clients and the log. None: these fields are ignored.",
        reason="any client can send these fields",
    )
    proxy_protocol: bool = _option(
        False,
        "Connections of trusted_proxies begin with a header of the PROXY protocol, version 1 or 2; others do not. Not "
        "on the admin listener.",
        reason="whether there is a header must not be guessed: a client could send one",
    )

    # Limits on what clients can make grow.
    max_connections: int = _option(
        512,
        "Maximum number of connections. At the limit one that waits for a request is closed, or one of a client that "
        "has more than its share; if there is none, new ones get "
        "503 and health checks still work.",
        low=1,
        high=100_000,
        unit="connections",
        reason="each has one thread",
    )
    overflow_connections: int = _option(
        128,
        "Connections beyond max_connections that are kept open until their 503, or the response to a health check, "
        "is written.",
        low=1,
        high=10_000,
        unit="connections",
        reason="one thread serves all of them; above the limit the oldest is closed without a response",
    )
    overflow_timeout_s: float = _option(
        2.0, "Time limit for the whole exchange on such a connection.", low=0.1, high=60, unit="seconds"
    )
    backlog: int = _option(
        512, "Connections that the kernel queues before they are accepted.", low=1, high=65535, unit="connections"
    )
    max_request_line_bytes: int = _option(
        8192,
        "Maximum length of a request line.",
        low=64,
        high=1 * MIB,
        unit="bytes",
        reason="RFC 9112 section 3 recommends at least 8000",
    )
    max_field_line_bytes: int = _option(16384, "Maximum length of a field line.", low=64, high=1 * MIB, unit="bytes")
    max_head_bytes: int = _option(
        65536, "Maximum length of a head, all lines together.", low=128, high=16 * MIB, unit="bytes"
    )
    max_fields: int = _option(
        100, "Maximum number of field lines in a head or a trailer section.", low=1, high=10_000, unit="lines"
    )
    max_body_bytes: int = _option(
        256 * MIB,
        "Maximum size of a request body.",
        low=1,
        high=64 * 1024 * MIB,
        unit="bytes",
        reason="sixteen images of ordinary size; OpenAI allows 50 MB each",
    )
    max_parts: int = _option(
        128,
        "Maximum number of parts in a form.",
        low=1,
        high=100_000,
        unit="parts",
        reason="sixteen images, every field once, and some lists",
    )
    max_part_head_bytes: int = _option(
        8192, "Maximum length of the head of one part.", low=128, high=1 * MIB, unit="bytes"
    )
    max_text_field_bytes: int = _option(
        256 * 1024,
        "Maximum length of a text field.",
        low=1,
        high=64 * MIB,
        unit="bytes",
        reason="a prompt of 32000 characters of up to 4 bytes",
    )
    max_json_text_bytes: int = _option(
        1 * MIB,
        "Maximum size of a JSON body without its data URLs.",
        low=1024,
        high=64 * MIB,
        unit="bytes",
        reason="every field at its maximum fits; parsing holds the interpreter lock for some milliseconds",
    )
    max_images: int = _option(
        16, "Maximum number of images in one request.", low=1, high=1000, unit="images", reason="OpenAI's limit"
    )
    max_framing_overhead_bytes: int = _option(
        65536,
        "Maximum bytes of chunk framing beyond the bytes of content in a chunked body.",
        low=1024,
        high=64 * MIB,
        unit="bytes",
        reason="a body in one-byte chunks costs minutes of interpreter time",
    )
    max_chunk_line_bytes: int = _option(
        1024,
        "Maximum length of the line before a chunk: its size and its extensions.",
        low=32,
        high=65536,
        unit="bytes",
        reason="a size takes 16 digits; signatures that some clients send as extensions take 90",
    )
    max_image_pixels: int = _option(
        50_000_000,
        "Maximum number of pixels of an uploaded image, read from its header.",
        low=1,
        high=2_000_000_000,
        unit="pixels",
        reason="a phone's photo; 200 MB after decoding",
    )
    max_prepared_bytes: int = _option(
        1024 * MIB,
        "Decoded pixels of the edits in one worker, at which it prepares no further ones. One edit may exceed it, "
        "and one more of another client.",
        low=1 * MIB,
        unit="bytes",
        reason="a masked edit takes 7 MB at 1024x1024 pixels and 120 MB at 4096x4096",
    )
    max_image_side_px: int = _option(
        16384, "Maximum side length of an uploaded image.", low=1, high=65535, unit="pixels"
    )

    decode_cpu_limit_s: float = _option(
        10.0,
        "Maximum CPU time for decoding one uploaded image. Smaller images get a part of it: a twentieth up to one "
        "megapixel, all of it from 49 megapixels. At the limit the request gets 400.",
        low=0.1,
        high=3600,
        unit="seconds",
        reason="several times what a photograph needs on a slow machine; a file that needs more is made to",
    )
    decode_memory_limit_bytes: int = _option(
        1536 * MIB,
        "Maximum memory for decoding one uploaded image; smaller images get less, by their number of pixels. At the "
        "limit the request gets 400.",
        low=64 * MIB,
        high=1024 * 1024 * MIB,
        unit="bytes",
        reason="20 bytes for each pixel of the largest image, and its file",
    )

    # Timeouts.
    head_timeout_s: float = _option(
        10.0, "Time from the first byte of a request to the end of its head.", low=0.1, high=3600, unit="seconds"
    )
    idle_timeout_s: float = _option(
        75.0,
        "Maximum idle time between requests on a connection.",
        low=0.1,
        high=86400,
        unit="seconds",
        reason="longer than the 60 s of most proxies, so that the proxy closes first",
    )
    min_body_bytes_per_s: int = _option(
        1024,
        "Minimum rate of a request body; 0: only silence is limited.",
        low=0,
        high=1024 * MIB,
        unit="bytes per second",
    )
    body_grace_s: float = _option(
        20.0,
        "Time by which a body may fall behind the minimum rate, and so its longest silence. Bytes received early do "
        "not extend it.",
        low=0.1,
        high=3600,
        unit="seconds",
        reason="a phone that changes networks is silent for about ten seconds",
    )
    write_timeout_s: float = _option(
        60.0, "Maximum time without progress while a response is written.", low=0.1, high=3600, unit="seconds"
    )
    linger_s: float = _option(
        30.0,
        "Time for which a connection stays open after an early refusal, such as 413 or 401, while its client still "
        "sends; what arrives is dropped. It ends sooner when the client closes, is silent, or is slower than "
        "min_body_bytes_per_s.",
        low=0,
        high=3600,
        unit="seconds",
        reason="most clients read the response only when they have sent their whole body",
    )
    linger_bytes: int = _option(
        1024 * MIB,
        "Bytes that are dropped on one such connection.",
        low=0,
        high=64 * 1024 * MIB,
        unit="bytes",
        reason="four times the largest body that is accepted",
    )
    linger_connections: int = _option(
        256,
        "Maximum number of such connections; above it the oldest is closed, and its client may get a reset in place "
        "of the response.",
        low=1,
        high=100_000,
        unit="connections",
        reason="each takes a descriptor, and one thread serves all of them",
    )
    default_timeout_s: float = _option(
        600.0,
        "Deadline of a job when the request gives none.",
        low=0.1,
        high=86400,
        unit="seconds",
        reason="the official clients time out after 600 s",
    )
    max_timeout_s: float = _option(
        3600.0, "Maximum deadline that a request can set.", low=0.1, high=86400, unit="seconds"
    )
    sdapi_previews: int = _option(
        3,
        "Previews of each picture for `GET /sdapi/v1/progress`; 0: none.",
        low=0,
        high=3,
        reason="clients show them, but each costs up to half of a denoising step",
    )
    grace_period_s: float = _option(
        30.0, "Time for jobs in flight to finish after SIGTERM.", low=0, high=86400, unit="seconds"
    )

    shutdown_delay_s: float = _option(
        0.0,
        "Time after SIGTERM in which readiness is false but requests are still served; the drain begins after it.",
        reason="behind a load balancer, set it above the time that its health checks need to notice",
        low=0,
        high=3600,
        unit="seconds",
    )

    # Spool.
    spool_dir: Path | None = _option(
        None,
        "Directory for uploads and results in flight; none: /dev/shm.",
        reason="a tmpfs: bytes that exist for seconds need no disk",
    )
    spool_bytes: int = _option(
        2048 * MIB,
        "Maximum size of all spool segments together; further requests get 503.",
        low=1 * MIB,
        high=1024 * 1024 * MIB,
        unit="bytes",
    )
    spool_warm_bytes: int = _option(
        64 * MIB,
        "Maximum size of spool files kept mapped for the next uploads, at most a quarter of the spool; 0: none.",
        low=0,
        high=1024 * 1024 * MIB,
        unit="bytes",
        reason="one large upload or many small ones; receiving into unmapped memory takes several times as long",
    )
    spool_fallback_dir: Path | None = _option(None, "Directory used when spool_dir is full; none: 503 at once.")

    # Results kept for `response_format=url`.
    store_dir: Path | None = _option(
        None,
        "Directory for results that are returned as URLs; none: `ovserve` in the user's cache directory.",
        reason="on disk, so that a URL works after a restart",
    )
    store_bytes: int = _option(
        1024 * MIB,
        "Maximum size of kept results; above it the oldest are deleted.",
        low=1 * MIB,
        high=1024 * 1024 * MIB,
        unit="bytes",
    )
    url_ttl_s: float = _option(
        3600.0,
        "Time for which a URL works.",
        low=1,
        high=86400 * 365,
        unit="seconds",
        reason="OpenAI keeps them for an hour",
    )
    public_url: str = _option(
        "", "Base of returned URLs, such as https://images.example.org; empty: the request's Host."
    )

    web_pages: bool = _option(True, "Serve the pages `/` and `/status` to browsers.")

    # Workers.
    default_pool: str = _option(
        "local",
        "Where the workers of models without the option `pool` run: `local` or `ray`.",
        choices=("local", "ray"),
        reason="one machine needs no cluster",
    )
    ray_address: str = _option(
        "local",
        "The Ray cluster of the pool `ray`: `auto`: the one that this machine is a node of, `HOST:PORT` of its head, "
        "or `local`: one on this machine alone, on 127.0.0.1, that starts and ends with this server.",
        reason="it needs nothing but the package; who reaches the ports of a cluster can run code on it",
    )
    place_timeout_s: float = _option(
        600.0,
        "Time for the cluster to find a node for a worker; then the worker counts as dead, with the reason.",
        low=1,
        high=86400,
        unit="seconds",
        reason="an autoscaler may have to start a machine first",
    )
    memory_budget_bytes: int = _option(
        0,
        "Memory that the server and its workers may take. Before a model is loaded beyond it, idle models are "
        "unloaded, the least recently used first. A model whose weight files alone take more is an error. 0: no limit.",
        low=0,
        unit="bytes",
    )
    keep_alive_max_s: float = _option(
        3600.0,
        "Maximum of the request field `keep_alive`.",
        low=0,
        high=86400 * 365,
        unit="seconds",
        reason="one request must not keep a model for ever",
    )
    min_resident_s: float = _option(
        5.0,
        "Time for which a model that has been loaded is not unloaded to make room for another.",
        low=0,
        high=86400,
        unit="seconds",
        reason="requests for several models would otherwise load them in turns and do nothing else",
    )
    cache_bytes: int = _option(
        20 * 1024 * MIB,
        "Maximum size of the compiled models in one cache directory; above it the least recently used are deleted.",
        low=1 * MIB,
        high=1024 * 1024 * MIB,
        unit="bytes",
        reason="a compiled model is about as large as its weights",
    )
    load_timeout_s: float = _option(
        900.0,
        "Maximum time without a heartbeat while a worker reads and compiles its model.",
        low=1,
        high=86400,
        unit="seconds",
        reason="a first GPU compilation can take minutes",
    )
    hang_limit_s: float = _option(
        60.0,
        "Maximum time without a heartbeat of a busy worker; measured times can extend it.",
        low=1,
        high=86400,
        unit="seconds",
        reason="one native call can take 20 s",
    )
    idle_hang_limit_s: float = _option(
        10.0, "Maximum time without a heartbeat of an idle worker.", low=1, high=3600, unit="seconds"
    )
    terminate_timeout_s: float = _option(
        5.0,
        "Time from the request to exit until SIGKILL, and from SIGKILL until a worker that survives it is written off.",
        low=0.1,
        high=600,
        unit="seconds",
    )
    restart_delay_s: float = _option(
        0.2,
        "Delay before the first restart of a worker; doubles with each further one.",
        low=0,
        high=60,
        unit="seconds",
    )
    max_restart_delay_s: float = _option(30.0, "Maximum delay between restarts.", low=0.1, high=3600, unit="seconds")
    crash_loop_limit: int = _option(
        5,
        "Worker deaths in a row, without a finished job, after which a model is failed.",
        low=1,
        high=1000,
        unit="deaths",
    )
    failed_retry_s: float = _option(
        300.0, "Delay between attempts to start a failed model.", low=1, high=86400, unit="seconds"
    )


def options_of(table: type) -> dict[str, tuple[dataclasses.Field[Any], Option]]:
    """Return the options of `Settings` or `ModelSettings` by name, in the order of the table."""
    return {f.name: (f, f.metadata["option"]) for f in dataclasses.fields(table) if "option" in f.metadata}
