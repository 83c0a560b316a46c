"""The messages between the front end and a worker, on one private pair of one-way queues for each worker incarnation.

    front end                                             worker
    Link.send  ── Run Cancel Room Stop ──────────────▶  WorkerEnd.receive
    Link.receive ◀── Ready Beat Prepared Progress ────  WorkerEnd.send
                     Need Done Failed

Laws of this file:
- A message is one line of JSON of at most MESSAGE_BYTES, so that a write to the pipe is whole or not at all (pipe(7), PIPE_BUF).
  Longer text and all pictures travel in spool segments.
- Nothing is ever unpickled. A line that is no message of ours raises LinkGarbage, and costs the worker its life.
- The front end's side never blocks: a worker stopped in mid-write must not stop the dispatcher.
- The front end closes its copy of the worker's ends, so a dead worker reads as end-of-file and never as a hang.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import sys
import termios
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from typing import Any, ClassVar

from ovserve.errors import OvserveError
from ovserve.wire.local.spool import Blob

__all__ = [
    "MAX_CAPACITY", "MESSAGE_BYTES", "Beat", "Cancel", "Done", "Failed", "ImageRequest", "Link", "LinkClosed",
    "LinkGarbage", "Message", "Need", "Picture", "Prepared", "Progress", "Ready", "Room", "Run", "Stop", "WorkerEnd",
    "open_link",
]  # fmt: skip

SEEDS = 2**32  # the library takes seeds modulo this
MESSAGE_BYTES = 4096  # PIPE_BUF on Linux: a write up to this size is atomic
MAX_CAPACITY = 1024  # jobs one worker may ask for; more is a worker that counts wrongly
_OUTBOX_LIMIT = 4096  # messages waiting for a worker that does not read; a worker holds far fewer jobs than this


class LinkClosed(OvserveError):
    """The other side is gone: end-of-file or a broken pipe."""


class LinkGarbage(OvserveError):
    """The other side sent something that is no message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """What to make: one frozen, validated request, made in api.routes, read in device.worker.

    Travels as JSON in a spool segment (a prompt alone may be larger than a message). `n` pictures are asked for; picture k
    uses seed + k (mod 2**32). Width and height 0: as the image. `images` are empty for text-to-image.
    """

    task: str  # edit, generation, variation
    prompt: str
    negative_prompt: str = ""
    prompt_2: str = ""
    prompt_3: str = ""
    negative_prompt_2: str = ""
    negative_prompt_3: str = ""
    images: tuple[Blob, ...] = ()
    mask: Blob | None = None
    mask_mode: str = "auto"  # auto, alpha, luminance
    mask_blur: int = 0  # pixels
    width: int = 0
    height: int = 0
    resize_mode: str = "crop"  # crop, pad, stretch
    n: int = 1
    seed: int = 0
    num_inference_steps: int = 1
    guidance_scale: float = 1.0
    strength: float | None = None  # None: the model's default, which depends on whether there is a mask
    scheduler: str = ""  # empty: the model's own
    max_sequence_length: int = 0  # 0: the model's own
    truncate_prompt: bool = False
    output_format: str = "png"  # png, jpeg, webp
    output_compression: int = 100  # percent, jpeg and webp
    background: str = "auto"  # auto, opaque, transparent
    metadata: bool = True  # write seed and settings into the file
    partial_images: int = 0
    progress: bool = False  # send Progress for each step
    preferred_strength: float | None = None  # in place of the model's default where the whole image is edited
    preferred_scheduler: str = ""  # a `quality` preset's, where `scheduler` is empty and the engine has it
    quality: str = ""  # the preset's name, for the file's metadata
    shortcuts: str = ""  # empty: exact; else the engine shortcuts a `quality` preset asked for

    def seed_of(self, picture: int) -> int:
        """The seed of picture `picture`, with which it can be had again alone."""
        return (self.seed + picture) % SEEDS

    def to_json(self) -> bytes:
        """The record as UTF-8 JSON, without the fields that are at their defaults."""
        values = {name: value for name, default in _DEFAULTS.items() if (value := getattr(self, name)) != default}
        return json.dumps(values, ensure_ascii=False, separators=(",", ":"), default=dataclasses.asdict).encode()

    @classmethod
    def from_json(cls, data: bytes) -> ImageRequest:
        """The record again. Raises LinkGarbage."""
        try:
            values = json.loads(data)
            if "images" in values:
                values["images"] = tuple(Blob(**blob) for blob in values["images"])
            if "mask" in values:
                values["mask"] = Blob(**values["mask"])
            return cls(**values)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise LinkGarbage(f"no image request: {error}") from None


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(ImageRequest)}  # MISSING equals no value


