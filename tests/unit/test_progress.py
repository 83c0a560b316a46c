"""What a pull reports: rate and time left from the bytes of the last seconds, as a bar, as lines or as JSON."""

from __future__ import annotations

import io
import json

from ovserve.hub.progress import BarReporter, Event, JsonReporter, Meter, QuietReporter, Snapshot, shown_bytes

HALF = Snapshot(50_000_000, 100_000_000, 2_500_000.0, "unet/openvino_model.bin", 3)
DONE = Event("done", "owner/model is in /models/owner/model", {"directory": "/models/owner/model"})


class Clock:
    """A time that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rate_is_that_of_the_last_seconds_and_of_received_bytes() -> None:
    clock = Clock()
    meter = Meter(1000, done_bytes=400, clock=clock)
    assert (meter.snapshot().percent, meter.snapshot().rate, meter.snapshot().left_s) == (40, 0, None)
    meter.begin("a")
    meter.begin("b")
    clock.now += 2
    meter.add(100)
    found = meter.snapshot()
    assert (found.done_bytes, found.rate, found.left_s, found.file, found.files) == (500, 50, 10, "a", 2)
    for _ in range(30):  # nothing arrives: the rate falls to zero
        clock.now += 1
        meter.snapshot()
    assert meter.snapshot().rate == 0
    meter.end("a")
    meter.take_back(300)
    assert (meter.snapshot().done_bytes, meter.snapshot().file) == (200, "b")


def test_bar_shows_total_file_rate_and_time_left_in_one_line() -> None:
    stream = io.StringIO()
    reporter = BarReporter(stream)
    reporter.progress(HALF)
    shown = stream.getvalue()
    assert shown.startswith("\r\x1b[K[############............]  50 %  50.0 MB of 100 MB  2.5 MB/s  0:20 left  unet/")
    assert shown.endswith("openvino_model.bin and 2 more")
    reporter.show(DONE)
    assert stream.getvalue().endswith("\r\x1b[Kowner/model is in /models/owner/model\n")


def test_bar_is_never_longer_than_a_line_and_an_empty_download_is_complete() -> None:
    stream = io.StringIO()
    BarReporter(stream).progress(Snapshot(0, 0, 0.0, "x" * 500, 1))
    assert len(stream.getvalue()) <= len("\r\x1b[K") + 160
    assert "100 %" in stream.getvalue()
    assert "left" not in stream.getvalue()


def test_lines_without_a_terminal_are_those_of_events_only() -> None:
    stream = io.StringIO()
    reporter = QuietReporter(stream)
    reporter.progress(HALF)
    assert stream.getvalue() == ""
    reporter.show(DONE)
    assert stream.getvalue() == "owner/model is in /models/owner/model\n"


def test_json_has_one_object_on_each_line() -> None:
    stream = io.StringIO()
    reporter = JsonReporter(stream)
    reporter.progress(HALF)
    reporter.show(DONE)
    progress, done = (json.loads(line) for line in stream.getvalue().splitlines())
    assert progress == {
        "event": "progress", "done_bytes": 50_000_000, "total_bytes": 100_000_000, "percent": 50.0,
        "bytes_per_s": 2_500_000, "left_s": 20.0, "file": "unet/openvino_model.bin",
    }  # fmt: skip
    assert done == {"event": "done", "message": DONE.text, "directory": "/models/owner/model"}


def test_bytes_are_shown_with_three_digits() -> None:
    shown = [shown_bytes(count) for count in (0, 999, 1500, 99_499, 99_500, 999_499, 999_500, 5 * 10**13)]
    assert shown == ["0 B", "999 B", "1.5 kB", "99.5 kB", "100 kB", "999 kB", "1.0 MB", "50.0 TB"]
