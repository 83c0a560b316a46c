"""The decoding process: ordinary files, and what a crash, a loop or too much memory costs."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from ovserve.errors import ImageError, InternalError
from ovserve.pixels.decoder import START_ATTEMPTS, DecodeLimits, Decoder, decode_here
from ovserve.pixels.images import Limits, Pixels
from tests import decodertoys
from tests import imagefiles as files

pytestmark = pytest.mark.processes

LIMITS = Limits(50_000_000, 16_384)
MIB = 1 << 20
# One megapixel or less gets a twentieth of cpu_s: 0.5 s.
DECODE_LIMITS = DecodeLimits(cpu_s=10.0, memory_bytes=1536 * MIB, wall_s=30.0)
UNUSUAL = files.encoded("GIF")  # not decoded in this process


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    made = Decoder(DECODE_LIMITS)
    yield made
    made.close()


@pytest.fixture
def toy(leak_guard: None) -> Iterator[Decoder]:
    made = Decoder(DECODE_LIMITS, command=decodertoys.command)
    yield made
    made.close()


@pytest.fixture(scope="module")
def reused() -> Iterator[Decoder]:
    """Share one decoder between the kinds of failures: each start of its process takes most of a second."""
    made = Decoder(DECODE_LIMITS, command=decodertoys.command)
    yield made
    made.close()


def decode(decoder: Decoder, data: bytes, name: str = "image") -> Pixels:
    return decoder.decode(memoryview(data), name, LIMITS, job="job-1").pixels


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            return stream.read().rpartition(b")")[2].split()[0] != b"Z"
    except FileNotFoundError:
        return False


def wait_until_dead(pid: int) -> None:
    end = time.monotonic() + 20
    while is_alive(pid):
        assert time.monotonic() < end, "the process still runs"
        time.sleep(0.02)


# --- ordinary files ---------------------------------------------------------------------------------------------------


def test_small_baseline_files_need_no_process() -> None:
    made = Decoder(DECODE_LIMITS)
    for form in ("PNG", "JPEG"):
        assert decode(made, files.encoded(form)).shape == (16, 16, 3)
    assert made.pid == 0


def test_process_is_kept_for_the_next_file(decoder: Decoder) -> None:
    decode(decoder, UNUSUAL)
    first = decoder.pid
    assert first
    decode(decoder, files.encoded("TIFF"))
    assert decoder.pid == first


def test_large_baseline_files_are_decoded_in_the_process(decoder: Decoder) -> None:
    data = files.encoded("PNG", Image.new("RGB", (2001, 2000), (1, 2, 3)))
    made = Decoder(DECODE_LIMITS)
    try:
        assert decode(made, data)[1999, 2000].tolist() == [1, 2, 3]
        assert made.pid
    finally:
        made.close()


FORMATS = {
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "JPEG": ("RGB", "L", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
    "GIF": ("P", "L"),
    "BMP": ("RGB", "P", "L", "1"),
    "TIFF": ("RGB", "RGBA", "L", "P", "1", "CMYK", "I;16"),
}
OPTIONS: dict[str, list[dict[str, object]]] = {
    "JPEG": [{}, {"progressive": True}, {"quality": 100, "subsampling": 0}, {"restart_marker_rows": 1}],
    "WEBP": [{}, {"lossless": True}],
    "TIFF": [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}, {"compression": "packbits"}],
}


@given(st.data(), st.sampled_from(sorted(FORMATS)), st.integers(1, 70), st.integers(1, 70), st.integers(0, 99))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_process_decodes_ordinary_files_as_a_worker_does(
    decoder: Decoder, data: st.DataObject, form: str, width: int, height: int, seed: int
) -> None:
    mode = data.draw(st.sampled_from(FORMATS[form]))
    options = dict(data.draw(st.sampled_from(OPTIONS.get(form, [{}]))))
    orientation = data.draw(st.integers(1, 8))
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    if mode == "I;16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    else:
        image = (
            Image.fromarray(noise, "RGBA").convert("RGB").convert(mode) if mode != "RGBA" else Image.fromarray(noise)
        )
    if form not in ("GIF", "BMP"):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    content = files.encoded(form, image, **options)
    expected = decode_here(memoryview(content), "image", LIMITS)
    assert np.array_equal(decode(decoder, content), expected.pixels)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_colour_profile_comes_with_the_pixels_when_it_is_needed(decoder: Decoder, form: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    options = {"progressive": True} if form == "JPEG" else {}
    data = memoryview(files.encoded(form, icc_profile=profile, **options))
    assert decoder.decode(data, "image", LIMITS).colour_profile == profile
    assert decoder.decode(data, "image", LIMITS, needs_profile=False).colour_profile == b""


def test_damaged_file_is_rejected_and_the_process_stays(decoder: Decoder) -> None:
    decode(decoder, UNUSUAL)
    pid = decoder.pid
    data = files.encoded("TIFF")
    with pytest.raises(ImageError, match="mask: not a readable") as caught:
        decode(decoder, data[: len(data) // 2 + 80], "mask")
    assert caught.value.param == "mask"
    assert decoder.pid == pid


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
@pytest.mark.parametrize("kept", [1.0, 0.9])
def test_no_view_of_the_file_is_kept(decoder: Decoder, form: str, kept: float) -> None:
    content = files.encoded(form)
    content = content[: int(len(content) * kept)]
    with mmap.mmap(-1, len(content)) as mapped:  # closing raises BufferError while there is a view
        mapped.write(content)
        data = memoryview(mapped)
        try:
            decoder.decode(data, "image", LIMITS)
        except ImageError as error:  # with its traceback
            assert kept < 1, error
            data.release()
            mapped.close()
        else:
            data.release()


def test_no_view_of_a_rejected_file_is_kept(decoder: Decoder) -> None:
    content = files.tiff({273: (4, [16] * 16), 278: (4, [1]), 279: (4, [2000] * 16)})
    with mmap.mmap(-1, len(content)) as mapped:
        mapped.write(content)
        data = memoryview(mapped)
        with pytest.raises(ImageError, match="overlap") as caught:
            decoder.decode(data, "image", LIMITS)
        data.release()
        mapped.close()
        assert caught.value.__traceback__ is not None


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_size_limits_apply_before_decoding(decoder: Decoder, form: str) -> None:
    data = memoryview(files.encoded(form))
    with pytest.raises(ImageError, match="16x16 is too large; at most 255 pixels"):
        decoder.decode(data, "image", Limits(255, 16))
    assert decoder.decode(data, "image", Limits(256, 16)).pixels.shape == (16, 16, 3)


@pytest.mark.parametrize("name", ["scan100.jpg", "g3.tif"])
def test_bombs_cost_less_than_half_a_second(decoder: Decoder, data: Path, name: str) -> None:
    decode(decoder, UNUSUAL)
    content = (data / "bombs" / name).read_bytes()
    before = cpu_s(decoder.pid) + time.process_time()
    if name == "scan100.jpg":
        with pytest.raises(ImageError, match="passes over its blocks in its scans; this server allows at most 16"):
            decode(decoder, content)
    else:
        decode(decoder, content)
    assert cpu_s(decoder.pid) + time.process_time() - before < 0.5


def cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat", "rb") as stream:
        user, system = stream.read().rpartition(b")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


# --- what goes wrong in the process -----------------------------------------------------------------------------------

FAILURES = {
    "crash": "the decoder failed on this file .killed by signal 11",
    "exit": "the decoder failed on this file .exited with code 3",
    "killed": "the decoder failed on this file .killed by signal 9",
    "loop": "decoding 16x16 pixels takes more than 0.50 s of CPU time",
    "wrong_output": "the decoder failed on this file .invalid shape",
}


@pytest.mark.parametrize("name", sorted(FAILURES))
def test_a_failure_costs_its_request_only(reused: Decoder, name: str) -> None:
    decode(reused, UNUSUAL)
    first = reused.pid
    with pytest.raises(ImageError, match=FAILURES[name]) as caught:
        decode(reused, UNUSUAL, name)
    assert caught.value.param == name
    assert caught.value.code == "invalid_image_file"
    wait_until_dead(first)
    assert decode(reused, UNUSUAL).shape == (16, 16, 3)
    assert reused.pid not in (0, first)


def test_cpu_time_is_limited_for_each_file_and_not_for_all(toy: Decoder) -> None:
    decode(toy, UNUSUAL)
    pid = toy.pid
    used = cpu_s(pid)
    while cpu_s(pid) - used < 0.6:  # more than the limit of one file
        decode(toy, UNUSUAL)
    assert toy.pid == pid


def test_cpu_limit_ends_a_loop_in_time(toy: Decoder) -> None:
    decode(toy, UNUSUAL)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(ImageError, match="CPU time"):
        decode(toy, UNUSUAL, "loop")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert 0.4 < after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3.0


def test_too_much_memory_is_an_error_and_the_process_stays(toy: Decoder) -> None:
    decode(toy, UNUSUAL)
    pid = toy.pid
    with pytest.raises(ImageError, match="memory: decoding 16x16 pixels takes more than 33559619 bytes"):
        decode(toy, UNUSUAL, "memory")
    assert decode(toy, UNUSUAL).shape == (16, 16, 3)
    assert toy.pid == pid


def test_output_cannot_exceed_its_memory_file(toy: Decoder) -> None:
    with pytest.raises(ImageError, match="the decoded image does not have the size in its header"):
        decode(toy, UNUSUAL, "large_output")
    assert decode(toy, UNUSUAL).shape == (16, 16, 3)


def test_a_process_that_hangs_without_cpu_time_is_killed() -> None:
    toy = Decoder(DecodeLimits(10.0, 1536 * MIB, 3.0), command=decodertoys.command)
    try:
        decode(toy, UNUSUAL)
        first = toy.pid
        with pytest.raises(ImageError, match="decoding did not end within 3 s"):
            decode(toy, UNUSUAL, "hang")
        wait_until_dead(first)
        assert decode(toy, UNUSUAL).shape == (16, 16, 3)
    finally:
        toy.close()


@pytest.mark.parametrize("kind", [resource.RLIMIT_AS, resource.RLIMIT_CPU])
def test_limits_of_the_service_manager_are_kept(kind: int, leak_guard: None) -> None:
    """A hard limit is finite when the service has LimitAS= or LimitCPU=."""
    limit = 1 << 40 if kind == resource.RLIMIT_AS else 30

    def limited(descriptor: int, parent: int, _: tuple[int, str]) -> list[str]:
        program = f"import resource; resource.setrlimit({kind}, ({limit}, {limit}))"
        program += f"; from ovserve.pixels.decoder_process import main; main({descriptor}, {parent})"
        return [sys.executable, "-c", program]

    made = Decoder(DecodeLimits(10_000.0, 2 << 40, 30.0), command=limited)
    try:
        for _ in range(2):
            assert decode(made, UNUSUAL).shape == (16, 16, 3)
    finally:
        made.close()


def test_a_short_limit_for_a_file_does_not_apply_to_the_start(toy: Decoder) -> None:
    made = Decoder(DecodeLimits(10.0, 1536 * MIB, 0.2))
    try:
        assert decode(made, UNUSUAL).shape == (16, 16, 3)
    finally:
        made.close()


def test_no_descriptor_is_left_when_a_memory_file_cannot_be_made(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode(decoder, UNUSUAL)
    create, before = os.memfd_create, len(os.listdir("/proc/self/fd"))

    def failing(name: str, flags: int = 0) -> int:
        if "pixels" in name:
            raise OSError(errno.EMFILE, "too many open files")
        return create(name, flags)

    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", failing)
        with pytest.raises(OSError, match="too many open files"):
            decode(decoder, UNUSUAL)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_whose_process_was_killed_is_tried_once_more(
    toy: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_MARKER", str(tmp_path / "killed"))
    assert decode(toy, UNUSUAL, "killed_once").shape == (16, 16, 3)


def test_a_process_killed_while_idle_is_replaced(decoder: Decoder) -> None:
    decode(decoder, UNUSUAL)
    first = decoder.pid
    os.kill(first, signal.SIGKILL)
    wait_until_dead(first)
    assert decode(decoder, UNUSUAL).shape == (16, 16, 3)
    assert decoder.pid != first


def test_messages_of_native_libraries_are_one_log_line_with_the_job(
    toy: Decoder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ovserve"), "propagate", True)
    decode(toy, UNUSUAL, "noisy")
    lines = [record for record in caplog.records if record.name == "ovserve.pixels.decoder"]
    assert len(lines) == 1
    assert lines[0].__dict__["fields"] == {"job": "job-1", "field": "noisy", "lines": 30_000, "bytes": 1_248_890}
    assert len(lines[0].getMessage()) < 1100
    caplog.clear()
    decode(toy, UNUSUAL)
    assert not [record for record in caplog.records if record.name == "ovserve.pixels.decoder"]


# --- life and death ---------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_broken_installation_is_a_server_error_and_no_loop(tmp_path: Path, leak_guard: None) -> None:
    starts = tmp_path / "starts"

    def broken(descriptor: int, parent: int, _: tuple[int, str]) -> list[str]:
        return [sys.executable, "-c", f"open({str(starts)!r}, 'a').write('x'); raise SystemExit('no Pillow')"]

    clock = Clock()
    made = Decoder(DECODE_LIMITS, command=broken, clock=clock)
    for _ in range(5):
        with pytest.raises(InternalError, match="the decoding process does not start"):
            decode(made, UNUSUAL)
    assert len(starts.read_text()) == START_ATTEMPTS
    assert decode(made, files.encoded("PNG")).shape == (16, 16, 3)  # baseline files need no process
    clock.now = 1.5
    for _ in range(2):
        with pytest.raises(InternalError):
            decode(made, UNUSUAL)
    assert len(starts.read_text()) == START_ATTEMPTS + 1
    clock.now = 3.0  # the backoff has doubled
    with pytest.raises(InternalError):
        decode(made, UNUSUAL)
    assert len(starts.read_text()) == START_ATTEMPTS + 1


def test_crashing_files_do_not_use_up_the_attempts_to_start(toy: Decoder) -> None:
    for _ in range(START_ATTEMPTS + 2):
        with pytest.raises(ImageError):
            decode(toy, UNUSUAL, "crash")
    assert decode(toy, UNUSUAL).shape == (16, 16, 3)


WORKER = """
import sys
from ovserve.pixels.decoder import DecodeLimits, Decoder
from ovserve.pixels.images import Limits
from tests import decodertoys
from tests.unit.test_decoder import DECODE_LIMITS, LIMITS, UNUSUAL
import threading
decoder = Decoder(DECODE_LIMITS, command=decodertoys.command)
decoder.decode(memoryview(UNUSUAL), "image", LIMITS)
print(decoder.pid, flush=True)
decoder.decode(memoryview(UNUSUAL), sys.argv[1], LIMITS)
input()
"""


@pytest.mark.parametrize("name", ["image", "hang"])
def test_the_process_ends_with_its_worker(name: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WORKER, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as worker:
        assert worker.stdout is not None
        pid = int(worker.stdout.readline())
        assert is_alive(pid)
        worker.kill()
    wait_until_dead(pid)


def test_the_process_imports_no_openvino(decoder: Decoder) -> None:
    decode(decoder, UNUSUAL)
    mapped = Path(f"/proc/{decoder.pid}/maps").read_text("utf-8")
    assert "_imaging" in mapped
    assert "openvino" not in mapped


def test_memory_files_are_freed(decoder: Decoder) -> None:
    decode(decoder, UNUSUAL)
    before = set(os.listdir("/proc/self/fd")), set(os.listdir(f"/proc/{decoder.pid}/fd"))
    for _ in range(5):
        decode(decoder, UNUSUAL)
    assert (set(os.listdir("/proc/self/fd")), set(os.listdir(f"/proc/{decoder.pid}/fd"))) == before


def test_limits_grow_with_the_number_of_pixels() -> None:
    limits = DECODE_LIMITS
    assert limits.cpu_of(1) == limits.cpu_of(1_000_000) == 0.5
    assert limits.cpu_of(2_000_000) == pytest.approx(0.7)
    assert limits.cpu_of(60_000_000) == 10.0
    assert limits.memory_of(1_000_000, 10_000_000) < 100_000_000
    assert limits.memory_of(50_000_000, 100 * MIB) < limits.memory_bytes
    assert limits.memory_of(2_000_000_000, 0) == limits.memory_bytes
