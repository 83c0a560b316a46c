"""Each option once: name, type, default, unit, text and the reason for its value.

Flags (`--max_body_bytes`, also `--max-body-bytes`), the environment (`OVSERVE_MAX_BODY_BYTES`), the TOML file and the
reference page are all made from the two tables below, `Settings` (the server) and `ModelSettings` (one `[[model]]`).
`ovserve.settings.sources` makes settings from them. Nothing reads the environment at import.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "ModelSettings",
    "Option",
    "Resolution",
    "Settings",
    "options_of",
    "parse_origins",
]

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Option:
    """What is known of one option beside its name and default.

    Attributes:
        text: what it does, one sentence for the reference page.
        reason: why the default is what it is; empty where it speaks for itself.
        unit: the unit in words, empty for names and switches.
        low, high: inclusive bounds of a number.
        choices: the only values, for a name.
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
        """`512x256` to a resolution. Raises ValueError."""
        match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
        if not match:
            raise ValueError("expected WxH in pixels, such as 512x512")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


_ORIGIN = re.compile(
    r"null|[a-z][a-z0-9+.\-]*://[A-Za-z0-9._~\-]+(?::[0-9]{1,5})?|[a-z]+://\[[0-9A-Fa-f:.]+\](?::[0-9]{1,5})?"
)


def parse_origins(text: str | None) -> tuple[str, ...]:
    """The origins of a list with commas, `("*",)` for all of them. Raises ValueError.

    In lower case, as browsers send them: RFC 6454 sections 4 and 6.2.
    """
    origins = tuple(origin for part in (text or "").split(",") if (origin := part.strip(" ").lower()))
    for origin in origins:
        if not (_ORIGIN.fullmatch(origin) or origins == ("*",)):
            raise ValueError(f"{origin!r} is no origin such as https://a.example or http://localhost:3000")
    return tuple(dict.fromkeys(origins))


