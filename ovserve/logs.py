"""Log format: one line for each record, UTC, plain text or JSON."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Any

__all__ = ["configure_logs", "fields"]

_NEEDS_QUOTES = re.compile(r'[\s="]')
LEVELS = ("debug", "info", "warning", "error")


class _Text(logging.Formatter):
    """Format a record as `2026-01-02T03:04:05.678Z INFO fleet.supervisor: message key=value`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        stamp = f"{moment}.{int(record.msecs):03d}Z"
        extra = "".join(f" {key}={_quoted(value)}" for key, value in getattr(record, "fields", {}).items())
        # Values from clients may hold line ends: escaped, so that a client cannot forge a log line.
        line = (
            f"{stamp} {record.levelname} {record.name.removeprefix('ovserve.')}: "
            f"{_one_line(record.getMessage() + extra)}"
        )
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    """Format a record as one JSON object: time, level, logger, message, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def _quoted(value: object) -> str:
    """Return a value as one token that a log reader can split at blanks; quoted as in JSON where that is needed."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or _NEEDS_QUOTES.search(text) else text


def _one_line(text: str) -> str:
    return text.replace("\r", "\\r").replace("\n", "\\n")


def configure_logs(level: str, form: str) -> None:
    """Send the log of every module of ovserve to standard error.

    Args:
        level: one of LEVELS.
        form: text or json.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    logger = logging.getLogger("ovserve")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def fields(**values: object) -> dict[str, dict[str, object]]:
    """Return the `extra` of a log call: `log.info("settled", extra=fields(job=job.id, state="done"))`."""
    return {"fields": values}
