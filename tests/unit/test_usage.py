"""The usage log: whole lines, rotation, a second writer, a full disk."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ovserve.errors import SettingsError
from ovserve.usage import UsageLog

pytestmark = pytest.mark.usefixtures("leak_guard")
BIG = 1 << 30


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_lines_of_many_threads_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    usage = UsageLog(path, BIG)

    def write(first: int) -> None:
        for number in range(first, first + 50):
            usage.write({"n": number, "key": "ä" * 300})

    threads = [threading.Thread(target=write, args=(50 * part,)) for part in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    usage.close()
    usage.write({"n": -1})  # after the end: ignored
    assert sorted(entry["n"] for entry in lines(path)) == list(range(400))  # type: ignore[type-var]
    assert usage.errors == 0
    assert path.stat().st_mode & 0o777 == 0o640


def test_full_file_is_renamed_and_no_line_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    usage = UsageLog(path, 100, clock=lambda: 1_800_000_000.25)  # a clock that stands still
    for number in range(20):
        usage.write({"n": number, "fill": "x" * 20})
    usage.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 10
    assert all(file.stat().st_size <= 100 for file in files)
    assert files[1].name == "usage.jsonl.20270115T080000.250000Z"
    assert sorted(entry["n"] for file in files for entry in lines(file)) == list(range(20))  # type: ignore[type-var]


def test_oldest_renamed_files_are_deleted_above_their_number(tmp_path: Path) -> None:
    path, now = tmp_path / "usage.jsonl", [1_800_000_000.0]
    other = tmp_path / "usage.jsonl.bak"
    other.write_text("not ours")
    usage = UsageLog(path, 30, kept=2, clock=lambda: now[0])
    for number in range(10):
        now[0] += 1
        usage.write({"n": number, "fill": "x" * 20})
    usage.close()
    kept = sorted(tmp_path.glob("usage.jsonl.2*"))
    assert [lines(file)[0]["n"] for file in (*kept, path)] == [7, 8, 9]
    assert other.exists()


def test_existing_lines_stay_and_a_torn_one_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    path.write_text('{"n":0}\n{"n":')
    usage = UsageLog(path, BIG)
    usage.write({"n": 1})
    usage.close()
    assert path.read_text("utf-8") == '{"n":0}\n{"n":\n{"n":1}\n'


def test_second_writer_is_refused(tmp_path: Path) -> None:
    first = UsageLog(tmp_path / "a", BIG)
    with pytest.raises(SettingsError, match="another process writes to it") as raised:
        UsageLog(tmp_path / "a", BIG)
    assert raised.value.is_transient  # a server that drains holds the file for a while
    first.close()
    UsageLog(tmp_path / "a", BIG).close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.symlink_to("/dev/null"), "symbolic links"),
        (os.mkfifo, "not a regular file"),
    ],
    ids=["folder", "link", "pipe"],
)
def test_what_is_not_a_file_is_refused(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "usage")
    with pytest.raises(SettingsError, match=message):
        UsageLog(tmp_path / "usage", BIG)


def test_disk_that_is_full_is_counted_and_serving_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage, write = UsageLog(tmp_path / "usage", BIG), os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
        usage.write({"n": 0})

        def fail(_descriptor: int, _data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "write", fail)
        usage.write({"n": 1})
    usage.write({"n": 2})
    usage.close()
    assert usage.errors == 2
    assert (tmp_path / "usage").read_text("utf-8") == '{"n\n{"n":2}\n'
    assert "usage line lost" in caplog.text


def test_new_file_that_cannot_be_opened_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "usage"
    usage = UsageLog(path, 30)
    usage.write({"n": 0, "fill": "x" * 10})
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EMFILE, "Too many open files")))
        usage.write({"n": 1, "fill": "x" * 10})
    usage.write({"n": 2, "fill": "x" * 10})
    usage.close()
    found = [entry["n"] for file in sorted(tmp_path.iterdir(), reverse=True) for entry in lines(file)]
    assert found == [0, 1, 2]
    assert usage.errors == 0
