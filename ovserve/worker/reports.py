"""What a worker says to the front end: every report fits its link, and where nobody reads them the process ends."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import NoReturn

from ovserve.errors import ApiError, LinkClosed
from ovserve.wire.local.pipes import WorkerEnd
from ovserve.wire.messages import Failed, Message, Prepared
from ovserve.worker.prepare import PreparedRequest

__all__ = ["SHORT_TEXT_CHARS", "ReportSender", "end_process"]

SHORT_TEXT_CHARS = 300  # of a message that does not fit a link: at most 12 bytes for each character in JSON


class ReportSender:
    """One worker's reports. Thread-safe."""

    def __init__(self, end: WorkerEnd) -> None:
        self._end = end

    def send(self, message: Message) -> None:
        """Report. The process ends when the front end is gone.

        Raises:
            ValueError: the message does not fit a link.
        """
        try:
            self._end.send(message)
        except LinkClosed:
            end_process(0)

    def failed(self, job: str, error: ApiError) -> None:
        """The end of a job, or without one of the worker, with as much of the reason as fits."""
        try:
            self.send(Failed(job, error.to_wire()))
        except ValueError:  # characters that take six or twelve bytes in JSON
            short = type(error)(error.message[:SHORT_TEXT_CHARS], param=error.param, retry_after_s=error.retry_after_s)
            self.send(Failed(job, short.to_wire()))

    def prepared(self, job: str, edit: PreparedRequest) -> None:
        """What a request has become, with as much of a cut prompt as fits."""
        message = Prepared(
            job=job,
            mode=edit.mode,
            width=edit.frame.width,
            height=edit.frame.height,
            steps=edit.steps,
            text_tokens=edit.text_tokens,
            image_tokens=edit.image_tokens,
            output_tokens=edit.output_tokens,
            revised_prompt=edit.revised_prompt,
            background=edit.background,
        )
        try:
            self.send(message)
        except ValueError:
            self.send(dataclasses.replace(message, revised_prompt=edit.revised_prompt[:SHORT_TEXT_CHARS]))


def end_process(code: int) -> NoReturn:
    """End the process now: other threads sit in native calls that no interpreter shutdown can wait for."""
    logging.shutdown()
    os._exit(code)
