"""Log format: one line for each record, UTC, plain text or JSON. Limits the lines that one cause can write."""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from typing import Any, TextIO

__all__ = ["LEVELS", "LogLimit", "configure_logs", "current_form", "current_level", "fields", "set_level"]

_NEEDS_QUOTES = re.compile(r'[\s="]')
LEVELS = ("debug", "info", "warning", "error")
_LIBRARIES = ("opentelemetry",)  # whose lines, such as an exporter that cannot connect, belong into our log


class _Text(logging.Formatter):
    """Format a record as `2026-01-02T03:04:05.678Z INFO fleet.supervisor: message key=value`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and a traceback below it if the record has one."""
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
        """Return the object on one line."""
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


class _Named(logging.Filter):
    """Adds the field `node` to each record."""

    def __init__(self, node: str) -> None:
        super().__init__()
        self._node = node

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the field, and keep the record."""
        record.fields = {**getattr(record, "fields", {}), "node": self._node}
        return True


def _quoted(value: object) -> str:
    """Return a value as one token that a log reader can split at blanks; quoted as in JSON where that is needed."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or _NEEDS_QUOTES.search(text) else text


def _one_line(text: str) -> str:
    return text.replace("\r", "\\r").replace("\n", "\\n")


def configure_logs(level: str, form: str, node: str = "", stream: TextIO | None = None) -> None:
    """Send the log of every module of ovserve, and of some libraries, to standard error. May be called again.

    Args:
        level: one of LEVELS.
        form: text or json.
        node: of a cluster; a field of each line, unless it is empty.
        stream: where to write; None: standard error.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(_Json() if form == "json" else _Text())
    if node:
        handler.addFilter(_Named(node))
    logger = logging.getLogger("ovserve")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        library.handlers[:], library.propagate = [handler], False


def set_level(level: str) -> None:
    """Change the lowest level that is logged, one of LEVELS."""
    logging.getLogger("ovserve").setLevel(level.upper())


def current_level() -> str:
    """Return the lowest level that is logged."""
    return logging.getLevelName(logging.getLogger("ovserve").level).lower()


def current_form() -> str:
    """Return the format of the log: text or json."""
    handlers = logging.getLogger("ovserve").handlers
    return "json" if handlers and isinstance(handlers[0].formatter, _Json) else "text"


def fields(**values: object) -> dict[str, dict[str, object]]:
    """Return the `extra` of a log call: `log.info("settled", extra=fields(job=job.id, state="done"))`."""
    return {"fields": values}


class LogLimit:
    """Limits the log lines of one cause that clients can repeat at will. Thread-safe: yes, one lock.

    In each interval, the first lines are logged. The others are counted, and one line at the end of the interval has
    their number.

    Args:
        cause: what repeats, for that line.
        lines: how many are logged in an interval.
        interval_s: length of an interval, which begins with a line.
    """

    def __init__(self, cause: str, lines: int = 10, interval_s: float = 10.0) -> None:
        self._cause = cause
        self._limit = lines
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._end = 0.0  # of the current interval
        self._logged = 0  # in it
        self._suppressed = 0  # since the last report
        self._timer: threading.Timer | None = None  # until the report
        self._logger, self._level = logging.getLogger(__name__), logging.INFO

    def log(self, logger: logging.Logger, level: int, message: str, *args: object, **values: object) -> None:
        """Log a line with `fields(**values)`, or count it."""
        if not logger.isEnabledFor(level):
            return
        with self._lock:
            now = time.monotonic()
            if now >= self._end and self._timer is None:
                self._end, self._logged = now + self._interval_s, 0
            self._logger, self._level = logger, level
            is_logged = self._logged < self._limit
            if is_logged:
                self._logged += 1
            else:
                self._suppressed += 1
                if self._timer is None:
                    self._timer = self._start_timer(self._end - now)
        if is_logged:
            logger.log(level, message, *args, extra=fields(**values))

    def report(self) -> None:
        """Log how many lines have been suppressed since the last report, if any have."""
        with self._lock:
            number, self._suppressed = self._suppressed, 0
            if threading.current_thread() is self._timer:
                self._timer = None
            logger, level = self._logger, self._level
        if number:
            values = fields(number=number, interval_s=self._interval_s)
            logger.log(level, "log lines suppressed: %s", self._cause, extra=values)

    def stop(self) -> None:
        """Report now, and end the thread that waits for the end of the interval."""
        timer = self._timer
        if timer is not None:
            timer.cancel()
            timer.join()
            self._timer = None
        self.report()

    def _start_timer(self, delay_s: float) -> threading.Timer | None:
        timer = threading.Timer(delay_s, self.report)
        timer.name, timer.daemon = "log limit", True
        try:
            timer.start()
        except RuntimeError:  # no more threads can be started; the next suppressed line tries again
            return None
        return timer
