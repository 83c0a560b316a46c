"""A test bench for a worker in a real process, over a real link: plays the front end's part."""

from __future__ import annotations

import io
import multiprocessing
import select
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovserve.models.profile import read_profile
from ovserve.settings.options import ModelSettings, Settings
from ovserve.settings.worker import WorkerSettings
from ovserve.wire.blobs import Blob, Segment
from ovserve.wire.launcher import WorkerMain
from ovserve.wire.link import Link
from ovserve.wire.local.pipes import open_link
from ovserve.wire.local.spool import Spool
from ovserve.wire.messages import (
    Cancel,
    Done,
    Failed,
    Grant,
    Heartbeat,
    Message,
    Need,
    Picture,
    Prepared,
    Progress,
    Ready,
    Run,
)
from ovserve.wire.request import ImageRequest
from ovserve.worker import main as worker
from tests.live import BUILTIN_PATH

TIMEOUT_S = 60.0


class WorkerBench:
    """One worker process with its link.

    Grants a segment for every picture, unless `grants_segments` or `grants_previews` is False. With `answers_needs`
    False a Need gets no answer until the test calls `answer`.
    """

    def __init__(
        self,
        spool: Path,
        model: ModelSettings | None = None,
        settings: Settings | None = None,
        main: WorkerMain = worker.main,
    ) -> None:
        self.model = model or ModelSettings(name="shapes", path=Path(BUILTIN_PATH), engine="genai")
        self.settings = settings or Settings(models=(self.model,))
        self.profile = read_profile(self.model)
        self.spool = Spool(spool, 1 << 30)
        self.grants_segments = self.grants_previews = self.answers_needs = True
        self.log: list[Message] = []
        self.heartbeats: list[Heartbeat] = []
        self.pictures: dict[tuple[str, int, int], bytes] = {}
        self._segments: dict[tuple[str, int, int], Segment] = {}
        self._jobs = 0
        context = multiprocessing.get_context("spawn")
        self.link, end = open_link(context, self.model.name, 0, 0)
        worker_settings = WorkerSettings.of(self.settings)
        arguments = (end, self.spool.worker_blobs(), self.profile, self.model, worker_settings)
        self.process = context.Process(target=main, args=arguments, daemon=True)
        self.process.start()
        end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.link.close()
        self.process.join(20)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.spool.close()

    # --- reports from the worker ---

    def read(self, timeout_s: float) -> bool:
        """Read the messages that arrive within the time; return False when there were none.

        Raises:
            LinkClosed: the worker has ended.
        """
        if not select.select([self.link.readiness], [], [], timeout_s)[0]:
            return False
        for message in self.link.receive():
            self._note(message)
        return True

    def _note(self, message: Message) -> None:
        if isinstance(message, Heartbeat):
            self.heartbeats.append(message)
            return
        self.log.append(message)
        if isinstance(message, Need):
            if self.answers_needs:
                self.answer(message)
        elif isinstance(message, Picture):
            segment = self._segments.pop((message.job, message.picture, message.partial))
            self.pictures[message.job, message.picture, message.partial] = bytes(segment.view[: message.size])
            segment.release()

    def answer(self, need: Need) -> None:
        """Answer a Need with a segment, or without one as `grants_segments` and `grants_previews` say."""
        storage = ""
        if self.grants_segments and (self.grants_previews or need.partial < 0):
            segment = self.spool.create(need.size, reserve=need.size)
            self._segments[need.job, need.picture, need.partial] = segment
            storage = segment.id
        self.link.send(Grant(need.job, need.picture, storage))

    def until(self, condition: Callable[[], bool]) -> None:
        """Read messages until the condition holds."""
        end = time.monotonic() + TIMEOUT_S
        while not condition():
            left = end - time.monotonic()
            assert left > 0, f"timed out; the last messages: {self.log[-5:]}"
            self.read(left)

    def ready(self) -> Ready:
        """Wait until the worker is ready; return its report."""
        self.until(lambda: self.link.state.ready is not None)
        assert self.link.state.ready is not None
        return self.link.state.ready

    def of(self, job: str, *kinds: type[Message]) -> list[Any]:
        """Return the messages of these kinds about a job, in order."""
        return [message for message in self.log if isinstance(message, kinds) and getattr(message, "job", None) == job]

    # --- commands to the worker ---

    def blob(self, data: bytes) -> Blob:
        return self.spool.put(data).blob(0, len(data))

    def image(self, pixels: NDArray[np.uint8]) -> Blob:
        return self.blob(png(pixels))

    def request(self, **values: Any) -> ImageRequest:
        defaults = self.profile.defaults
        steps, guidance = defaults.num_inference_steps, defaults.guidance_scale
        return ImageRequest(
            **{
                "task": "edit",
                "prompt": "a red circle",
                "num_inference_steps": steps,
                "guidance_scale": guidance,
                **values,
            }
        )

    def start(self, *, timeout_s: float = 600.0, alone: bool = False, **values: Any) -> str:
        """Send the worker a job; return its id."""
        self._jobs += 1
        job = f"job{self._jobs}"
        segment = self.spool.put(self.request(**values).to_json())
        self.link.send(Run(job, segment.id, timeout_s, alone))
        return job

    def cancel(self, job: str) -> None:
        self.link.send(Cancel(job))

    def end(self, job: str) -> Done | Failed:
        """Wait for the one report that ends a job."""
        self.until(lambda: bool(self.of(job, Done, Failed)))
        ends = self.of(job, Done, Failed)
        assert len(ends) == 1
        found: Done | Failed = ends[0]
        return found

    def make(self, **values: Any) -> list[bytes]:
        """Run one job that must succeed; return its encoded pictures."""
        job = self.start(**values)
        end = self.end(job)
        assert isinstance(end, Done), end
        return [data for (owner, _, partial), data in sorted(self.pictures.items()) if owner == job and partial < 0]

    def fail(self, **values: Any) -> dict[str, Any]:
        """Run one job that must fail; return its error."""
        end = self.end(self.start(**values))
        assert isinstance(end, Failed), end
        return end.error


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode pixels as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pixels_of(data: bytes) -> NDArray[np.uint8]:
    """Decode the pixels of a picture."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


__all__ = ["Link", "Prepared", "Progress", "WorkerBench", "pixels_of", "png"]
