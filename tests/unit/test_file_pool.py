"""File pool: uploads reuse files, and no reader of the earlier upload sees the new bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovserve.errors import BlobGone, ContentTooLarge
from ovserve.wire.blobs import Blob
from ovserve.wire.local.file_pool import MAX_POOLED_FILES, lock_for_reading
from ovserve.wire.local.spool import Spool, SpoolSegment

MIB = 1 << 20


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path, 32 * MIB, warm_bytes=8 * MIB)
    yield spool
    spool.close()
    assert not list(tmp_path.rglob("*warm*"))


def filled(spool: Spool, data: bytes, max_bytes: int = 0) -> SpoolSegment:
    segment = spool.create_for_upload(max_bytes or len(data))
    segment.reserve(len(data))
    segment.view[: len(data)] = data
    return segment


def files(spool: Spool) -> list[str]:
    return sorted(path.name for path in spool.directory.iterdir() if path.name != "lock")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_next_upload_reuses_the_file_under_another_name(spool: Spool) -> None:
    first = filled(spool, b"first upload" * 1000)
    path, number = first.path, os.stat(first.path).st_ino
    first.release()
    assert not Path(path).exists()
    assert spool.used_bytes == 0
    assert spool.file_pool.size_bytes == 12_000
    second = filled(spool, b"second" * 10)
    assert os.stat(second.path).st_ino == number
    assert second.path != path
    assert spool.used_bytes == 12_000
    assert spool.file_pool.size_bytes == 0
    with spool.worker_blobs().open(second.blob(0, 60)) as view:
        assert bytes(view) == b"second" * 10


def test_small_upload_does_not_get_the_file_of_a_large_one(spool: Spool) -> None:
    filled(spool, b"x" * (6 * MIB)).release()
    small, unknown = filled(spool, b"y" * 5000), spool.create_for_upload(6 * MIB, expected_bytes=5000)
    assert (small.reserved, unknown.reserved, spool.file_pool.size_bytes) == (5000, 0, 6 * MIB)
    assert spool.create_for_upload(6 * MIB).reserved == 6 * MIB


def test_pooled_file_grows_for_a_larger_upload(spool: Spool) -> None:
    first = filled(spool, b"x" * 1000)
    number = os.stat(first.path).st_ino
    first.release()
    second = filled(spool, b"y" * 500_000)
    assert os.stat(second.path).st_ino == number
    assert second.reserved == 500_000
    assert bytes(second.view[:500_000]) == b"y" * 500_000


def test_smallest_file_that_is_large_enough_is_reused(spool: Spool) -> None:
    segments = [filled(spool, b"x" * size) for size in (100_000, 400_000, 200_000)]
    for segment in segments:
        segment.release()
    assert spool.create_for_upload(150_000).reserved == 200_000
    assert spool.create_for_upload(900_000).reserved == 400_000
    assert spool.create_for_upload(2 * MIB).reserved == 0
    assert spool.create_for_upload(10).reserved == 100_000


def test_results_are_never_written_into_pooled_files(spool: Spool) -> None:
    filled(spool, b"an upload").release()
    assert spool.create(9, reserve=9).view[:9] == bytes(9)
    assert spool.file_pool.size_bytes == 9


def test_blob_of_a_pooled_or_reused_file_cannot_be_opened(spool: Spool) -> None:
    first = filled(spool, b"first")
    blob = first.blob(0, 5)
    first.release()
    for _ in range(2):
        with pytest.raises(BlobGone), spool.worker_blobs().open(blob):
            pass
        filled(spool, b"other")


def test_file_that_a_worker_reads_is_not_pooled(spool: Spool) -> None:
    first = filled(spool, b"first")
    with spool.worker_blobs().open(first.blob(0, 5)) as seen:
        first.release()
        assert spool.file_pool.size_bytes == 0
        filled(spool, b"other")
        assert bytes(seen) == b"first"
    assert len(files(spool)) == 1


def test_file_opened_before_release_cannot_be_locked_when_pooled_or_reused(spool: Spool) -> None:
    first = filled(spool, b"first")
    path = first.path
    early = os.open(path, os.O_RDONLY)
    first.release()
    with pytest.raises(BlobGone):
        lock_for_reading(early, path)  # the file is in the pool
    second = filled(spool, b"other")
    assert os.fstat(early).st_ino == os.stat(second.path).st_ino
    with pytest.raises(BlobGone):
        lock_for_reading(early, path)  # the file is reused
    os.close(early)


def test_killed_worker_does_not_keep_its_lock(spool: Spool) -> None:
    first = filled(spool, b"first")
    script = (
        "import sys; from ovserve.wire.blobs import Blob; from ovserve.wire.local.blobs import SpoolBlobs\n"
        "with SpoolBlobs((sys.argv[1],)).open(Blob(sys.argv[2], 0, 5)): print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(spool.directory), first.id]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdout
        assert worker.stdout.readline() == b"open\n"
        worker.kill()
        worker.wait(10)
    first.release()
    assert spool.file_pool.size_bytes == 5


def test_file_with_a_view_still_held_is_not_pooled(spool: Spool) -> None:
    first = filled(spool, b"first")
    held = first.view[:5]
    first.release()
    assert spool.file_pool.size_bytes == 0
    filled(spool, b"other")
    assert bytes(held) == b"first"
    held.release()


def test_second_release_does_not_affect_the_next_owner(spool: Spool) -> None:
    first = filled(spool, b"first")
    first.release()
    second = filled(spool, b"other")
    first.release()
    assert bytes(second.view[:5]) == b"other"
    assert Path(second.path).exists()


def test_pool_has_a_limit_in_bytes(spool: Spool) -> None:
    segments = [filled(spool, b"x" * (3 * MIB)) for _ in range(4)]
    for segment in segments:
        segment.release()
    assert spool.file_pool.size_bytes == 6 * MIB
    assert len(files(spool)) == 2
    filled(spool, b"x" * (9 * MIB)).release()
    assert spool.file_pool.size_bytes == 6 * MIB


def test_pool_is_at_most_a_quarter_of_the_spool(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 4 * MIB, warm_bytes=4 * MIB)
    filled(spool, b"x" * (MIB + 1)).release()
    assert spool.file_pool.size_bytes == 0
    filled(spool, b"x" * MIB).release()
    assert spool.file_pool.size_bytes == MIB
    spool.close()


@pytest.mark.parametrize("announced", [True, False])
def test_file_of_an_upload_that_filled_the_spool_leaves_space_for_small_ones(tmp_path: Path, announced: bool) -> None:
    spool = Spool(tmp_path, 4 * MIB, warm_bytes=4 * MIB)
    filled(spool, b"x" * (4 * MIB)).release()
    for _ in range(3):
        upload = spool.create_for_upload(5000 if announced else 4 * MIB, expected_bytes=5000)
        upload.reserve(5000)
        spool.put(b"its request").release()
        upload.release()
    spool.close()


def test_file_of_an_upload_that_filled_a_small_tmpfs_leaves_space_for_small_ones(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "docker", str(tmp_path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs a privilege that this user does not have")
    spool = Spool(tmp_path, 2048 * MIB, warm_bytes=64 * MIB)  # the defaults, in a container's /dev/shm
    try:
        large = spool.create_for_upload(256 * MIB)
        large.reserve(64 * MIB)
        assert large.view[:1] == b"\0"
        with pytest.raises(ContentTooLarge):
            large.reserve(65 * MIB)
        large.release()
        for _ in range(3):
            small = filled(spool, b"small")
            spool.put(b"its request").release()
            small.release()
    finally:
        spool.close()
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_pool_has_a_limit_in_files(spool: Spool) -> None:
    before = descriptors()
    segments = [filled(spool, b"x") for _ in range(MAX_POOLED_FILES + 5)]
    for segment in segments:
        segment.release()
    assert len(files(spool)) == MAX_POOLED_FILES
    spool.close()
    assert descriptors() < before


def test_pooled_files_are_evicted_at_the_spool_limit(spool: Spool) -> None:
    filled(spool, b"x" * (8 * MIB)).release()
    segment = spool.create(32 * MIB, reserve=32 * MIB)
    assert spool.file_pool.size_bytes == 0
    segment.release()
    with pytest.raises(ContentTooLarge):
        spool.create(33 * MIB, reserve=33 * MIB)


def test_pooled_files_are_evicted_in_a_full_directory(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tiny", str(tmp_path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs a privilege that this user does not have")
    spool = Spool(tmp_path, 16 * MIB, warm_bytes=8 * MIB)
    try:
        filled(spool, b"x" * (MIB // 2)).release()
        assert spool.file_pool.size_bytes == MIB // 2
        filled(spool, b"y" * (3 * MIB // 2), max_bytes=4 * MIB).release()
    finally:
        spool.close()
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_pooled_files_of_a_vanished_folder_are_closed_when_used_or_evicted(spool: Spool) -> None:
    before = descriptors()
    held = filled(spool, b"held")
    for _ in range(2):
        filled(spool, b"upload").release()
    shutil.rmtree(spool.directory)
    held.release()  # it cannot be pooled
    assert spool.used_bytes == 0
    filled(spool, b"next").release()  # the pooled one cannot be reused
    assert spool.file_pool.size_bytes == 4
    spool.empty_pool()
    assert (descriptors(), spool.used_bytes) == (before, 0)


def test_pool_is_emptied_when_the_folder_is_recreated(spool: Spool) -> None:
    filled(spool, b"upload").release()
    shutil.rmtree(spool.directory)
    spool.put(b"request").release()
    assert spool.file_pool.size_bytes == 0


def test_without_a_pool_files_are_removed_on_release(tmp_path: Path) -> None:
    spool = Spool(tmp_path, MIB)
    first = filled(spool, b"first")
    blob = first.blob(0, 5)
    first.release()
    assert files(spool) == []
    assert spool.create_for_upload(5).view[:0] == b""
    assert isinstance(blob, Blob)
    spool.close()
