"""Watched files: a change counts once it has settled."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from ovserve.watch import Watch, state_of


def test_state_changes_with_every_kind_of_change(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    seen = {state_of([path])}
    path.write_text("one")
    seen.add(state_of([path]))
    os.utime(path, (1, 1))
    seen.add(state_of([path]))
    (tmp_path / "b").write_text("two")
    os.utime(tmp_path / "b", (1, 1))
    (tmp_path / "b").replace(path)
    seen.add(state_of([path]))
    assert len(seen) == 4
    assert state_of([path]) in seen


def test_change_counts_when_two_polls_see_the_same() -> None:
    states = iter(["a", "a", "b", "c", "c", "c", "a", "a"])
    changes: list[int] = []
    watch = Watch(lambda: next(states), lambda: changes.append(1), 3600)
    watch.start()
    seen = []
    for _ in range(7):
        watch.poll()
        seen.append(len(changes))
    watch.stop()
    assert seen == [0, 0, 0, 1, 1, 1, 2]


def test_thread_polls_until_it_is_stopped_and_survives_errors(caplog: pytest.LogCaptureFixture) -> None:
    changed = threading.Event()
    state = ["a"]

    def read() -> str:
        if state[0] == "broken":
            state[0] = "b"
            raise OSError("once")
        return state[0]

    watch = Watch(read, changed.set, 0.01)
    watch.start()
    state[0] = "broken"
    assert changed.wait(10)
    watch.stop()
    assert "could not be read" in caplog.text