# --- messages ---------------------------------------------------------------------------------------------------------


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
class Room:
    """To the worker: the segment for the bytes a Need announced. An empty path: there is no room, give the job up."""

    job: str
    picture: int
    path: str

    kind: ClassVar[str] = "room"


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
class Beat:
    """From the device loop: alive, in `phase`; the next beat may take up to `allow_s` seconds (0: the configured limit)."""

    phase: str  # load, warm-up, idle, encode, denoise, decode, finish
    allow_s: float = 0.0

    kind: ClassVar[str] = "beat"


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


Message = Run | Cancel | Room | Stop | Ready | Beat | Prepared | Progress | Need | Picture | Done | Failed

_KINDS: dict[str, type[Any]] = {
    m.kind: m for m in (Run, Cancel, Room, Stop, Ready, Beat, Prepared, Progress, Need, Picture, Done, Failed)
}
# JSON gives exactly these types: a bool is no int here.
_TYPES: dict[str, frozenset[type]] = {
    "str": frozenset({str}),
    "int": frozenset({int}),
    "float": frozenset({int, float}),
    "bool": frozenset({bool}),
    "dict[str, Any]": frozenset({dict}),
}
_FIELDS = {kind: {f.name: _TYPES[str(f.type)] for f in dataclasses.fields(m)} for kind, m in _KINDS.items()}
_NUMBERS = frozenset({int, float})
_LARGEST = 1e15  # no duration in milliseconds and no size in bytes of ours comes near it


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


_ENCODER = json.JSONEncoder(separators=(",", ":"))
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def encode(message: Message) -> bytes:
    """One message as one line. Raises ValueError when it is longer than a pipe takes whole: a bug of the sender."""
    values: dict[str, object] = {"kind": message.kind}
    for name in _FIELDS[message.kind]:
        values[name] = getattr(message, name)
    line = _ENCODER.encode(values).encode() + b"\n"
    if len(line) > MESSAGE_BYTES:
        raise ValueError(f"message {message.kind!r} has {len(line)} bytes, more than {MESSAGE_BYTES}")
    return line


def decode(line: bytes) -> Message:
    """One line as a message, every field checked for its type. Raises LinkGarbage."""
    try:
        values = _DECODER.decode(line.decode())
    except (ValueError, RecursionError):  # the second: thousands of open brackets
        raise LinkGarbage(f"no JSON: {line[:80]!r}") from None
    kind = values.pop("kind", None) if isinstance(values, dict) else None
    wanted = _FIELDS.get(kind) if isinstance(kind, str) else None
    if wanted is None:
        raise LinkGarbage(f"no message: {line[:80]!r}")
    for name, value in values.items():
        given = type(value)
        if given not in wanted.get(name, ()):
            raise LinkGarbage(f"message {kind!r}: {name[:80]} is {given.__name__}")
        if given in _NUMBERS and not -_LARGEST <= value <= _LARGEST:  # 1e999 reads as infinity, 10**400 fits no float
            raise LinkGarbage(f"message {kind!r}: {name} is out of range")
    try:
        message: Message = _KINDS[str(kind)](**values)
    except TypeError as error:
        raise LinkGarbage(f"message {kind!r}: {error}") from None
    return message


class _Lines:
    """Bytes in, whole lines out; never holds more than one message's worth of an unfinished line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) >= MESSAGE_BYTES or any(len(line) >= MESSAGE_BYTES for line in lines):  # the newline counts
            raise LinkGarbage(f"a line of more than {MESSAGE_BYTES} bytes")
        return lines


# --- the two ends -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class WorkerEnd:
    """The worker's side of a link. Passed to the child process; blocking; `send` is thread-safe (one lock)."""

    commands: Connection
    reports: Connection
    _lines: _Lines = field(default_factory=_Lines)
    _waiting: deque[bytes] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __getstate__(self) -> Mapping[str, Connection]:
        return {"commands": self.commands, "reports": self.reports}

    def __setstate__(self, state: Mapping[str, Connection]) -> None:
        self.commands, self.reports = state["commands"], state["reports"]
        self._lines, self._waiting, self._lock = _Lines(), deque(), threading.Lock()

    def receive(self) -> Message:
        """The next command; blocks. Raises LinkClosed when the front end is gone, LinkGarbage."""
        while not self._waiting:
            data = os.read(self.commands.fileno(), 65536)
            if not data:
                raise LinkClosed("the front end closed the link")
            self._waiting.extend(self._lines.feed(data))
        return decode(self._waiting.popleft())

    def send(self, message: Message) -> None:
        """Report to the front end. Raises LinkClosed when it is gone."""
        line = encode(message)
        with self._lock:
            try:
                os.write(self.reports.fileno(), line)  # at most PIPE_BUF on a blocking pipe: whole or not at all
            except OSError as error:
                raise LinkClosed(f"the front end is gone: {error.strerror}") from None

    def close(self) -> None:
        """Close both queues."""
        self.commands.close()
        self.reports.close()


