"""A worker process whose behaviour the prompt commands, over real links and real segments, without a model.

prompt              what the worker does
------------------  ------------------------------------------------------------------------------------------------------
echo TEXT           gives each picture the bytes `echo TEXT|seed`, or the first image's bytes where there is one
crc                 gives a picture of 1024 bytes, the last four of them the CRC-32 of the first image
sleep S             the same after S seconds, stopping when cancelled
steps N S           the same after N steps of S seconds with a Progress for each, stopping when cancelled
previews N          a Partial for each of N previews, then the result
raise               answers the job with a 400
exit N              ends the process with exit code N
segv                ends it with a segmentation fault
dies POINT          ends it with SIGKILL at a point of the job: received, prepared, step, announced, half (of a result's
                    bytes), filled, told (of one picture, not of the end), done
hang                stops beating and never answers
stammer             writes the first half of a message, stops beating and never answers
leak                takes memory until it is ended
garbage             writes bytes that are no message
wrong               answers for a job that it was never given
twice               answers for its job twice
too large           announces 10 bytes and claims 11
absurd              announces more bytes than any picture has
unannounced         claims a picture that it never announced
unasked             announces a picture number that was not asked for
short               says done without a picture
unprepared          says done without ever having said that the job is prepared
deaf                holds on to its job when cancelled and never answers
once PATH COMMAND   does COMMAND unless PATH exists, which it makes first; then echoes

`plugin_config` of the model, a JSON object, commands the rest: {"load": COMMAND, "load_s": S, "capacity": N}; load commands:
fail TEXT (says why, then ends), exit N, segv, kill, hang, until PATH COMMAND (does COMMAND unless PATH exists).
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from zlib import crc32

from ovserve.errors import ImageError, InternalError, LinkClosed
from ovserve.models.families import Defaults
from ovserve.models.profile import ModelProfile, Scheduling
from ovserve.settings.options import ModelSettings, Resolution, Settings
from ovserve.wire.local.pipes import WorkerEnd
from ovserve.wire.local.spool import fill, open_blob
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

BEAT_S = 0.05


def toy_profile(name: str = "toy") -> ModelProfile:
    return ModelProfile(
        name=name,
        directory=Path("/nowhere"),
        family="stable-diffusion",
        tasks=frozenset({"text2image", "image2image", "inpainting"}),
        inpainting_unet=False,
        side_multiple_px=8,
        native=Resolution(64, 64),
        min_side_px=8,
        max_side_px=4096,
        prompt_tokens=77,
        text_encoders=1,
        takes_negative_prompt=True,
        scheduling=Scheduling("DDIM", 1000, "leading", 50),
        defaults=Defaults(1, 1.0, 1.0, 1.0, 1.0),
    )


class _Stopped(Exception):
    """The job was cancelled, or there was no room for its result."""


class _ToyJob:
    def __init__(self, end: WorkerEnd, run: Run) -> None:
        self.id = run.job
        self.end = end
        self.request = ImageRequest.from_json(Path(run.request).read_bytes())
        self.cancelled = threading.Event()
        self.dies_at = ""
        self.rooms: dict[int, str] = {}
        self.room_came = threading.Condition()

    def pass_point(self, point: str) -> None:
        if self.dies_at == point:
            die("kill")

    def prepare(self) -> None:
        self.pass_point("received")
        self.end.send(Prepared(self.id, "image2image", 64, 64, 1, 5, 0, 0))
        self.pass_point("prepared")
        if self.dies_at == "step":
            self.end.send(Progress(self.id, 0, 1, 4))
            self.pass_point("step")

    def sleep(self, seconds: float) -> None:
        if self.cancelled.wait(seconds):
            raise _Stopped

    def deliver(self, picture: int, data: bytes, partial: int = -1) -> None:
        self.end.send(Need(self.id, picture, len(data), partial))
        with self.room_came:
            if not self.room_came.wait_for(lambda: picture in self.rooms, timeout=30):
                raise TimeoutError
            path = self.rooms.pop(picture)
        if not path:
            raise _Stopped
        self.pass_point("announced")
        try:
            if self.dies_at == "half":
                fill(path, data[: len(data) // 2])
                self.pass_point("half")
            fill(path, data)
        except FileNotFoundError:
            raise _Stopped from None
        self.pass_point("filled")
        self.end.send(Picture(self.id, picture, self.request.seed + picture, len(data), partial))
        self.pass_point("told")

    def finish(self) -> None:
        for picture in range(self.request.n):
            if self.request.images:
                with open_blob(self.request.images[0]) as view:
                    data = bytes(1020) + crc32(view).to_bytes(4, "big") if self.request.prompt == "crc" else bytes(view)
            else:
                data = f"{self.request.prompt}|{self.request.seed + picture}".encode()
            self.deliver(picture, data)
        self.end.send(Done(self.id, 1.0, 2.0, 3.0))
        self.pass_point("done")


class _Toy:
    def __init__(self, end: WorkerEnd) -> None:
        self.end = end
        self.jobs: dict[str, _ToyJob] = {}
        self.is_silent = False
        self.stopping = threading.Event()

    def read_commands(self) -> None:
        while True:
            try:
                message = self.end.receive()
            except (LinkClosed, OSError):
                os._exit(0)
            if isinstance(message, Run):
                try:
                    job = self.jobs[message.job] = _ToyJob(self.end, message)
                except FileNotFoundError:
                    self.end.send(Failed(message.job, InternalError("the exchange has ended").to_wire()))
                    continue
                threading.Thread(target=self.serve, args=(job,), daemon=True).start()
            elif isinstance(message, Cancel) and (job := self.jobs.get(message.job)):
                job.cancelled.set()
            elif isinstance(message, Grant) and (job := self.jobs.get(message.job)):
                with job.room_came:
                    job.rooms[message.picture] = message.path
                    job.room_came.notify_all()
            elif isinstance(message, Stop):
                self.stopping.set()

    def serve(self, job: _ToyJob) -> None:
        try:
            self.obey(job, job.request.prompt)
        except _Stopped:
            job.end.send(Failed(job.id, InternalError("stopped").to_wire()))
        except LinkClosed:
            os._exit(0)
        self.jobs.pop(job.id, None)

    def obey(self, job: _ToyJob, prompt: str) -> None:
        command, _, rest = prompt.partition(" ")
        if command == "once":
            path, _, inner = rest.partition(" ")
            if not Path(path).exists():
                Path(path).touch()
                self.obey(job, inner)
                return
        elif command == "raise":
            raise_error = ImageError("the toy was told to refuse", param="image")
            job.end.send(Failed(job.id, raise_error.to_wire()))
            return
        elif command == "dies":
            job.dies_at = rest
        elif command in ("exit", "segv"):
            job.prepare()
            die(prompt)
        elif command in ("hang", "stammer"):
            self.is_silent = True
            if command == "stammer":
                os.write(job.end.reports.fileno(), b'{"kind":"progress","job":"')
            threading.Event().wait()
        elif command == "leak":
            leak()
        elif command == "deaf":
            threading.Event().wait()
        elif misbehave(job, prompt):
            return
        job.prepare()
        if command == "sleep":
            job.sleep(float(rest))
        elif command == "steps":
            steps, seconds = rest.split()
            for step in range(int(steps)):
                job.sleep(float(seconds))
                job.end.send(Progress(job.id, 0, step + 1, int(steps)))
        elif command == "previews":
            for index in range(int(rest)):
                job.deliver(0, f"preview {index}".encode(), partial=index)
        job.finish()


def die(command: str) -> None:
    name, _, rest = command.partition(" ")
    if name == "exit":
        os._exit(int(rest))
    os.kill(os.getpid(), signal.SIGSEGV if name == "segv" else signal.SIGKILL)
    threading.Event().wait()


def leak() -> None:
    held = []
    while True:
        held.append(b"x" * (16 << 20))
        time.sleep(0.02)


def misbehave(job: _ToyJob, command: str) -> bool:
    """The protocol's violations; False when the command is none of them."""
    send = job.end.send
    if command == "garbage":
        os.write(job.end.reports.fileno(), b"\x80\x04 no message of ours\n")
    elif command == "wrong":
        send(Done("a-job-of-somebody-else", 0, 0, 0))
    elif command == "unprepared":
        job.finish()
    elif command == "twice":
        job.prepare()
        job.finish()
        send(Done(job.id, 0, 0, 0))
    elif command == "too large":
        send(Need(job.id, 0, 10))
        send(Picture(job.id, 0, 0, 11))
    elif command == "absurd":
        send(Need(job.id, 0, 1 << 40))
    elif command == "unannounced":
        send(Picture(job.id, 0, 0, 5))
    elif command == "unasked":
        send(Need(job.id, job.request.n, 10))
    elif command == "short":
        send(Done(job.id, 0, 0, 0))
    else:
        return False
    return True


def worker_main(end: WorkerEnd, profile: ModelProfile, model: ModelSettings, settings: Settings) -> None:
    """The spawn target."""
    toy = _Toy(end)
    told = json.loads(model.plugin_config or "{}")
    threading.Thread(target=toy.read_commands, daemon=True).start()
    end.send(Heartbeat("load"))
    command = str(told.get("load", ""))
    time.sleep(float(told.get("load_s", 0)))
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
    end.send(Ready(int(told.get("capacity", 2)), "toy", f"threads={tuned['threads']}", tuned))
    while not (toy.stopping.is_set() and not toy.jobs):
        if not toy.is_silent:
            end.send(Heartbeat("denoise" if toy.jobs else "idle"))
        toy.stopping.wait(BEAT_S) if not toy.stopping.is_set() else time.sleep(BEAT_S / 10)
    os._exit(0)
