"""A toy worker process without a model: the prompt is a command. Links and segments are the real ones.

prompt              behaviour of the worker
------------------  ----------------------------------------------------------------------------------------------------
echo TEXT           returns for each picture the bytes `echo TEXT|seed`; with an image, the bytes of the first image
crc                 returns 1024 bytes for each picture; the last four are the CRC-32 of the first image
bytes N [S]         returns for each picture, and each requested preview, `bytes_of(seed, N)`, after S seconds; does not
                    read the images
sleep S             as echo, after S seconds; stops when cancelled
steps N S           as echo, after N steps of S seconds with a Progress message for each; stops when cancelled
previews N          as echo, after N Partial pictures
paint S             as echo, after one of two steps, a preview and S seconds; stops when cancelled
first S             as echo, but S seconds pass after the first picture; stops when cancelled
raise               fails the job with status 400
native S            writes two lines to descriptor 2, as a native library does, then as sleep S
abort TEXT          writes TEXT to descriptor 2, without an end of the line, and aborts
exit N              exits with exit code N
segv                exits with a segmentation fault
dies POINT          kills itself with SIGKILL at a point of the job: received, prepared, step, announced, half (of a
                    result's bytes are written), filled, reported (the job is not done), done
hang                stops its heartbeat and never answers
partial             writes the first half of a message, stops its heartbeat and never answers
leak                allocates memory until it is killed
garbage             writes bytes that are not a message
wrong               reports a job that it was never given as done
twice               reports its job as done twice
too large           announces a picture of 10 bytes and reports 11
oversized           announces a picture larger than any limit
unannounced         reports a picture that it never announced
unrequested         announces a picture number that was not requested
short               reports the job as done without a picture
unprepared          reports the job as done, but never as prepared
once PATH COMMAND   if PATH does not exist: creates it, then runs COMMAND; else as echo

The model's `plugin_config`, a JSON object, sets the behaviour before the first job: {"load": COMMAND, "load_s": S,
"capacity": N, "heartbeat_s": S}. Commands for "load": fail TEXT (reports the error TEXT, then exits), exit N, segv,
kill, hang, until PATH COMMAND (runs COMMAND unless PATH exists).
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from zlib import crc32

from ovserve.errors import BlobGone, ImageError, InternalError, LinkClosed
from ovserve.models.families import Defaults
from ovserve.models.profile import ModelProfile, Scheduling
from ovserve.settings.options import ModelSettings, Resolution
from ovserve.settings.worker import WorkerSettings
from ovserve.wire.blobs import WorkerBlobs
from ovserve.wire.local.pipes import PipeWorkerLink
from ovserve.wire.messages import (
    Cancel,
    Done,
    Failed,
    Grant,
    Heartbeat,
    Need,
    Picture,
    Prepared,
    Progress,
    Ready,
    Run,
    Stop,
)
from ovserve.wire.request import ImageRequest

HEARTBEAT_S = 0.05


def toy_profile(name: str = "toy") -> ModelProfile:
    """Return the profile of a toy model; its directory has no model."""
    return ModelProfile(
        name=name,
        directory=Path(__file__).parent / "toyserver",
        pipeline_class="StableDiffusionPipeline",
        family="stable-diffusion",
        component_tasks=frozenset({"text2image", "image2image", "inpainting"}),
        tasks=frozenset({"text2image", "image2image", "inpainting"}),
        inpainting_unet=False,
        side_multiple_px=8,
        native=Resolution(64, 64),
        min_side_px=8,
        max_side_px=4096,
        prompt_tokens=77,
        text_encoders=1,
        takes_negative_prompt=True,
        references=0,
        guidance="classifier-free",
        is_distilled=False,
        scheduling=Scheduling("DDIM", 1000, "leading", 50),
        defaults=Defaults(1, 1.0, 1.0, 1.0, 1.0),
    )


def bytes_of(seed: int, size: int) -> bytes:
    """Return the bytes of a picture with this seed for the prompt `bytes SIZE`."""
    return random.Random(seed).randbytes(size)


class _Stopped(Exception):
    """The job was cancelled, or its result was not granted a segment."""


class _ToyJob:
    """One job of the toy worker. A thread serves it; the command thread sets `cancelled` and `grants`."""

    def __init__(self, end: PipeWorkerLink, blobs: WorkerBlobs, run: Run) -> None:
        self.blobs = blobs
        self.id = run.job
        self.end = end
        self.request = ImageRequest.from_json(blobs.read(run.request))
        self.cancelled = threading.Event()
        self.dies_at = ""
        self.grants: dict[int, str] = {}  # id of the granted storage, by picture; empty: refused
        self.grant_received = threading.Condition()

    def pass_point(self, point: str) -> None:
        """Kill the process if the prompt names this point."""
        if self.dies_at == point:
            die("kill")

    def prepare(self) -> None:
        """Report the job as prepared."""
        self.pass_point("received")
        self.end.send(Prepared(self.id, "image2image", 64, 64, 1, 5, 0, 0))
        self.pass_point("prepared")
        if self.dies_at == "step":
            self.end.send(Progress(self.id, 0, 1, 4))
            self.pass_point("step")

    def sleep(self, seconds: float) -> None:
        """Wait. Raises _Stopped when the job is cancelled."""
        if self.cancelled.wait(seconds):
            raise _Stopped

    def deliver(self, picture: int, data: bytes, partial: int = -1) -> None:
        """Announce a picture, write it into the granted segment and report it."""
        self.end.send(Need(self.id, picture, len(data), partial))
        with self.grant_received:
            if not self.grant_received.wait_for(lambda: picture in self.grants, timeout=30):
                raise TimeoutError
            storage = self.grants.pop(picture)
        if not storage:
            raise _Stopped
        self.pass_point("announced")
        try:
            if self.dies_at == "half":
                self.blobs.fill(storage, data[: len(data) // 2])
                self.pass_point("half")
            self.blobs.fill(storage, data)
        except BlobGone:
            raise _Stopped from None
        self.pass_point("filled")
        self.end.send(Picture(self.id, picture, self.request.seed + picture, len(data), partial))
        self.pass_point("reported")

    def finish(self, pause_s: float = 0) -> None:
        """Deliver all pictures, the second one after a pause, and report the job as done."""
        for picture in range(self.request.n):
            if picture and pause_s:
                self.sleep(pause_s)
            if self.request.prompt.startswith("bytes "):
                data = bytes_of(self.request.seed + picture, int(self.request.prompt.split()[1]))
                for index in range(self.request.partial_images):
                    self.deliver(picture, data, partial=index)
            elif self.request.images:
                with self.blobs.open(self.request.images[0]) as view:
                    data = bytes(1020) + crc32(view).to_bytes(4, "big") if self.request.prompt == "crc" else bytes(view)
            else:
                data = f"{self.request.prompt}|{self.request.seed + picture}".encode()
            self.deliver(picture, data)
        self.end.send(Done(self.id, 1.0, 2.0, 3.0))
        self.pass_point("done")


class _ToyWorker:
    """The jobs of one toy worker process, and its answers to commands."""

    def __init__(self, end: PipeWorkerLink, blobs: WorkerBlobs) -> None:
        self.blobs = blobs
        self.end = end
        self.jobs: dict[str, _ToyJob] = {}
        self.is_silent = False
        self.stopping = threading.Event()

    def read_commands(self) -> None:
        """Read commands until the link closes, then exit."""
        while True:
            try:
                message = self.end.receive()
            except (LinkClosed, OSError):
                os._exit(0)
            if isinstance(message, Run):
                try:
                    job = self.jobs[message.job] = _ToyJob(self.end, self.blobs, message)
                except BlobGone:
                    self.end.send(Failed(message.job, InternalError("the exchange has ended").to_wire()))
                    continue
                threading.Thread(target=self.serve, args=(job,), daemon=True).start()
            elif isinstance(message, Cancel) and (job := self.jobs.get(message.job)):
                job.cancelled.set()
            elif isinstance(message, Grant) and (job := self.jobs.get(message.job)):
                with job.grant_received:
                    job.grants[message.picture] = message.storage
                    job.grant_received.notify_all()
            elif isinstance(message, Stop):
                self.stopping.set()

    def serve(self, job: _ToyJob) -> None:
        """Run the command of a job and settle the job."""
        try:
            self.run(job, job.request.prompt)
        except _Stopped:
            job.end.send(Failed(job.id, InternalError("stopped").to_wire()))
        except LinkClosed:
            os._exit(0)
        self.jobs.pop(job.id, None)

    def run(self, job: _ToyJob, prompt: str) -> None:
        """Run the command in the prompt."""
        command, _, rest = prompt.partition(" ")
        if command == "once":
            path, _, inner = rest.partition(" ")
            if not Path(path).exists():
                Path(path).touch()
                self.run(job, inner)
                return
        elif command == "raise":
            job.end.send(Failed(job.id, ImageError("the prompt is `raise`", param="image").to_wire()))
            return
        elif command == "dies":
            job.dies_at = rest
        elif command == "native":
            os.write(2, f"[lib] first of {job.id}\n[lib] seco".encode())
            os.write(2, f"nd of {job.id}\n".encode())
        elif command == "abort":
            os.write(2, rest.encode())
            os.abort()
        elif command in ("exit", "segv"):
            job.prepare()
            die(prompt)
        elif command in ("hang", "partial"):
            self.is_silent = True
            if command == "partial":
                os.write(job.end.reports.fileno(), b'{"kind":"progress","job":"')
            threading.Event().wait()
        elif command == "leak":
            leak()
        elif violate_protocol(job, prompt):
            return
        job.prepare()
        if command in ("sleep", "native"):
            job.sleep(float(rest))
        elif command == "steps":
            steps, seconds = rest.split()
            for step in range(int(steps)):
                job.sleep(float(seconds))
                job.end.send(Progress(job.id, 0, step + 1, int(steps)))
        elif command == "bytes":
            job.sleep(float(rest.partition(" ")[2] or 0))
        elif command == "previews":
            for index in range(int(rest)):
                job.deliver(0, f"preview {index}".encode(), partial=index)
        elif command == "paint":
            job.end.send(Progress(job.id, 0, 1, 2))
            job.deliver(0, b"preview", partial=0)
            job.sleep(float(rest))
        job.finish(float(rest) if command == "first" else 0)


def die(command: str) -> None:
    """End the process: `exit N`, `segv` or `kill`."""
    name, _, rest = command.partition(" ")
    if name == "exit":
        os._exit(int(rest))
    os.kill(os.getpid(), signal.SIGSEGV if name == "segv" else signal.SIGKILL)
    threading.Event().wait()


def leak() -> None:
    """Allocate 16 MiB every 20 ms and never return."""
    blocks = []
    while True:
        blocks.append(b"x" * (16 << 20))
        time.sleep(0.02)


def violate_protocol(job: _ToyJob, command: str) -> bool:
    """Violate the protocol as the command says. Return False if the command is not a violation."""
    send = job.end.send
    if command == "garbage":
        os.write(job.end.reports.fileno(), b"\x80\x04 not a message\n")
    elif command == "wrong":
        send(Done("an-unknown-job", 0, 0, 0))
    elif command == "unprepared":
        job.finish()
    elif command == "twice":
        job.prepare()
        job.finish()
        send(Done(job.id, 0, 0, 0))
    elif command == "too large":
        send(Need(job.id, 0, 10))
        send(Picture(job.id, 0, 0, 11))
    elif command == "oversized":
        send(Need(job.id, 0, 1 << 40))
    elif command == "unannounced":
        send(Picture(job.id, 0, 0, 5))
    elif command == "unrequested":
        send(Need(job.id, job.request.n, 10))
    elif command == "short":
        send(Done(job.id, 0, 0, 0))
    else:
        return False
    return True


def worker_main(
    end: PipeWorkerLink, blobs: WorkerBlobs, profile: ModelProfile, model: ModelSettings, settings: WorkerSettings
) -> None:
    """Run a toy worker: the spawn target, in place of the real worker's main function."""
    worker = _ToyWorker(end, blobs)
    options = json.loads(model.plugin_config or "{}")
    beat_s = float(options.get("heartbeat_s", HEARTBEAT_S))
    threading.Thread(target=worker.read_commands, daemon=True).start()
    end.send(Heartbeat("load"))
    command = str(options.get("load", ""))
    time.sleep(float(options.get("load_s", 0)))
    if command.startswith("until "):
        _, path, inner = command.split(" ", 2)
        command = "" if Path(path).exists() else inner
    if command.startswith("fail "):
        end.send(Failed("", InternalError(command.removeprefix("fail ")).to_wire()))
        os._exit(1)
    if command == "hang":
        threading.Event().wait()
    if command:
        die(command)
    tuned = {"threads": model.threads or os.getpid() % 200 + 1, "streams": model.streams or 1}
    why, devices = f"threads={tuned['threads']}", options.get("devices", {})
    end.send(Ready(int(options.get("capacity", 2)), "toy", why, tuned, devices=devices))
    while not (worker.stopping.is_set() and not worker.jobs):
        if not worker.is_silent:
            end.send(Heartbeat("denoise" if worker.jobs else "idle"))
        worker.stopping.wait(beat_s) if not worker.stopping.is_set() else time.sleep(beat_s / 10)
    os._exit(0)
