"""Stacks in the log: one line for each thread."""

from __future__ import annotations

import logging
import os
import threading

import pytest

from ovserve.stacks import MAX_FRAMES, log_stacks


def test_each_thread_has_a_line_with_its_innermost_call_first(caplog: pytest.LogCaptureFixture) -> None:
    begun, ending = threading.Event(), threading.Event()

    def nested(depth: int) -> None:
        if depth:
            nested(depth - 1)
        else:
            begun.set()
            ending.wait(30)

    thread = threading.Thread(target=nested, args=(2 * MAX_FRAMES,), name="deep")
    thread.start()
    assert begun.wait(30)
    caplog.set_level(logging.WARNING, "ovserve")
    log_stacks("server")
    ending.set()
    thread.join()
    found = {record.fields["thread"]: record.fields for record in caplog.records}  # type: ignore[attr-defined]
    assert found["MainThread"]["stack"].startswith("ovserve/stacks.py:")
    assert " < unit/test_stacks.py:" in found["MainThread"]["stack"]
    deep = found["deep"]
    assert (deep["process"], deep["pid"]) == ("server", os.getpid())
    calls = deep["stack"].split(" < ")
    assert len(calls) == MAX_FRAMES
    assert calls[0].endswith(" wait")
    assert calls[-1].endswith(" nested")
