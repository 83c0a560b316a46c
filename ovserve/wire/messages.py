"""The messages between the front end and a worker: small, flat, frozen records.

    to the worker:    Run Cancel Grant LogLevel Stop
    from the worker:  Ready Heartbeat Counts Span Prepared Progress Need Picture Done Failed

Longer text and all pictures travel as blobs. `wire.codec` encodes each message as one line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

__all__ = [
    "COUNTS",
    "Cancel",
    "Counts",
    "Done",
    "Failed",
    "Grant",
    "Heartbeat",
    "LogLevel",
    "Message",
    "Need",
    "Picture",
    "Prepared",
    "Progress",
    "Ready",
    "Run",
    "Span",
    "Stop",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """To the worker: run this job.

    Attributes:
        request: id of the blob storage that holds the ImageRequest.
        timeout_s: time left until the job's deadline.
        alone: run it without batch neighbours, because a worker has already died with it.
        client: an opaque name; the jobs of different clients take turns in the worker.
        heavy: preparing it takes long (`ImageRequest.is_heavy`).
        traced: report the times of its stages as Spans.
    """

    job: str
    request: str
    timeout_s: float
    alone: bool = False
    client: str = ""
    heavy: bool = False
    traced: bool = False

    kind: ClassVar[str] = "run"


@dataclass(frozen=True, slots=True)
class Cancel:
    """To the worker: stop this job; its result is no longer needed."""

    job: str

    kind: ClassVar[str] = "cancel"


@dataclass(frozen=True, slots=True)
class Grant:
    """To the worker: blob storage for the bytes that a Need announced.

    Attributes:
        storage: its id. Empty: there is no space; the worker leaves out a preview, and ends the job for a result.
    """

    job: str
    picture: int
    storage: str

    kind: ClassVar[str] = "grant"


@dataclass(frozen=True, slots=True)
class LogLevel:
    """To the worker: the lowest level that it logs, as in the option `log_level`."""

    level: str

    kind: ClassVar[str] = "log"


@dataclass(frozen=True, slots=True)
class Stop:
    """To the worker: finish the jobs it holds, then exit."""

    kind: ClassVar[str] = "stop"


@dataclass(frozen=True, slots=True)
class Ready:
    """From the worker: the warm-up pass has succeeded.

    Attributes:
        capacity: jobs that it takes at once.
        engine: which engine it runs.
        why: why this engine was chosen.
        tuned: values that it measured and chose for options left open in the settings, by option name (threads,
            streams, max_batch; 0: no choice). The supervisor passes them on to all later incarnations, because another
            division of the device changes the last bits of the results.
        schedulers: names of the schedulers that a request may choose, separated by commas.
        devices: memory of each device that reports it, and bytes of the model's weights there, by name.
    """

    capacity: int
    engine: str
    why: str = ""
    tuned: dict[str, Any] = field(default_factory=dict)
    schedulers: str = ""
    devices: dict[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = "ready"


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """From the device loop: the worker is in `phase`.

    The next heartbeat may take up to `allow_s` seconds; 0: the configured limit applies.
    """

    phase: str  # load, warm-up, idle, encode, denoise, decode, finish
    allow_s: float = 0.0

    kind: ClassVar[str] = "heartbeat"


# What a worker counts: denoising calls, their rows and microseconds, and lookups in its caches of encoded prompts and
# images.
COUNTS = ("calls", "rows", "call_us", "prompt_hits", "prompt_misses", "image_hits", "image_misses")


@dataclass(frozen=True, slots=True)
class Counts:
    """From the worker: what it has counted since its start, each of COUNTS. Sent at most once a second."""

    calls: int = 0
    rows: int = 0
    call_us: int = 0
    prompt_hits: int = 0
    prompt_misses: int = 0
    image_hits: int = 0
    image_misses: int = 0

    kind: ClassVar[str] = "counts"


@dataclass(frozen=True, slots=True)
class Span:
    """From the worker, for a traced job: a stage has ended. Instants of the monotonic clock, in seconds.

    Attributes:
        name: prepare, text, encode, call (of the denoiser), decode, device (all of a picture's time there), finish.
        picture: its number; -1: the stage is one of the whole job.
        rows: of a call.
    """

    job: str
    name: str
    started_at: float
    ended_at: float
    picture: int = -1
    rows: int = 0

    kind: ClassVar[str] = "span"


@dataclass(frozen=True, slots=True)
class Prepared:
    """From the worker: the images are decoded and the prompt fits. Errors after this are the server's."""

    job: str
    mode: str  # text2image, image2image, inpainting
    width: int  # of the result, pixels
    height: int  # of the result, pixels
    steps: int  # denoising steps for each picture
    text_tokens: int
    image_tokens: int
    output_tokens: int
    revised_prompt: str = ""  # the prompt as used, where it was truncated
    background: str = "opaque"  # of the results; "transparent": they have transparent pixels

    kind: ClassVar[str] = "prepared"


@dataclass(frozen=True, slots=True)
class Progress:
    """From the worker: `step` of `steps` denoising steps are done for picture `picture`."""

    job: str
    picture: int
    step: int
    steps: int

    kind: ClassVar[str] = "progress"


@dataclass(frozen=True, slots=True)
class Need:
    """From the worker: a segment of `size` bytes is needed for `picture`.

    Attributes:
        size: bytes of the file, or an upper limit of them for a result that is not encoded yet.
        partial: 0 or more for a preview, -1 for the result.
    """

    job: str
    picture: int
    size: int
    partial: int = -1

    kind: ClassVar[str] = "need"


@dataclass(frozen=True, slots=True)
class Picture:
    """From the worker: the segment for `picture` is written. `partial` as in Need."""

    job: str
    picture: int
    seed: int
    size: int
    partial: int = -1

    kind: ClassVar[str] = "picture"


@dataclass(frozen=True, slots=True)
class Done:
    """From the worker: all pictures of the job are written. Times in milliseconds."""

    job: str
    prepare_ms: float
    denoise_ms: float
    finish_ms: float

    kind: ClassVar[str] = "done"


@dataclass(frozen=True, slots=True)
class Failed:
    """From the worker: the job, or the worker if `job` is empty, failed with this error (errors.ApiError.to_wire)."""

    job: str
    error: dict[str, Any]

    kind: ClassVar[str] = "failed"


Message = (
    Run
    | Cancel
    | Grant
    | LogLevel
    | Stop
    | Ready
    | Heartbeat
    | Counts
    | Span
    | Prepared
    | Progress
    | Need
    | Picture
    | Done
    | Failed
)
