"""Log records are one line each and can be parsed."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator

import pytest

from ovserve.logs import LogLimit, configure_logs, fields

log = logging.getLogger("ovserve.test")


@pytest.fixture(autouse=True)
def _restore_handlers() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("ovserve", "opentelemetry")]
    kept = [(each.handlers[:], each.level, each.propagate) for each in loggers]
    yield
    for each, values in zip(loggers, kept, strict=True):
        each.handlers[:], each.level, each.propagate = values


def test_value_of_several_words_is_one_token(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info", "text")
    log.info("loaded", extra=fields(model="m", why="it is quick", path='a="b"', note="", count=3, name="a\nb"))
    line = capsys.readouterr().err
    assert line.endswith(r''' model=m why="it is quick" path="a=\"b\"" note="" count=3 name="a\nb"''' + "\n")
    assert line.count("\n") == 1


def test_json_line_has_the_fields_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info", "json")
    log.warning("refused", extra=fields(status=400, why="a\nb"))
    entry = json.loads(capsys.readouterr().err)
    assert (entry["level"], entry["message"], entry["status"], entry["why"]) == ("warning", "refused", 400, "a\nb")


@pytest.mark.parametrize("form", ["text", "json"])
def test_each_line_of_a_worker_in_a_cluster_names_its_node(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info", form, "10.0.0.5/abcd")
    log.info("loaded", extra=fields(model="m"))
    log.info("ready")
    first, second = capsys.readouterr().err.splitlines()
    assert "10.0.0.5/abcd" in first
    assert "10.0.0.5/abcd" in second


# --- limits -----------------------------------------------------------------------------------------------------------


def limited(caplog: pytest.LogCaptureFixture) -> tuple[int, int]:
    """Return the number of ordinary lines, and the number of suppressed lines that were reported."""
    reports = [record.fields["number"] for record in caplog.records if "suppressed" in record.getMessage()]  # type: ignore[attr-defined]
    return len(caplog.records) - len(reports), sum(reports)


@pytest.mark.usefixtures("leak_guard")
def test_repeated_lines_are_counted_and_their_number_is_logged_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ovserve")
    limit = LogLimit("floods", lines=3, interval_s=0.2)
    for number in range(50):
        limit.log(log, logging.WARNING, "flood %d", number, address="a")
    assert [record.getMessage() for record in caplog.records] == ["flood 0", "flood 1", "flood 2"]
    assert caplog.records[0].fields == {"address": "a"}  # type: ignore[attr-defined]
    end = time.monotonic() + 10
    while len(caplog.records) < 4 and time.monotonic() < end:
        time.sleep(0.01)
    assert caplog.records[3].getMessage() == "log lines suppressed: floods"
    assert caplog.records[3].fields == {"number": 47, "interval_s": 0.2}  # type: ignore[attr-defined]
    limit.log(log, logging.WARNING, "flood again")  # a new interval
    limit.stop()
    assert limited(caplog) == (4, 47)


@pytest.mark.usefixtures("leak_guard")
def test_stop_reports_the_rest_and_leaves_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ovserve")
    limit = LogLimit("floods", lines=1, interval_s=60)
    threads = [
        threading.Thread(target=lambda: [limit.log(log, logging.INFO, "flood") for _ in range(100)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    limit.stop()
    assert limited(caplog) == (1, 799)
    limit.stop()
    assert limited(caplog) == (1, 799)


def test_lines_below_the_level_are_neither_logged_nor_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "ovserve")
    limit = LogLimit("floods", lines=1)
    for _ in range(5):
        limit.log(log, logging.INFO, "flood")
    limit.stop()
    assert limited(caplog) == (0, 0)


def test_lines_are_counted_although_no_thread_can_be_started(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    caplog.set_level(logging.INFO, "ovserve")
    monkeypatch.setattr(threading.Thread, "start", fail)
    limit = LogLimit("floods", lines=1, interval_s=60)
    for _ in range(5):
        limit.log(log, logging.INFO, "flood")
    limit.stop()
    assert limited(caplog) == (1, 4)


def test_library_of_traces_follows_a_change_of_the_format(capsys: pytest.CaptureFixture[str]) -> None:
    library = logging.getLogger("opentelemetry.exporter")
    configure_logs("info", "text")
    library.warning("no connection")
    configure_logs("info", "json")
    library.warning("still none")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(" WARNING opentelemetry.exporter: no connection")
    assert json.loads(second)["message"] == "still none"