def _option(default: Any, text: str, *, is_secret: bool = False, **known: Any) -> Any:
    return field(default=default, metadata={"option": Option(text, **known)}, repr=not is_secret)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """One served model: a `[[model]]` table, or the flags for the only one. None = what the model itself declares."""

    name: str = _option("", "Name that clients put into `model`; empty: the directory's name.", aliases=("model_name",))
    path: Path | None = _option(
        None,
        "Directory in the diffusers layout with OpenVINO IR files; none: the built-in model.",
        aliases=("model_path",),
    )
    device: str = _option(
        "CPU", "OpenVINO device, or three of them by spaces: text encoder, denoiser, VAE.", aliases=("target_device",)
    )
    engine: str = _option("auto", "Denoising engine.", choices=("auto", "genai", "stepwise"))
    replicas: int = _option(
        1,
        "Worker processes for this model.",
        low=1,
        high=64,
        reason="a second one costs a second copy of the repacked weights",
    )
    queue_limit: int = _option(
        64,
        "Jobs that may wait for this model; beyond: 429.",
        low=1,
        high=100_000,
        unit="jobs",
        reason="a minute of work for a small model, hours for a large one: nobody waits longer",
    )
    cache_dir: Path | None = _option(None, "Directory for compiled models; none: no cache.")
    plugin_config: str = _option("", "Further OpenVINO properties as one JSON object.")
    threads: int = _option(
        0, "CPU threads for one inference request; 0: chosen at warm-up.", low=0, high=1024, unit="threads"
    )
    streams: int = _option(
        0, "Inference requests that run side by side on a CPU; 0: chosen at warm-up.", low=0, high=256
    )
    max_batch: int = _option(
        0, "Most pictures denoised in one call; 0: chosen at warm-up.", low=0, high=256, unit="pictures"
    )
    default_resolution: Resolution | None = _option(None, "Size of the result when the request names none.", unit="WxH")
    max_resolution: Resolution = _option(Resolution(4096, 4096), "Largest size of a result, each side.", unit="WxH")
    max_num_images_per_prompt: int = _option(
        10, "Most pictures for one request.", low=1, high=64, unit="pictures", reason="OpenAI's own limit"
    )
    default_num_inference_steps: int | None = _option(
        None, "Denoising steps when the request names none.", low=1, high=1000, unit="steps"
    )
    max_num_inference_steps: int = _option(100, "Most denoising steps for one request.", low=1, high=1000, unit="steps")
    default_guidance_scale: float | None = _option(None, "Guidance scale when the request names none.", low=0, high=100)
    max_guidance_scale: float = _option(50.0, "Largest guidance scale.", low=0, high=1000)
    default_strength: float | None = _option(
        None, "Strength of an edit without a mask when the request names none.", low=0, high=1
    )
    min_strength: float = _option(0.0, "Smallest strength.", low=0, high=1)
    max_strength: float = _option(1.0, "Largest strength.", low=0, high=1)
    memory_limit_bytes: int = _option(
        0,
        "Resident memory, mapped files aside, at which a worker is ended; 0: three quarters of the machine's, or of what its control group may use.",
        low=0,
        unit="bytes",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The server."""

    host: str = _option(
        "127.0.0.1",
        "Address to listen on.",
        aliases=("rest_bind_address",),
        reason="nothing is open to the network unless asked",
    )
    port: int = _option(8000, "Port to listen on; 0: any free one.", low=0, high=65535, aliases=("rest_port",))
    models: tuple[ModelSettings, ...] = ()
    default_model: str = _option("", "Model used when a request names none; empty: the only one there is.")
    log_level: str = _option("info", "Least level that is logged.", choices=("debug", "info", "warning", "error"))
    log_format: str = _option("text", "Form of the log lines.", choices=("text", "json"))
    allowed_origins: str | None = _option(
        "*",
        "Origins whose pages may ask (CORS): `*` for all, or several with commas between, such as https://a.example,"
        " http://localhost:3000; `none`: no CORS fields.",
    )

    # Who may ask.
    api_key: str = _option(
        "",
        "A key that requests must carry; best in the environment, for other users of the machine can read flags.",
        is_secret=True,
    )
    api_key_file: Path | None = _option(
        None,
        "File of keys that requests must carry, one on each line, `#` before comments; none, and no api_key: nobody is asked.",
    )

    # What strangers can make grow.
    max_connections: int = _option(
        512,
        "Connections served at once; beyond, idle ones make way first, then: 503, health still answers.",
        low=1,
        high=100_000,
        unit="connections",
        reason="each holds one thread",
    )
    overflow_connections: int = _option(
        128,
        "Connections beyond max_connections kept open until their 503, or a health check's answer, is written.",
        low=1,
        high=10_000,
        unit="connections",
        reason="one thread for all of them; when there are more, the oldest is closed unanswered",
    )
    overflow_timeout_s: float = _option(
        2.0, "Time such a connection has for its whole exchange.", low=0.1, high=60, unit="seconds"
    )
    backlog: int = _option(
        512, "Connections the kernel may hold before they are accepted.", low=1, high=65535, unit="connections"
    )
    max_request_line_bytes: int = _option(
        8192,
        "Longest request line.",
        low=64,
        high=1 * MIB,
        unit="bytes",
        reason="RFC 9112 section 3 recommends at least 8000",
    )
    max_field_line_bytes: int = _option(16384, "Longest field line.", low=64, high=1 * MIB, unit="bytes")
    max_head_bytes: int = _option(65536, "Longest head, all lines together.", low=128, high=16 * MIB, unit="bytes")
    max_fields: int = _option(100, "Most field lines in a head or a trailer section.", low=1, high=10_000, unit="lines")
    max_body_bytes: int = _option(
        256 * MIB,
        "Largest request body.",
        low=1,
        high=64 * 1024 * MIB,
        unit="bytes",
        reason="sixteen images of ordinary size; OpenAI allows 50 MB for each",
    )
    max_parts: int = _option(
        128,
        "Most parts in a form.",
        low=1,
        high=100_000,
        unit="parts",
        reason="sixteen images, every field once, and room for lists",
    )
    max_part_head_bytes: int = _option(8192, "Longest head of one part.", low=128, high=1 * MIB, unit="bytes")
    max_text_field_bytes: int = _option(
        256 * 1024,
        "Longest text field.",
        low=1,
        high=64 * MIB,
        unit="bytes",
        reason="32000 characters of prompt, at most 4 bytes each",
    )
    max_json_text_bytes: int = _option(
        1 * MIB,
        "Most bytes of a JSON body beside its data URLs.",
        low=1024,
        high=64 * MIB,
        unit="bytes",
        reason="every field at its longest fits; parsing it holds the interpreter for some milliseconds",
    )
    max_images: int = _option(
        16, "Most images in one request.", low=1, high=1000, unit="images", reason="OpenAI's own limit"
    )
    max_framing_overhead_bytes: int = _option(
        65536,
        "How far the framing of a chunked body may outweigh its content.",
        low=1024,
        high=64 * MIB,
        unit="bytes",
        reason="a body in one-byte chunks costs minutes of interpreter time",
    )
    max_chunk_line_bytes: int = _option(
        1024,
        "Longest line before a chunk: its size and its extensions.",
        low=32,
        high=65536,
        unit="bytes",
        reason="a size takes 16 digits; the signatures that some clients put into extensions take 90",
    )
    max_image_pixels: int = _option(
        50_000_000,
        "Most pixels of an uploaded image, by its header.",
        low=1,
        high=2_000_000_000,
        unit="pixels",
        reason="a phone's picture; 200 MB once decoded",
    )
    max_image_side_px: int = _option(16384, "Longest side of an uploaded image.", low=1, high=65535, unit="pixels")

    # Time.
    head_timeout_s: float = _option(
        10.0, "From a request's first byte to the end of its head.", low=0.1, high=3600, unit="seconds"
    )
    idle_timeout_s: float = _option(
        75.0,
        "Silence allowed between requests on a connection.",
        low=0.1,
        high=86400,
        unit="seconds",
        reason="longer than a proxy's usual 60, so that the proxy closes first",
    )
    min_body_bytes_per_s: int = _option(
        1024,
        "Least rate of a request body; 0: only silence is limited.",
        low=0,
        high=1024 * MIB,
        unit="bytes per second",
    )
    body_grace_s: float = _option(
        20.0,
        "How far a body may fall behind its least rate, and so its longest silence, however much has come before.",
        low=0.1,
        high=3600,
        unit="seconds",
        reason="a phone that changes its network is silent for some ten seconds",
    )
    write_timeout_s: float = _option(
        60.0, "Longest standstill while an answer is written.", low=0.1, high=3600, unit="seconds"
    )
    linger_bytes: int = _option(
        4 * MIB,
        "Bytes of a refused body that are read and dropped so that the answer arrives.",
        low=0,
        high=1024 * MIB,
        unit="bytes",
    )
    linger_s: float = _option(2.0, "Time for the same.", low=0, high=60, unit="seconds")
    default_timeout_s: float = _option(
        600.0,
        "Deadline of a job when the request names none.",
        low=0.1,
        high=86400,
        unit="seconds",
        reason="the official clients give up after 600",
    )
    max_timeout_s: float = _option(
        3600.0, "Longest deadline a request may ask for.", low=0.1, high=86400, unit="seconds"
    )
    grace_period_s: float = _option(30.0, "Time for jobs in flight after SIGTERM.", low=0, high=86400, unit="seconds")

    # Spool.
    spool_dir: Path | None = _option(
        None,
        "Directory for uploads and results in flight; none: /dev/shm.",
        reason="tmpfs: bytes that live for seconds need no disk",
    )
    spool_bytes: int = _option(
        2048 * MIB,
        "Most bytes of spool segments at once; beyond: 503.",
        low=1 * MIB,
        high=1024 * 1024 * MIB,
        unit="bytes",
    )
    spool_warm_bytes: int = _option(
        64 * MIB,
        "Most bytes of used spool files that are kept for the next uploads, a quarter of the spool at most; 0: none.",
        low=0,
        high=1024 * 1024 * MIB,
        unit="bytes",
        reason="one large upload or many small ones; receiving into fresh memory takes several times as long",
    )
    spool_fallback_dir: Path | None = _option(None, "Directory used when the first has no room; none: 503 at once.")

    # Pictures kept for `response_format=url`.
    store_dir: Path | None = _option(
        None,
        "Directory for pictures that are answered as addresses; none: `ovserve` in the user's cache directory.",
        reason="on disk, so that an address outlives a restart",
    )
    store_bytes: int = _option(
        1024 * MIB,
        "Most bytes of kept pictures; beyond, the oldest go first.",
        low=1 * MIB,
        high=1024 * 1024 * MIB,
        unit="bytes",
    )
    url_ttl_s: float = _option(
        3600.0, "How long an address works.", low=1, high=86400 * 365, unit="seconds", reason="OpenAI's own hour"
    )
    public_url: str = _option(
        "", "What addresses begin with, such as https://images.example.org; empty: the request's Host."
    )

    # Workers.
    load_timeout_s: float = _option(
        900.0,
        "Longest silence of a worker that reads and compiles its model.",
        low=1,
        high=86400,
        unit="seconds",
        reason="a first GPU compilation can take minutes",
    )
    hang_limit_s: float = _option(
        60.0,
        "Longest silence of a worker at work, before measured times allow more.",
        low=1,
        high=86400,
        unit="seconds",
        reason="one native call may rightly last 20 s",
    )
    idle_hang_limit_s: float = _option(
        10.0, "Longest silence of a worker without work.", low=1, high=3600, unit="seconds"
    )
    terminate_timeout_s: float = _option(
        5.0,
        "From an order to end to SIGKILL, and from SIGKILL until a worker that does not end is done without.",
        low=0.1,
        high=600,
        unit="seconds",
    )
    restart_delay_s: float = _option(
        0.2, "Delay before the first restart of a worker; doubles each time.", low=0, high=60, unit="seconds"
    )
    max_restart_delay_s: float = _option(30.0, "Longest delay between restarts.", low=0.1, high=3600, unit="seconds")
    crash_loop_limit: int = _option(
        5, "Deaths in a row, without a finished job, that declare a model failed.", low=1, high=1000, unit="deaths"
    )
    failed_retry_s: float = _option(
        300.0, "Delay between attempts with a failed model.", low=1, high=86400, unit="seconds"
    )


def options_of(table: type) -> dict[str, tuple[dataclasses.Field[Any], Option]]:
    """The options of `Settings` or `ModelSettings` by name, in the order of the table."""
    return {f.name: (f, f.metadata["option"]) for f in dataclasses.fields(table) if "option" in f.metadata}
