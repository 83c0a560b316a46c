"""Sends the worker's reports to the front end.

A report that does not fit one message is sent with a shortened text. A closed link ends the process.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import NoReturn

from ovserve.errors import ApiError, LinkClosed
from ovserve.wire.link import WorkerLink
from ovserve.wire.messages import Failed, Message, Prepared, Span
from ovserve.worker.jobs import WorkerJob
from ovserve.worker.prepared import PreparedRequest

__all__ = ["SHORT_TEXT_CHARS", "ReportSender", "end_process"]

SHORT_TEXT_CHARS = 300  # length of a shortened text: JSON takes at most 12 bytes per character


class ReportSender:
    """Sends reports over one worker's link. Thread-safe."""

    def __init__(self, link: WorkerLink) -> None:
        self._link = link

    def send(self, message: Message) -> None:
        """Send one message; end the process when the front end has closed the link.

        Raises:
            ValueError: the message does not fit the link's message size.
        """
        try:
            self._link.send(message)
        except LinkClosed:
            end_process(0)

    def failed(self, job_id: str, error: ApiError) -> None:
        """Send Failed for a job, or for the worker itself if `job_id` is empty; shorten a reason that does not fit."""
        try:
            self.send(Failed(job_id, error.to_wire()))
        except ValueError:  # characters that take six or twelve bytes in JSON
            short = type(error)(error.message[:SHORT_TEXT_CHARS], param=error.param, retry_after_s=error.retry_after_s)
            self.send(Failed(job_id, short.to_wire()))

    def span(
        self, job: WorkerJob, name: str, started_at: float, ended_at: float, *, picture: int = -1, rows: int = 0
    ) -> None:
        """Report that a stage of a job has ended, if the job is traced."""
        if job.run.traced:
            self.send(Span(job.id, name, started_at, ended_at, picture, rows))

    def prepared(self, job_id: str, prepared: PreparedRequest) -> None:
        """Send Prepared with the resolved parameters of a job; shorten a revised prompt that does not fit."""
        message = Prepared(
            job=job_id,
            mode=prepared.mode,
            width=prepared.frame.width,
            height=prepared.frame.height,
            steps=prepared.steps,
            text_tokens=prepared.text_tokens,
            image_tokens=prepared.image_tokens,
            output_tokens=prepared.output_tokens,
            revised_prompt=prepared.revised_prompt,
            background=prepared.background,
        )
        try:
            self.send(message)
        except ValueError:
            self.send(dataclasses.replace(message, revised_prompt=prepared.revised_prompt[:SHORT_TEXT_CHARS]))


def end_process(code: int) -> NoReturn:
    """Exit at once, without interpreter shutdown: it cannot wait for threads that are inside native calls."""
    logging.shutdown()
    os._exit(code)