class Link:
    """The front end's side: never blocks. One link for one worker incarnation; thrown away with it.

    Owned by the dispatcher thread, which alone calls `send`, `flush`, `receive` and `close` once the link is attached. The
    supervisor reads `ready`, `failure`, `lost`, `phase`, `beat_at`, `allow_s` and `jobs_done` (plain values that the dispatcher
    thread replaces), never the queues.
    """

    def __init__(self, model: str, index: int, incarnation: int, commands: Connection, reports: Connection) -> None:
        self.model = model
        self.index = index  # stable place 0..replicas-1
        self.incarnation = incarnation  # how often that place was filled before
        self.ready: Ready | None = None
        self.failure: Failed | None = None  # a Failed without a job: why the worker gives up
        self.lost = ""  # why the dispatcher has let go of it; its process has to end
        self.is_retired = False  # it gets no more jobs
        self.is_broken = False  # let go of for what it said, not because it was gone
        self.is_clogged = False  # a command found no place, for the worker has not read for far too long
        self.jobs_lost = 0  # jobs it had read then that nobody had settled
        self.lost_second_try = False  # one of those had cost a worker before
        self.phase = "spawn"
        self.beat_at = time.monotonic()
        self.allow_s = 0.0
        self.jobs_done = 0  # those whose end was believed
        self._commands = commands
        self._reports = reports
        self._lines = _Lines()
        self._outbox: deque[bytes] = deque()
        self.given_bytes = 0  # of commands, those in the outbox included
        os.set_blocking(commands.fileno(), False)
        os.set_blocking(reports.fileno(), False)

    @property
    def name(self) -> str:
        """`model/index#incarnation`, as logs write it."""
        return f"{self.model}/{self.index}#{self.incarnation}"

    def fileno(self) -> int:
        """The descriptor that becomes readable when the worker reports."""
        return self._reports.fileno()

    def commands_fileno(self) -> int:
        """The descriptor to watch for writability while `has_backlog`."""
        return self._commands.fileno()

    @property
    def has_backlog(self) -> bool:
        """Whether commands wait for the worker to read."""
        return bool(self._outbox)

    @property
    def read_bytes(self) -> int:
        """How many of `given_bytes` the worker has taken; a pipe tells (pipe(7), FIONREAD) after the reader's death too."""
        left = fcntl.ioctl(self._commands.fileno(), termios.FIONREAD, bytes(4))
        return self.given_bytes - sum(map(len, self._outbox)) - int.from_bytes(left, sys.byteorder)

    def send(self, message: Message) -> None:
        """Give the worker a command, now or as soon as it reads. Raises LinkClosed."""
        if len(self._outbox) >= _OUTBOX_LIMIT:
            self.is_clogged = True
            raise LinkClosed("the worker has not read its commands for too long")
        line = encode(message)
        self._outbox.append(line)
        self.given_bytes += len(line)
        self.flush()

    def flush(self) -> None:
        """Write what the pipe takes. Raises LinkClosed."""
        while self._outbox:
            try:
                os.write(self._commands.fileno(), self._outbox[0])
            except BlockingIOError:
                return
            except OSError as error:
                raise LinkClosed(f"the worker is gone: {error.strerror}") from None
            self._outbox.popleft()

    def receive(self) -> list[Message]:
        """What has come in; beats and readiness are noted on the link itself. Raises LinkClosed, LinkGarbage."""
        try:
            data = os.read(self._reports.fileno(), 65536)
        except BlockingIOError:
            return []
        except OSError as error:
            raise LinkClosed(f"the worker is gone: {error.strerror}") from None
        if not data:
            raise LinkClosed("the worker is gone")
        messages = [decode(line) for line in self._lines.feed(data)]
        for message in messages:
            self._note(message)
        return messages

    def _note(self, message: Message) -> None:
        if isinstance(message, Beat):
            self.phase, self.allow_s, self.beat_at = message.phase, message.allow_s, time.monotonic()
        elif isinstance(message, Ready):
            if not 1 <= message.capacity <= MAX_CAPACITY:
                raise LinkGarbage(f"a capacity of {message.capacity}")
            # Loading is over, and with it the long silence allowed for it, whether a beat says so or not.
            self.ready, self.phase, self.allow_s, self.beat_at = message, "idle", 0.0, time.monotonic()
        elif isinstance(message, Failed) and not message.job:
            self.failure = message

    def close(self) -> None:
        """Close both queues: the worker reads end-of-file and ends."""
        self._commands.close()
        self._reports.close()


def open_link(context: SpawnContext, model: str, index: int, incarnation: int) -> tuple[Link, WorkerEnd]:
    """A fresh pair of queues. The caller passes the second value to the process and closes its own copy after the start."""
    commands_read, commands_write = context.Pipe(duplex=False)
    reports_read, reports_write = context.Pipe(duplex=False)
    return Link(model, index, incarnation, commands_write, reports_read), WorkerEnd(commands_read, reports_write)
