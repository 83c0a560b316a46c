"""Handlers of the routes that show an operator what the server does now: jobs, and the level of the log."""

from __future__ import annotations

import time
from collections.abc import Mapping

from ovserve.api.exchange import Exchange, Reply
from ovserve.api.replies import json_reply
from ovserve.api.service import Service
from ovserve.dispatch.statuses import JobStatus
from ovserve.errors import InvalidValue
from ovserve.logs import LEVELS, current_level, set_level

__all__ = ["change_log_level", "jobs", "log_level"]


def jobs(api: Service, _: Exchange, __: Mapping[str, str]) -> Reply:
    """List the jobs in flight, those that run first, then those that wait, in the order of their admission."""
    found, left_out = api.dispatcher.job_statuses()
    now = time.monotonic()
    return json_reply({"jobs": [_document(each, now) for each in found], "left_out": left_out})


def _document(job: JobStatus, now: float) -> dict[str, object]:
    return {
        "id": job.id,
        "model": job.model,
        "state": job.state,
        "key": job.key_name,
        "client": job.client,
        "worker": job.worker,
        "attempts": job.attempts,
        "pictures": job.pictures,
        "pictures_done": job.pictures_done,
        "prepared": job.is_prepared,
        "admitted_s_ago": round(now - job.admitted_at, 3),
        "dispatched_s_ago": round(now - job.dispatched_at, 3) if job.dispatched_at else None,
        "deadline_in_s": round(job.deadline_at - now, 3),
    }


def log_level(_: Service, __: Exchange, ___: Mapping[str, str]) -> Reply:
    """Return the level of the log."""
    return json_reply({"level": current_level()})


def change_log_level(api: Service, exchange: Exchange, _: Mapping[str, str]) -> Reply:
    """Change the level of the log in the front end and in all workers, until the next reload."""
    level = exchange.query.get("level", "")
    if level not in LEVELS:
        raise InvalidValue(f"level is {level[:100]!r}; expected one of {', '.join(LEVELS)}.", param="level")
    before = current_level()
    set_level(level)
    api.dispatcher.set_log_level(level)
    return json_reply({"level": level, "before": before})
