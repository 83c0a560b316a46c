"""The messages between the front end and a worker: small, flat, frozen records.

    to the worker: Run Cancel Grant Stop        from the worker: Ready Heartbeat Prepared Progress Need Picture Done Failed

Longer text and all pictures travel as blobs. `wire.codec` writes each message as one line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

__all__ = [
    "Cancel",
    "Done",
    "Failed",
    "Grant",
    "Heartbeat",
    "Message",
    "Need",
    "Picture",
    "Prepared",
    "Progress",
    "Ready",
    "Run",
    "Stop",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """To the worker: do this job. `request` is the path of the segment with the ImageRequest; `timeout_s` what is left."""

    job: str
    request: str
    timeout_s: float
    alone: bool = False  # a worker died with it once: it runs with no neighbours

    kind: ClassVar[str] = "run"


@dataclass(frozen=True, slots=True)
class Cancel:
    """To the worker: nobody wants this job any more."""

    job: str

    kind: ClassVar[str] = "cancel"


@dataclass(frozen=True, slots=True)
class Grant:
    """To the worker: the segment for the bytes a Need announced. An empty path: there is no room, give the job up."""

    job: str
    picture: int
    path: str

    kind: ClassVar[str] = "grant"


@dataclass(frozen=True, slots=True)
class Stop:
    """To the worker: finish what you hold, then exit."""

    kind: ClassVar[str] = "stop"


@dataclass(frozen=True, slots=True)
class Ready:
    """From the worker: a real pass has worked. `capacity`: jobs it takes at once; `engine`: which one and why.

    `tuned`: what it measured and chose where the settings left the choice open, by option (threads, streams, max_batch; 0 is no
    choice). The supervisor gives the same to every later incarnation: another division of the device moves the last bits.
    """

    capacity: int
    engine: str
    why: str = ""
    tuned: dict[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = "ready"


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """From the device loop: alive, in `phase`; the next beat may take up to `allow_s` seconds (0: the configured limit)."""

    phase: str  # load, warm-up, idle, encode, denoise, decode, finish
    allow_s: float = 0.0

    kind: ClassVar[str] = "heartbeat"


@dataclass(frozen=True, slots=True)
class Prepared:
    """From the worker: the images could be decoded and the prompt fits; what can go wrong now is ours."""

    job: str
    mode: str  # text2image, image2image, inpainting
    width: int  # of the result, pixels
    height: int
    steps: int  # denoising steps that will run for each picture
    text_tokens: int
    image_tokens: int
    output_tokens: int
    revised_prompt: str = ""  # what was used, when a prompt was cut
    background: str = "opaque"  # of the results; transparent: some of their pixels are

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
    """From the worker: picture `picture` is encoded and takes `size` bytes; `partial` 0.. for a preview, -1 for the result."""

    job: str
    picture: int
    size: int
    partial: int = -1

    kind: ClassVar[str] = "need"


@dataclass(frozen=True, slots=True)
class Picture:
    """From the worker: the segment for `picture` is filled. `partial` as in Need."""

    job: str
    picture: int
    seed: int
    size: int
    partial: int = -1

    kind: ClassVar[str] = "picture"


@dataclass(frozen=True, slots=True)
class Done:
    """From the worker: every picture of the job is filled. Times in milliseconds."""

    job: str
    prepare_ms: float
    denoise_ms: float
    finish_ms: float

    kind: ClassVar[str] = "done"


@dataclass(frozen=True, slots=True)
class Failed:
    """From the worker: the job failed with this error (errors.ApiError.to_wire), or the worker itself when job is empty."""

    job: str
    error: dict[str, Any]

    kind: ClassVar[str] = "failed"


Message = Run | Cancel | Grant | Stop | Ready | Heartbeat | Prepared | Progress | Need | Picture | Done | Failed
