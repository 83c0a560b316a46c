"""Hostile image files in a real worker: they cost their job an error, and nothing else."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovserve.wire.messages import Failed, Prepared
from tests import imagefiles as files
from tests.live import children_of
from tests.workerbench import WorkerBench, png

pytestmark = pytest.mark.engine

CIRCLE = Image.new("RGB", (64, 64), (200, 10, 10))
PLAIN = np.full((64, 64, 3), 90, np.uint8)
MASK = np.full((64, 64), 255, np.uint8)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerBench]:
    with WorkerBench(tmp_path_factory.mktemp("spool")) as worker:
        worker.ready()
        yield worker


def decoder_of(worker: WorkerBench) -> int:
    """Return the id of the worker's decoding process."""
    assert worker.process.pid is not None
    (pid,) = children_of(worker.process.pid)
    return pid


@pytest.mark.parametrize("field", ["image", "mask"])
def test_a_file_over_a_count_is_rejected_before_any_device_time(bench: WorkerBench, data: Path, field: str) -> None:
    bomb = bench.blob((data / "bombs" / "scan100.jpg").read_bytes())
    image = bench.image(PLAIN)
    job = bench.start(images=(bomb if field == "image" else image,), mask=bomb if field == "mask" else None)
    end = bench.end(job)
    assert isinstance(end, Failed)
    assert (end.error["error"], end.error["param"]) == ("ImageError", field)
    assert "passes over its blocks in its scans; this server allows at most 16" in end.error["message"]
    assert not bench.of(job, Prepared)


def test_an_unusual_file_is_decoded_in_a_child_of_the_worker(bench: WorkerBench) -> None:
    assert bench.make(images=(bench.blob(files.encoded("GIF", CIRCLE)),))
    pid = decoder_of(bench)
    assert bench.make(
        images=(bench.blob(files.encoded("TIFF", CIRCLE)),),
        mask=bench.blob(files.encoded("BMP", Image.new("L", (64, 64), 255))),
    )
    assert decoder_of(bench) == pid


def test_a_killed_decoding_process_costs_no_job(bench: WorkerBench) -> None:
    image = files.encoded("GIF", CIRCLE)
    assert bench.make(images=(bench.blob(image),))
    first = decoder_of(bench)
    os.kill(first, signal.SIGKILL)
    assert bench.make(images=(bench.blob(image),))
    assert decoder_of(bench) != first
    assert bench.process.is_alive()


def test_decoder_messages_are_few_lines_with_the_job(
    bench: WorkerBench, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fax = bench.blob((data / "bombs" / "g3.tif").read_bytes())
    job = bench.start(images=(fax,), mask=fax)
    bench.end(job)
    text = capfd.readouterr().err
    # The worker of this test writes to the standard error that it got at its start.
    assert text.count("Fax3Decode1D") < 100
    assert text.count("\n") <= 4


def test_the_decoding_process_ends_with_its_worker(tmp_path: Path) -> None:
    with WorkerBench(tmp_path) as worker:
        worker.ready()
        assert worker.make(images=(worker.blob(files.encoded("GIF", CIRCLE)),))
        pid = decoder_of(worker)
        worker.process.kill()
        worker.process.join(20)
        for _ in range(200):
            try:
                stat = Path(f"/proc/{pid}/stat").read_bytes()
            except FileNotFoundError:
                return
            if stat.rpartition(b")")[2].split()[0] == b"Z":
                return
            signal.sigtimedwait([], 0.05)
        pytest.fail("the decoding process still runs")


def test_a_png_edit_needs_no_decoding_process(tmp_path: Path) -> None:
    with WorkerBench(tmp_path) as worker:
        worker.ready()
        assert worker.make(images=(worker.blob(png(PLAIN)),), mask=worker.blob(png(MASK)))
        assert worker.process.pid is not None
        assert children_of(worker.process.pid) == []
